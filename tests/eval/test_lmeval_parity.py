"""The lmeval mode against lm-evaluation-harness 0.4.13 itself, live: same model, same texts, fp32."""

from pathlib import Path

import pytest

from steep.eval import Encoder, Scorer, generate_until, load_model, rolling_loglikelihood

lm_eval_models = pytest.importorskip("lm_eval.models.huggingface")

PAIRS = [
    ("Was ist eine Hypertonie?\nAntwort:", " Bluthochdruck"),
    ("Was ist eine Hypertonie?\nAntwort: ", "Bluthochdruck"),
    ("Was ist eine Hypertonie?\nAntwort:  \n", "Bluthochdruck"),
    ("", "Der Patient"),
    ("", "<s>Der Patient"),
    ("<s>Der Patient", " hat Fieber"),
    ("Der </s> Patient", " hat <s> Fieber"),
    *(("Question: x\nA. water\nB. blood\nAnswer:", f" {letter}") for letter in "ABCD"),
    ("Das Herz pumpt Bl", "ut durch den Körper"),
    ("Der Muskel", "schmerz ist stark"),
    ("Lunge " * 60 + "Lunge", " ist entzündet"),
    ("Ω ≥ 5 µg/dL\n", "→ pathologisch"),
]
TEXTS = [
    "Der Patient hat Fieber.",
    # Not the same sentence again and again: where a full and a partial window read the same tokens, the harness scores
    # the partial one at the wrong rows (its cache of equal inputs; see test_equal_windows_of_unequal_targets).
    " ".join(f"Befund {number}: die Leber ist ein Organ." for number in range(40)),
    "Kurz",
    "Le foie est un organe.\n\nFièvre élevée.",
    "Das Herz <s> pumpt",
    "",
]
GENERATIONS = [
    ("Der Patient", ["\n"], 12),
    ("Was ist Fieber?\nAntwort:", ["e", " ist"], 16),
    ("Herz " * 70 + "Herz", [], 8),
]


def instances(kind: str, arguments: list) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


@pytest.fixture(scope="module", params=[(True, None), (True, False), (True, True), (False, None), (False, True)])
def both(request: pytest.FixtureRequest) -> tuple:
    """(harness' model, ours) for a tokenizer that adds BOS or does not, under add_bos_token None, False, True."""
    adds_bos, add_bos = request.param
    folder: Path = request.getfixturevalue("tiny" if adds_bos else "tiny_without_bos")
    theirs = lm_eval_models.HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, add_bos_token=add_bos
    )
    decoder, tokenizer, _ = load_model(folder)
    scorer = Scorer(decoder, tokenizer)
    return theirs, scorer, Encoder(tokenizer, scorer.max_length, "lmeval", add_bos)


def test_token_ids(both: tuple) -> None:
    theirs, _, encoder = both
    for context, continuation in PAIRS:
        ours = encoder.pair(context, continuation)
        if context and not ours.truncated:
            assert (ours.context, ours.continuation) == theirs._encode_pair(context, continuation)


def test_loglikelihoods(both: tuple) -> None:
    theirs, scorer, encoder = both
    expected = theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    ours = scorer.loglikelihood([encoder.pair(*pair) for pair in PAIRS])
    assert [score.logprob for score in ours] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [score.is_greedy for score in ours] == [greedy for _, greedy in expected]


def test_rolling_loglikelihoods(both: tuple) -> None:
    theirs, scorer, encoder = both
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]), True)
    ours, _ = rolling_loglikelihood(scorer, encoder, TEXTS)
    # They sum hundreds of tokens in fp32, we in float64: a rounding of 2^-24 per unit of the sum besides the 1e-4.
    assert ours == pytest.approx(expected, abs=1e-4, rel=1e-7)


def test_generated_text(both: tuple) -> None:
    theirs, scorer, encoder = both
    for prompt, until, max_gen_toks in GENERATIONS:
        arguments = {"until": list(until), "max_gen_toks": max_gen_toks, "do_sample": False}
        expected = theirs.generate_until(instances("generate_until", [(prompt, arguments)]), disable_tqdm=True)
        ours = generate_until(scorer.decoder, encoder, [prompt], until, max_gen_toks)
        assert [answer.text for answer in ours] == expected


def test_equal_windows_of_unequal_targets(tiny: Path) -> None:
    """A fault that is not reproduced: requests with equal input tokens but another border between context and
    continuation share one row of results in the harness, counted from the wrong end. Without its cache we agree."""
    pairs = [("Die Leber ist", " ein Organ"), ("Die Leber ist ein", " Organ")]
    decoder, tokenizer, _ = load_model(tiny)
    scorer = Scorer(decoder, tokenizer)
    encoder = Encoder(tokenizer, scorer.max_length, "lmeval")
    ours = [score.logprob for score in scorer.loglikelihood([encoder.pair(*pair) for pair in pairs])]
    for logits_cache in (False, True):
        theirs = lm_eval_models.HFLM(
            pretrained=str(tiny), device="cpu", dtype="float32", batch_size=2, logits_cache=logits_cache
        )
        expected = [logprob for logprob, _ in theirs.loglikelihood(instances("loglikelihood", pairs), True)]
        agree = ours == pytest.approx(expected, abs=1e-4)
        assert agree is not logits_cache
