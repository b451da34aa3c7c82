"""The clean encoding: what it promises where the harness' drops or adds something."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data.tokenizer import Tokenizer, load_tokenizer
from steep.eval import Encoder


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return load_tokenizer(tiny)


def straddling(tokenizer: Tokenizer) -> tuple[str, str]:
    """A context and a continuation between which a token of the whole lies across the border."""
    whole = "Das Herz pumpt Blut durch den Körper"
    for cut in range(5, len(whole)):
        head = tokenizer.encode(whole[:cut])
        if tokenizer.encode(whole)[: len(head)] != head:
            return whole[:cut], whole[cut:]
    raise AssertionError("no token straddles any border")


def test_no_character_is_dropped_at_a_straddled_border(tokenizer: Tokenizer) -> None:
    context, continuation = straddling(tokenizer)
    clean = Encoder(tokenizer, 64).pair(context, continuation)
    assert tokenizer.decode(clean.context + clean.continuation) == context + continuation
    assert tokenizer.decode(clean.continuation).endswith(continuation)
    assert clean.context + clean.continuation == [0, *tokenizer.encode(context + continuation)]


@settings(max_examples=200, deadline=None)
@given(text=st.text("aeiourst nD.\n", min_size=2, max_size=30), cut=st.integers(1, 29))
def test_every_split_of_a_text_is_scored_whole(tokenizer: Tokenizer, text: str, cut: int) -> None:
    context, continuation = text[:cut], text[cut:]
    if not continuation:
        return
    request = Encoder(tokenizer, 64).pair(context, continuation)
    assert request.context + request.continuation == [0, *tokenizer.encode(text)]
    assert tokenizer.decode(request.continuation).endswith(continuation)


def test_choices_of_an_item_share_their_context(tokenizer: Tokenizer) -> None:
    """One choice straddles the border, the others do not: all are scored from the same token on."""
    context, continuation = straddling(tokenizer)
    requests = Encoder(tokenizer, 64).choices(context, [continuation, " A", "??"])
    assert requests[0].context == requests[1].context == requests[2].context
    for request, choice in zip(requests, (continuation, " A", "??")):
        assert tokenizer.decode(request.context + request.continuation) == context + choice


def test_one_bos_and_literal_special_strings_stay_text(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, 64)
    request = encoder.pair("<s>Der Patient", " hat </s> Fieber")
    ids = request.context + request.continuation
    assert ids.count(0) == 1
    assert 1 not in ids
    assert encoder.rolling("<s> Fieber").count(0) == 0
    assert encoder.prompt("Fieber", 64)[0][0] == 0


@pytest.mark.parametrize(("add_bos", "expected"), [(None, 1), (True, 1), (False, 0)])
def test_add_bos(tokenizer: Tokenizer, add_bos: bool | None, expected: int) -> None:
    assert Encoder(tokenizer, 64, add_bos=add_bos).pair("Der Patient", " hat").context.count(0) == expected


def test_empty_context_is_the_prefix_token(tokenizer: Tokenizer, tiny_without_bos: Path) -> None:
    assert Encoder(tokenizer, 64).pair("", "Der").context == [0]
    assert Encoder(load_tokenizer(tiny_without_bos), 64).pair("", "Der").context == [0]


def test_too_long_a_prompt_keeps_its_bos_and_is_marked(tokenizer: Tokenizer) -> None:
    context = "Fieber ist hoch. " * 30
    length = len(tokenizer.encode(context + "ja")) + 1
    clean = Encoder(tokenizer, 20).pair(context, "ja")
    assert clean.truncated == length - 21
    assert len(clean.context) + len(clean.continuation) == 21
    assert clean.context[0] == 0
    assert clean.context[1:] + clean.continuation == tokenizer.encode(context + "ja")[-20:]
    assert Encoder(tokenizer, 20, "lmeval").pair(context, "ja").context[0] != 0
    ids, cut = Encoder(tokenizer, 20).prompt(context, 12)
    assert len(ids) == 12
    assert ids[0] == 0
    assert cut == len(tokenizer.encode(context)) + 1 - 12


def test_refusals(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="empty continuation"):
        Encoder(tokenizer, 64).pair("Der", "")
    with pytest.raises(ValueError, match="exceeds max_length 20"):
        Encoder(tokenizer, 20).pair("Der", " Fieber" * 30)
    with pytest.raises(ValueError, match="mode: 'lm_eval'"):
        Encoder(tokenizer, 64, "lm_eval")  # type: ignore[arg-type]
    context, continuation = straddling(tokenizer)
    shorter = continuation[0]
    if len(tokenizer.encode(context + shorter)) <= len(tokenizer.encode(context)):
        with pytest.raises(ValueError, match="no tokens of its own"):
            Encoder(tokenizer, 64, "lmeval").pair(context, shorter)
