"""`steep demo` from end to end, with a tiny random model in the place of the real one, and the figures it reports."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from steep.cli import demo
from steep.cli.demo import Settings, default_settings, merge_config, run_demo
from steep.cli.demo_corpus import Sizes
from steep.cli.demo_figures import curves, question_figures, text_figures
from steep.engine.recipe import load_recipe
from steep.eval.report import read_figures
from steep.merge import parse_config

SETTINGS = Settings(
    precision="float32",
    device="cpu",
    sizes=Sizes(train_terms=40, largest_train_terms=40, seen_from_terms=40, items=4, held_out_characters=600),
    seq_len=128,
    merges=(("slerp", 0.5), ("task_arithmetic", 1.25)),
    max_new_tokens=4,
)


def save_tiny_model(_file: Path, folder: Path) -> None:
    """What `import_gguf` leaves: a model folder with a manifest. Byte-level tokenizer, SmolLM2's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from steep.engine.weights import write_model_manifest

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_model_manifest(folder, "imported model", inputs={})


@pytest.fixture
def tiny_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steep.engine.gguf.import_gguf", save_tiny_model)


@pytest.mark.usefixtures("tiny_import")
def test_the_whole_road_and_back_to_where_it_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr("steep.merge.merge", lambda *_args, **_kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_demo(out, SETTINGS)
    assert "[6/11] evaluate trained: " in capsys.readouterr().out

    page = run_demo(out, SETTINGS).read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert len(re.findall(r"\[\d/11\] .*: done before", printed)) == 6
    assert "[11/11] answers: " in printed

    figures = read_figures(out)
    assert [model.name for model in figures.models] == ["base", "trained", "slerp-0.5", "task_arithmetic-1.25"]
    base, trained = figures.models[0].domain.perplexity.value, figures.models[1].domain.perplexity.value
    assert trained < base, "not even the byte frequencies were learnt"
    assert f"{base:,.2f}" in page
    assert f"{trained:,.2f}" in page
    steps = [duration.step for duration in figures.durations]
    assert steps[:5] == ["import", "corpora", "token stores", "evaluate base", "train"]
    evaluated = json.loads((out / "eval" / "slerp-0.5.json").read_text())
    assert figures.provenance["Weights, SHA-256"]["slerp-0.5"] == evaluated["model"]["weights"]["sha256"]

    run_demo(out, SETTINGS)
    assert len(re.findall(r"\[\d+/11\] .*: done before", capsys.readouterr().out)) == 11
    assert (out / "report.html").read_text(encoding="utf-8") == page

    run_demo(out, replace(SETTINGS, max_new_tokens=5))
    assert len(re.findall(r"\[\d+/11\] .*: done before", capsys.readouterr().out)) == 10


def test_the_recipe_goes_through_each_source_once(tmp_path: Path) -> None:
    for name in ("domain", "general"):
        store(tmp_path / "stores" / f"{name}.train", documents=40 if name == "domain" else 9)
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(demo.recipe(SETTINGS, tmp_path)))
    recipe = load_recipe(path)
    from steep.data import BatchLoader

    loader = BatchLoader.from_config(recipe.data, recipe.batch.sequences)
    total = sum(packing.num_seqs for packing in loader.packings)
    assert total > 9
    assert list(loader.order.epochs(total).values()) == pytest.approx([1.0, 1.0])


def store(folder: Path, documents: int) -> None:
    from steep.data import tokenize_files

    model = folder.parent / "model"
    if not model.exists():
        save_tiny_model(Path(), model)
    text = folder.parent / f"{folder.name}.jsonl"
    text.write_text("".join(json.dumps({"id": str(n), "text": "x" * (20 + 3 * n)}) + "\n" for n in range(documents)))
    tokenize_files([text], model, folder, workers=1)


@pytest.mark.parametrize(("method", "strength"), SETTINGS.merges)
def test_merge_files_are_mergekit_files(method: str, strength: float) -> None:
    config = parse_config(merge_config(method, strength))
    assert config.merge_method == method


def test_default_settings_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, precision in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        settings = default_settings()
        assert (settings.precision, settings.device) == (precision, "cpu")
        assert settings.sizes.seen_from_terms <= settings.sizes.train_terms <= settings.sizes.largest_train_terms
        assert 2 * settings.sizes.items >= 150


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ImportError, match=r"needs gguf: pip install 'steep\[demo\]'"):
        run_demo(tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


# --- figures ---


def perplexity_task(logprobs: list[float]) -> dict[str, Any]:
    estimate = {"value": 3.0, "low": 2.0, "high": 4.0, "stderr": 0.5}
    return {
        "metrics": {"token_perplexity": estimate, "bits_per_byte": estimate},
        "items": [{"id": str(n), "logprob": logprob, "bytes": 10} for n, logprob in enumerate(logprobs)],
    }


def test_change_of_a_text_is_the_difference_of_corpus_bits_per_byte() -> None:
    base, other = perplexity_task([-20.0, -30.0, -25.0]), perplexity_task([-18.0, -25.0, -26.0])
    change = text_figures(other, base)["change"]
    assert change["value"] == pytest.approx((69 - 75) / 30 / math.log(2))
    assert change["low"] < change["value"] < change["high"]
    assert "change" not in text_figures(base, None)
    with pytest.raises(AssertionError, match="other rows"):
        text_figures({**other, "items": other["items"][:2]}, base)


def question_task(right: list[bool]) -> dict[str, Any]:
    return {
        "metrics": {"acc_norm": {"value": sum(right) / len(right), "low": 0.0, "high": 1.0, "stderr": 0.1}},
        "items": [{"id": str(n), "gold": 1, "pred_norm": int(hit)} for n, hit in enumerate(right)],
    }


def test_change_of_questions_is_paired() -> None:
    base = question_task([True, True, False, False, False, False, False, False])
    other = question_task([True, False, True, True, True, True, False, False])
    figures = question_figures(other, base)
    assert (figures["gained"], figures["lost"]) == (4, 1)
    assert figures["change"]["value"] == pytest.approx(3 / 8)
    assert figures["change"]["p_value"] == pytest.approx(2 * (1 + 5) / 2**5)


def test_curves_average_neighbours_and_keep_sources_apart(tmp_path: Path) -> None:
    lines = [{"event": "validation", "step": 0, "losses": {"a": 5.0}}]
    lines += [{"event": "train", "step": n, "losses": {"a": float(n), "b": 1.0} if n % 2 else {"a": float(n)}}
              for n in range(1, 11)]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    a, b, validation = curves(path, points=5)
    assert (a["name"], a["steps"], a["losses"]) == ("a", [2, 4, 6, 8, 10], [1.5, 3.5, 5.5, 7.5, 9.5])
    assert (b["name"], len(b["losses"])) == ("b", 3)
    assert (validation["kind"], validation["steps"], validation["losses"]) == ("validation", [0], [5.0])
