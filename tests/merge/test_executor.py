"""The executor: what it writes, that chunks, workers and shards leave no trace, that it publishes all or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.data.files import read_manifest, sha256_file
from steep.engine.verify import verify
from steep.merge import merge, slerp, sweep, task_arithmetic, ties
from tests.merge.models import bits, random_tensors, read_model, sibling, write_model, write_yaml

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"models": {"a": {"weight": 0.7}, "b": {"weight": 0.4}}},
    "slerp": {"base_model": "base", "models": {"far": {}}, "parameters": {"t": [0.1, 0.9]}},
    "task_arithmetic": {"base_model": "base", "models": {"a": {"weight": 0.7}, "b": {"weight": 0.4}}},
    "ties": {
        "base_model": "base",
        "models": {"a": {"weight": 0.7, "density": 0.3}, "b": {"weight": 0.4, "density": 0.5}},
    },
}
FURTHER: dict[str, dict[str, Any]] = {  # methods that see whole rows, draw random bits, or look more than once
    "della": METHODS["ties"],
    "dare_ties": METHODS["ties"],
    "breadcrumbs": METHODS["ties"],
    "sce": {"base_model": "base", "models": {"a": {}, "b": {}}, "parameters": {"select_topk": 0.5}},
    "arcee_fusion": {"base_model": "base", "models": {"far": {}}},
    "karcher": {"models": {"a": {}, "b": {}, "far": {}}},
    "iso_c": {"base_model": "base", "models": {"a": {}, "b": {}}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 siblings: many magnitudes of their task vectors are equal."""
    folder = tmp_path_factory.mktemp("executor")
    base = random_tensors(0)
    models = {"base": base, "a": sibling(base, 1), "b": sibling(base, 2), "far": sibling(base, 3, 0.02)}
    for name, tensors in models.items():
        write_model(folder / name, tensors, dtype=torch.bfloat16, shards=3 if name == "a" else 1)
    (folder / "base" / "tokenizer_config.json").write_text('{"chat_template": "T"}')
    (folder / "base" / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "base" / "LICENSE").write_text("a licence")
    return folder


