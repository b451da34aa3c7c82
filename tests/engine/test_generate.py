"""Greedy generation: token for token what transformers generates; every reason to stop; scheduling of many prompts."""

import json

import pytest
import torch

from steep.engine.generate import generate, stop_ids_of
from tests.engine.parity import CASES, decoder_like, documents, tiny_transformers

PROMPTS = [doc.tolist() for doc in documents([5, 1, 17, 9, 3], 97)]


def hf_generate(hf, prompt: list[int], max_new_tokens: int, stop_ids: list[int] | None = None) -> list[int]:
    output = hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_token_for_token(case):
    hf = tiny_transformers(case)
    results = generate(decoder_like(hf), PROMPTS, max_new_tokens=24)
    for prompt, result in zip(PROMPTS, results):
        assert result.tokens == hf_generate(hf, prompt, 24)
        assert result.stop_reason == "length"


def test_stop_tokens_end_sequences_one_by_one():
    hf = tiny_transformers("llama")
    free = generate(decoder_like(hf), PROMPTS, max_new_tokens=24)
    stop_ids = [free[0].tokens[4], free[2].tokens[1]]
    results = generate(decoder_like(hf), PROMPTS, 24, stop_ids)
    assert {result.stop_reason for result in results} >= {"stop_token"}
    for prompt, result in zip(PROMPTS, results):
        assert result.tokens == hf_generate(hf, prompt, 24, stop_ids)
        assert (result.stop_reason == "stop_token") == (result.tokens[-1] in stop_ids)


def test_few_at_a_time_gives_the_same_as_all_at_once():
    decoder = decoder_like(tiny_transformers("mistral_window"))
    prompts = [doc.tolist() for doc in documents([4, 11, 2, 7, 1, 5, 19], 97, seed=5)]
    stop_ids = set(range(0, 97, 9))  # sequences end at different times
    at_once = generate(decoder, prompts, 20, stop_ids)
    assert len({len(result.tokens) for result in at_once}) > 2
    for max_sequences in (1, 2, 3):
        assert generate(decoder, prompts, 20, stop_ids, max_sequences=max_sequences) == at_once
    assert generate(decoder, [], 20) == []


def test_stop_strings_are_found_across_tokens():
    decoder = decoder_like(tiny_transformers("qwen3"))

    def decode(tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    free = generate(decoder, PROMPTS, 12)
    first, second = free[1].tokens[2:4]
    stop_strings = ["never", f"{first}><{second}"]
    results = generate(decoder, PROMPTS, 12, stop_strings=stop_strings, decode=decode)
    assert results[1].stop_reason == "stop_string"
    for result, whole in zip(results, free):
        assert result.tokens == whole.tokens[: len(result.tokens)]
        if result.stop_reason == "stop_string":
            assert stop_strings[1] in decode(result.tokens)
            assert stop_strings[1] not in decode(result.tokens[:-1])
        else:
            assert result == whole


def test_the_context_ends_generation():
    decoder = decoder_like(tiny_transformers("llama"))
    prompts = [[1] * 64, [1] * 63, [1] * 40]
    results = generate(decoder, prompts, 10)
    assert [(len(r.tokens), r.stop_reason) for r in results] == [(0, "context"), (1, "context"), (10, "length")]
    results = generate(decoder, [[1] * 5, [2] * 8], 10, context_length=8)
    assert [(len(r.tokens), r.stop_reason) for r in results] == [(3, "context"), (0, "context")]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has 0 tokens; allowed: 1 to 64"),
        ([[1] * 65], {}, "prompt 0 has 65 tokens"),
        ([[1]], {"context_length": 65}, "context_length is 65"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"stop_strings": ["a"]}, "need `decode`"),
        ([[1]], {"stop_strings": [""], "decode": str}, "empty string"),
    ],
)
def test_mistakes_are_refused(prompts, settings, message):
    decoder = decoder_like(tiny_transformers("llama"))
    with pytest.raises(ValueError, match=message):
        generate(decoder, prompts, **({"max_new_tokens": 4} | settings))


def test_stop_ids_of_a_folder(tmp_path):
    hf = tiny_transformers("llama", eos_token_id=7)
    (tmp_path / "config.json").write_text(hf.config.to_json_string())
    assert stop_ids_of(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1}))
    assert stop_ids_of(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stop_ids_of(tmp_path) == (7, 9)
