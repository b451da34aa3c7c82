"""Greedy answers: where they end, what is extracted from them, and the file-to-file command."""

import json
from pathlib import Path

import pytest

from steep.eval import Encoder, generate_until, load_model
from steep.eval.generation import cut_at_stops, exact_match, extract, generate_file
from steep.eval.task import ExactMatch, Filter, FilterStep


@pytest.fixture(scope="module")
def ready(tiny: Path) -> tuple:
    decoder, tokenizer, _ = load_model(tiny)
    return decoder, Encoder(tokenizer, 64)


def test_answers_end_before_the_stop(ready: tuple) -> None:
    (free,) = generate_until(*ready, ["Der Patient"], max_gen_toks=12)
    assert free.stop_reason == "length"
    assert free.num_tokens == 12
    stop = free.text[5:8]
    (stopped,) = generate_until(*ready, ["Der Patient"], [stop], max_gen_toks=12)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.stop_reason == "stop_string"
    assert stopped.num_tokens < 12
    assert stopped.prompt_sha256 == free.prompt_sha256


def test_stop_token(ready: tuple) -> None:
    decoder, encoder = ready
    (free,) = generate_until(decoder, encoder, ["Die Leber"], max_gen_toks=3, stop_ids=())
    first = encoder.tokenizer.encode(free.text)
    ids = range(encoder.tokenizer.vocab_size)
    (stopped,) = generate_until(decoder, encoder, ["Die Leber"], max_gen_toks=3, stop_ids=ids)
    assert (stopped.stop_reason, stopped.num_tokens) == ("stop_token", 1)
    assert len(first) >= 1


def test_long_prompts_are_cut_and_marked(ready: tuple) -> None:
    prompt = "Fieber ist hoch. " * 40
    tokens = len(ready[1].tokenizer.encode(prompt)) + 1
    (answer,) = generate_until(*ready, [prompt], max_gen_toks=10)
    assert answer.truncated == tokens - 54
    assert answer.num_tokens <= 10


def test_bad_settings(ready: tuple) -> None:
    with pytest.raises(ValueError, match="max_gen_toks: 64 leaves no room"):
        generate_until(*ready, ["x"], max_gen_toks=64)
    with pytest.raises(ValueError, match="empty stop string"):
        generate_until(*ready, ["x"], [""], max_gen_toks=4)


def test_cut_at_stops() -> None:
    assert cut_at_stops("one two. three", [".", "two"]) == "one "
    assert cut_at_stops("one", ["x"]) == "one"


TEXTS = ["so 3 + 4 = 7\n#### 7", "#### 1,234.", "no number", "$12.50 then 13", "#### abc 5"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("pattern", "select"), [(r"#### (\-?[0-9\.\,]+)", 0), (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)]
)
def test_extraction_is_the_harness_own(text: str, pattern: str, select: int) -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    (expected,) = extraction.RegexFilter(pattern, select).apply([[text]], [{}])[0]
    regex = FilterStep(function="regex", regex_pattern=pattern, group_select=select)
    assert extract(text, Filter(name="f", filter=[regex, FilterStep(function="take_first")])) == expected


@pytest.mark.parametrize(
    ("answer", "target"), [("7", "so #### 7"), ("$1,234.", "1234"), ("Ja!", "ja"), ("7", "8"), ("[invalid]", "5")]
)
def test_exact_match_is_the_harness_own(answer: str, target: str) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    for case in (False, True):
        for punctuation in (False, True):
            ignore = {
                "ignore_case": case,
                "ignore_punctuation": punctuation,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
            expected = metrics.exact_match_hf_evaluate([answer], [target], **ignore)["exact_match"]
            assert exact_match(answer, target, ExactMatch(**ignore)) == bool(expected)


def test_file_to_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "Der Patient", "id": 7}\n\n{"prompt": "Die Leber"}\n')
    generate_file(tiny, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=5)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Der Patient", "Die Leber"]
    assert rows[0]["id"] == 7
    assert all(row["stop_reason"] and row["num_tokens"] <= 5 for row in rows)


@pytest.mark.parametrize("line", ['{"promt": "x"}', '{"prompt": "x", "messages": []}', "{", '"x"'])
def test_bad_prompt_files(tmp_path: Path, line: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        generate_file(tmp_path / "no model", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