def config(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    written = (METHODS | FURTHER)[method] | {"merge_method": method} | changes
    written["models"] = [
        {"model": str(folder / name), "parameters": parameters} for name, parameters in written["models"].items()
    ]
    if "base_model" in written:
        written["base_model"] = str(folder / written["base_model"])
    return written


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_the_pure_functions_rounded_once_and_chunks_and_workers_leave_no_trace(
    folder: Path, tmp_path: Path, method: str
) -> None:
    written = config(folder, method)
    merge(written, tmp_path / "whole", workers=1)
    merge(written, tmp_path / "chunked", workers=3, chunk_elements=4096, max_shard_bytes=60_000)
    whole = read_model(tmp_path / "whole")
    assert len(list((tmp_path / "chunked").glob("model-*-of-*.safetensors"))) > 3
    assert same_bits(whole, read_model(tmp_path / "chunked"))

    inputs = {name: read_model(folder / name) for name in ("base", "a", "b", "far")}
    for name, merged in whole.items():
        base, a, b, far = (inputs[model][name].float() for model in ("base", "a", "b", "far"))
        depth = int(name.split(".")[2]) / 2 if ".layers." in name else 0.0
        expected = {
            "linear": lambda a=a, b=b: a * (0.7 / 1.1) + b * (0.4 / 1.1),
            "slerp": lambda base=base, far=far, t=0.1 + 0.8 * depth: slerp(base, far, t),
            "task_arithmetic": lambda base=base, a=a, b=b: task_arithmetic(base, [a - base, b - base], [0.7, 0.4]),
            "ties": lambda base=base, a=a, b=b: ties(base, [a - base, b - base], [0.7, 0.4], [0.3, 0.5]),
        }[method]()
        assert bits(merged) == bits(expected.bfloat16()), name


def test_transformers_opens_the_result(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    merge(config(folder, "task_arithmetic", dtype="float32"), tmp_path / "out", max_shard_bytes=100_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    expected = read_model(tmp_path / "out")
    assert same_bits(expected, {name: model.state_dict()[name] for name in expected})
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


@pytest.mark.parametrize(("t", "expected"), [(0, "base"), (1, "far")])
def test_slerp_ends_are_the_inputs(folder: Path, tmp_path: Path, t: int, expected: str) -> None:
    merge(config(folder, "slerp", parameters={"t": t}), tmp_path / "out")
    assert same_bits(read_model(tmp_path / "out"), read_model(folder / expected))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_lambda_zero_is_the_base(folder: Path, tmp_path: Path, method: str) -> None:
    merge(config(folder, method, parameters={"lambda": 0}), tmp_path / "out")
    assert same_bits(read_model(tmp_path / "out"), read_model(folder / "base"))


def test_one_model_of_weight_one_is_that_model(folder: Path, tmp_path: Path) -> None:
    merge(config(folder, "linear", models={"a": {"weight": 1}}), tmp_path / "linear")
    assert same_bits(read_model(tmp_path / "linear"), read_model(folder / "a"))
    merge(config(folder, "task_arithmetic", models={"a": {"weight": 1}}), tmp_path / "arithmetic")
    assert same_bits(read_model(tmp_path / "arithmetic"), read_model(folder / "a"))


def test_the_order_of_models_does_not_matter_to_task_arithmetic(folder: Path, tmp_path: Path) -> None:
    models = METHODS["task_arithmetic"]["models"]
    merge(config(folder, "task_arithmetic", dtype="float32"), tmp_path / "ab")
    reverse = dict(reversed(models.items()))
    merge(config(folder, "task_arithmetic", dtype="float32", models=reverse), tmp_path / "ba")
    for name, x in read_model(tmp_path / "ab").items():
        torch.testing.assert_close(x, read_model(tmp_path / "ba")[name], rtol=3e-7, atol=1e-9)


def test_manifest_and_what_is_carried(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    progress: list[tuple[int, int]] = []
    path = write_yaml(tmp_path / "merge.yml", config(folder, "slerp"))
    out = tmp_path / "out"
    manifest = merge(path, out, log=lines.append, progress=lambda done, total: progress.append((done, total)))
    assert manifest == json.loads((out / "merge.json").read_text())
    assert manifest["inputs"][str(path)]["sha256"] == sha256_file(path)
    shard = folder / "far" / "model.safetensors"
    assert manifest["inputs"][str(shard)]["sha256"] == sha256_file(shard)
    kept = read_manifest(out, "merged model")
    assert kept["files"]["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert kept["files"]["merge.json"]["sha256"] == sha256_file(out / "merge.json")
    assert kept["tensors"] == {name: entry["sha256"] for name, entry in manifest["tensors"].items()}
    assert manifest["config"] == config(folder, "slerp")
    assert manifest["donors"] == dict.fromkeys(("config", "tokenizer", "chat_template"), str(folder / "base"))
    assert f"tokenizer from {folder / 'base'}" in lines
    for name in ("tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (folder / "base" / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "base" / "config.json").read_text())

    merged, base, far = read_model(out), read_model(folder / "base"), read_model(folder / "far")
    assert progress[-1] == (2 * sum(x.numel() for x in merged.values()),) * 2
    assert manifest["tensors"].keys() == merged.keys()
    for name, entry in manifest["tensors"].items():
        assert entry["sha256"] == hashlib.sha256(bits(merged[name])).hexdigest()
        x, y = base[name].double().flatten(), far[name].double().flatten()
        assert entry["cosines"] == [pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-6)]
        assert entry["relative_deltas"] == pytest.approx([float((y - x).norm() / x.norm())], rel=1e-6)
    layers = manifest["figures"]["layers"]
    assert [entry["layer"] for entry in layers] == [None, 0, 1, 2]
    squares = sum(float(x.double().square().sum()) for name, x in base.items() if ".layers.1." in name)
    assert layers[2]["base_norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)
    straight = sum(entry["cosines"][0] > 0.9995 for entry in manifest["tensors"].values())
    assert straight
    assert any(f"slerp: {straight} of 30 tensors" in line for line in lines)


def test_figures_of_task_vectors(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    entry = merge(config(folder, "task_arithmetic"), tmp_path / "out")["tensors"][name]
    base, a, b = (read_model(folder / model)[name].double().flatten() for model in ("base", "a", "b"))
    assert entry["models"] == [2, 0, 1]  # the base goes first
    assert entry["base_norm"] == pytest.approx(float(base.norm()), rel=1e-6)
    expected = [float((x - base).norm() / base.norm()) for x in (a, b)]
    assert entry["relative_deltas"] == pytest.approx(expected, rel=1e-6)
    cosine = float((a - base) @ (b - base) / (a - base).norm() / (b - base).norm())
    assert entry["delta_cosines"] == [{"models": [0, 1], "cosine": pytest.approx(cosine, abs=1e-6)}]


def test_tied_and_half_tied_models(tmp_path: Path) -> None:
    tied, untied = random_tensors(1, tied=True), random_tensors(2)
    write_model(tmp_path / "tied", tied, tie_word_embeddings=True)
    write_model(tmp_path / "sibling", sibling(tied, 3), tie_word_embeddings=True)
    write_model(tmp_path / "untied", untied)
    merge(config(tmp_path, "linear", models={"tied": {"weight": 1}, "sibling": {"weight": 1}}), tmp_path / "both")
    assert "lm_head.weight" not in read_model(tmp_path / "both")
    merge(config(tmp_path, "linear", models={"tied": {"weight": 1}, "untied": {"weight": 1}}), tmp_path / "mixed")
    head = read_model(tmp_path / "mixed")["lm_head.weight"]
    torch.testing.assert_close(head, (tied["model.embed_tokens.weight"] + untied["lm_head.weight"]) / 2)
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["tie_word_embeddings"] is False


def test_integer_tensors_are_copied_if_equal(tmp_path: Path) -> None:
    base = random_tensors(0) | {"model.steps": torch.arange(5)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "same", sibling(random_tensors(0), 1) | {"model.steps": torch.arange(5)})
    write_model(tmp_path / "other", base | {"model.steps": torch.arange(5) + 1})
    models = {"base": {"weight": 1}, "same": {"weight": 1}}
    merge(config(tmp_path, "linear", models=models, dtype="bfloat16"), tmp_path / "out")
    assert torch.equal(read_model(tmp_path / "out")["model.steps"], torch.arange(5))
    with pytest.raises(ValueError, match="model.steps: integer tensor that differs"):
        merge(config(tmp_path, "linear", models={"base": {"weight": 1}, "other": {"weight": 1}}), tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_inputs_that_are_not_finite_are_named(folder: Path, tmp_path: Path, method: str, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = read_model(folder / "far")
    tensors[name][3, 5] = value
    write_model(tmp_path / "broken", tensors, dtype=torch.bfloat16)
    models = {str(tmp_path / "broken"): {} if method == "slerp" else {"weight": 1.0}}
    with pytest.raises(ValueError, match=f"broken/model.safetensors: {name} holds NaN or infinite values"):
        merge(config(folder, method, models=models), tmp_path / "out", chunk_elements=4096)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["broken"]


def test_a_result_that_the_dtype_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    huge = config(folder, "linear", models={"a": {"weight": 1e7}}, parameters={"normalize": False}, dtype="float16")
    with pytest.raises(ValueError, match="the result has values that torch.float16 cannot hold"):
        merge(huge, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_device_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: 'gpu'; allowed: cpu, cuda"):
        merge(config(folder, "linear"), tmp_path / "out", device="gpu")


def test_an_output_that_exists_is_not_touched(folder: Path, tmp_path: Path) -> None:
    before = sha256_file(folder / "a" / "config.json")
    for out in (folder / "a", folder / "a" / "config.json"):
        with pytest.raises(ValueError, match=r"is an input of the merge|lies in the input"):
            merge(config(folder, "linear"), out)
    assert sha256_file(folder / "a" / "config.json") == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="out: .*not empty"):
        merge(config(folder, "linear"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("method", FURTHER)
def test_pieces_leave_no_trace_in_tensors_and_figures(folder: Path, tmp_path: Path, method: str) -> None:
    written = config(folder, method)
    whole = merge(written, tmp_path / "whole", workers=1)
    pieces = merge(written, tmp_path / "pieces", workers=3, chunk_elements=4096)
    assert whole["tensors"] == pieces["tensors"]
    assert whole["figures"]["layers"] == pieces["figures"]["layers"]
    assert same_bits(read_model(tmp_path / "whole"), read_model(tmp_path / "pieces"))


def test_random_bits_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    seeds = {"first": 1, "again": 1, "other": 2}
    results = [merge(config(folder, "dare_ties", random_seed=seed), tmp_path / name) for name, seed in seeds.items()]
    hashes = [[entry["sha256"] for entry in result["tensors"].values()] for result in results]
    assert hashes[0] == hashes[1] != hashes[2]
    assert [(result["seed"], result["mode"]) for result in results] == [(1, "exact"), (1, "exact"), (2, "exact")]


@pytest.mark.parametrize(
    ("method", "key"), [("ties", "lambda"), ("slerp", "t"), ("linear", "models.1.parameters.weight")]
)
def test_a_sweep_is_the_merges_one_by_one(folder: Path, tmp_path: Path, method: str, key: str) -> None:
    written = config(folder, method)
    reads = []
    results = sweep(written, tmp_path / "out", key, [0.25, 1], progress=lambda done, total: reads.append((done, total)))
    name = key.split(".")[-1]
    for value, result in zip((0.25, 1), results, strict=True):
        changed = json.loads(json.dumps(written))
        if method == "linear":
            changed["models"][1]["parameters"]["weight"] = value
        else:
            changed["parameters"] = changed.get("parameters", {}) | {key: value}
        assert result["config"] == changed
        alone = merge(changed, tmp_path / f"alone-{value}")
        assert alone["tensors"] == result["tensors"]
        assert same_bits(read_model(tmp_path / f"alone-{value}"), read_model(tmp_path / "out" / f"{name}={value}"))
    total = 2 * sum(2 * x.numel() for x in read_model(tmp_path / "alone-1").values())
    assert reads[-1] == (total, total)


def test_a_sweep_over_what_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    written = config(folder, "linear")
    with pytest.raises(ValueError, match="models.7: expected a number below 2, found '7'"):
        sweep(written, tmp_path / "out", "models.7.parameters.weight", [1])
    with pytest.raises(ValueError, match="wieght=1: .*unknown parameter 'wieght'"):
        sweep(written, tmp_path / "out", "wieght", [1])
    with pytest.raises(ValueError, match="normalize: a value is given twice"):
        sweep(written, tmp_path / "out", "normalize", [True, True])
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_pass_if_allowed_and_are_recorded(folder: Path, tmp_path: Path) -> None:
    name, lines = "model.layers.1.mlp.down_proj.weight", []
    tensors = read_model(folder / "a")
    tensors[name][3, 5] = math.nan
    write_model(tmp_path / "broken", tensors, dtype=torch.bfloat16)
    models = {str(tmp_path / "broken"): {"weight": 1.0}, "b": {"weight": 1.0}}
    result = merge(config(folder, "linear", models=models), tmp_path / "out", allow_not_finite=True, log=lines.append)
    assert result["tensors"][name]["not_finite"] == [0]
    assert [key for key, entry in result["tensors"].items() if "not_finite" in entry] == [name]
    assert f"warning: {name}: NaN or infinite values of model 0 passed through" in lines
    merged = read_model(tmp_path / "out")[name]
    assert bool(merged[3, 5].isnan())
    assert int(merged.isnan().sum()) == 1


def test_squares_that_only_overflow_are_no_fault(tmp_path: Path) -> None:
    huge = {name: x * 1e25 for name, x in random_tensors(0).items()}
    write_model(tmp_path / "huge", huge)
    result = merge(config(tmp_path, "linear", models={"huge": {"weight": 1}}), tmp_path / "out")
    assert same_bits(read_model(tmp_path / "out"), read_model(tmp_path / "huge"))
    assert all(entry["norms"] == [None] for entry in result["tensors"].values())


def test_licences_of_the_inputs_and_of_theirs(folder: Path, tmp_path: Path) -> None:
    base = random_tensors(0)
    write_model(tmp_path / "one", base)
    (tmp_path / "one" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [de]\n---\n# One\n---\n")
    (tmp_path / "one" / "NOTICE").write_text("notice")
    write_model(tmp_path / "two", sibling(base, 1), license="mit")
    models = {"one": {"weight": 1}, "two": {"weight": 1}}
    first = merge(config(tmp_path, "linear", models=models), tmp_path / "out")
    assert first["licences"] == [
        {
            "model": str(tmp_path / "one"),
            "license": "apache-2.0",
            "files": {"NOTICE": hashlib.sha256(b"notice").hexdigest()},
        },
        {"model": str(tmp_path / "two"), "license": "mit", "files": {}},
    ]
    again = merge(config(tmp_path, "linear", models={"out": {"weight": 1}, "two": {"weight": 1}}), tmp_path / "again")
    assert again["licences"][0]["of_inputs"] == first["licences"]


def test_what_is_recorded_of_the_run(folder: Path, tmp_path: Path) -> None:
    result = merge(config(folder, "ties"), tmp_path / "out", workers=2)
    assert result["resolved"]["merge_method"] == "ties"
    assert result["execution"] == {"device": "cpu", "threads": 2, "chunk_elements": 1 << 18}
    assert result["figures"]["peak_memory_bytes"] > 1 << 20
    assert 0 < result["figures"]["seconds"] < 600
    assert result["taken_over"] == 0
    expected = {"weight": [0.7, 0.4], "density": [0.3, 0.5], "normalize": True, "lambda": 1.0}
    assert expected.items() <= result["tensors"]["model.norm.weight"]["parameters"].items()


def test_verify_finds_a_changed_byte_by_the_tensors_hash(folder: Path, tmp_path: Path) -> None:
    merge(config(folder, "linear"), tmp_path / "out")
    with pytest.raises(ValueError, match="1 problem: .*no tokenizer"):
        verify(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: \S+: SHA-256 is \w+, manifest.json says"):
        verify(tmp_path / "out")


def test_import_is_light() -> None:
    code = (
        "import sys, steep.merge; print([name for name in ('torch._dynamo', 'steep.kernels') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
