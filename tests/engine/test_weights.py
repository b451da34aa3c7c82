"""Loading and exporting: round trips against transformers and the safetensors library, refusals, faults."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steep.engine import weights
from steep.engine.config import ModelConfig
from steep.engine.model import Decoder
from steep.engine.safetensors_io import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from steep.engine.weights import export_model, hf_tensors, load_weights
from tests.engine.parity import CASES, assert_parity, documents, tiny_transformers


def saved(folder: Path, case: str = "qwen2_untied", dtype: torch.dtype = torch.float32, **options) -> Path:
    """A tiny model as transformers saves it, with a tokenizer file and a licence beside it."""
    tiny_transformers(case).to(dtype).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"model": "ä"}')
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "README.md").write_text("# a model card")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_folder(folder))
    load_weights(decoder, folder, dtype)
    return decoder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) delete tensors of a single-file folder. Dots in names are written as __."""
    all_tensors = tensors_of(folder)
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        if tensor is None:
            del all_tensors[name]
        else:
            all_tensors[name] = tensor
    save_file(all_tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("case", CASES)
def test_loaded_model_computes_what_transformers_computes(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)  # so that tensors are read in several pieces
    decoder = loaded(saved(tmp_path / "model", case))
    assert_parity(tiny_transformers(case), decoder, documents([11, 1, 20], decoder.config.vocab_size))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama_tied_mha", "mixtral", "qwen2_untied", "qwen3_bias_tied"])
def test_round_trip_is_byte_identical(
    case: str, dtype: torch.dtype, max_shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for weights held in fp32, which are rounded back to the bits they came from."""
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)
    source = saved(tmp_path / "model", case, dtype, max_shard_size=max_shard_size)
    export_model(loaded(source, torch.float32), source, tmp_path / "out")
    names = sorted(entry.name for entry in (tmp_path / "out").iterdir())
    expected = {entry.name for entry in source.iterdir()} - {"README.md", "training_args.bin"}
    assert names == sorted(expected | {"manifest.json"})
    assert (INDEX_FILE in names) == (max_shard_size == "20KB")
    for name in expected - {INDEX_FILE}:
        if name.endswith(".safetensors"):
            theirs, ours = load_file(source / name), load_file(tmp_path / "out" / name)
            assert list(ours) == list(theirs)
            for key, tensor in theirs.items():
                assert ours[key].dtype == tensor.dtype
                assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8))
        else:
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_transformers_opens_an_export_with_equal_tensors(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = saved(tmp_path / "model", "qwen2_tied", torch.bfloat16, max_shard_size="20KB")
    decoder = loaded(source)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.001)
    export_model(decoder, source, tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = theirs.state_dict()
    for name, placement in hf_tensors(decoder).items():
        flat = decoder.get_parameter(placement.parameter).view(-1)
        values = flat[placement.offset : placement.offset + placement.numel].view(placement.shape)
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name], values.bfloat16())


def test_dtype_of_an_export(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    config = json.loads((source / "config.json").read_text())
    assert config["dtype"] == "float32"

    with pytest.warns(UserWarning, match="tensors that .* has in float32 were trained in bfloat16 and are stored so"):
        export_model(loaded(source, torch.bfloat16), source, tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    assert torch.equal(tensors_of(tmp_path / "narrow")[name], tensors_of(source)[name].bfloat16())

    with warnings.catch_warnings():  # what was asked for needs no warning
        warnings.simplefilter("error")
        export_model(loaded(source), source, tmp_path / "half", dtype=torch.float16)
        export_model(loaded(source, torch.bfloat16), source, tmp_path / "wide", dtype=torch.float32)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert torch.equal(tensors_of(tmp_path / "half")[name], tensors_of(source)[name].half())
    assert torch.equal(tensors_of(tmp_path / "wide")[name], tensors_of(source)[name].bfloat16().float())


def test_rows_of_fused_weights(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "mistral_window")
    decoder, theirs = loaded(source), tensors_of(source)
    layer = "model.layers.1."
    qkv = torch.cat([theirs[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"])
    gate_up = torch.cat([theirs[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(decoder.layers[1].qkv.weight, qkv)
    assert torch.equal(decoder.layers[1].gate_up.weight, gate_up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_stacked_in_the_folder(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that transformers 5 has in memory: the same weights, and exported as they came."""
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)
    single = saved(tmp_path / "single", "mixtral", dtype)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_text((single / "config.json").read_text())
    save_file(tiny_transformers("mixtral").to(dtype).state_dict(), stacked / SINGLE_FILE, metadata={"format": "pt"})
    one, other = tensors_of(single), tensors_of(stacked)
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in one
    assert other["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 160, 48)
    expert = "model.layers.1.block_sparse_moe.experts.3"
    gate_up = torch.cat([one[f"{expert}.{matrix}.weight"] for matrix in ("w1", "w3")])
    assert torch.equal(other["model.layers.1.mlp.experts.gate_up_proj"][3], gate_up)

    decoder = loaded(stacked)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), loaded(single).parameters(), strict=True))
    export_model(decoder, stacked, tmp_path / "out")
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == (stacked / SINGLE_FILE).read_bytes()

    del other["model.layers.1.mlp.experts.down_proj"]
    save_file(other, stacked / SINGLE_FILE)
    with pytest.raises(ValueError, match="config.json: 1 missing: model.layers.1.mlp.experts.down_proj"):
        loaded(stacked)
    change(single, model__layers__1__block_sparse_moe__experts__3__w2__weight=None)
    with pytest.raises(ValueError, match="1 missing: model.layers.1.block_sparse_moe.experts.3.w2.weight"):
        loaded(single)


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    change(source, model__norm__weight=None, model__layers__7__extra=torch.zeros(1), lm_head__weight=None)
    message = "do not fit config.json: 2 missing: lm_head.weight, model.norm.weight; 1 unexpected: model.layers.7.extra"
    with pytest.raises(ValueError, match=message):
        loaded(source)
    change(source, model__norm__weight=torch.ones(48), model__layers__7__extra=None)
    with pytest.raises(ValueError, match="1 missing: lm_head.weight; config.json does not say tie_word_embeddings"):
        loaded(source)


def test_wrong_shape_and_dtype(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    change(source, model__norm__weight=torch.zeros(47))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[47\], .* should have \[48\]"):
        loaded(source)
    change(source, model__norm__weight=torch.zeros(48, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="model.norm.weight is float8_e4m3fn; allowed: float64, float32"):
        loaded(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_first_tensor_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    source = saved(tmp_path / "model", dtype=torch.bfloat16)
    bad = tensors_of(source)["model.layers.2.mlp.down_proj.weight"]
    bad[3, 5] = value
    change(source, model__layers__2__mlp__down_proj__weight=bad)
    with pytest.raises(ValueError, match="model.safetensors: model.layers.2.mlp.down_proj.weight holds NaN or Inf"):
        loaded(source)


def test_a_value_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    change(source, model__norm__weight=torch.full((48,), 1e5))
    with pytest.raises(ValueError, match=r"model.norm.weight holds NaN or Inf \(as float16\)"):
        loaded(source, torch.float16)
    with pytest.raises(ValueError, match=r"model.norm.weight holds NaN or Inf \(as float16\)"):
        export_model(loaded(source), source, tmp_path / "out", dtype=torch.float16)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_tied_head_that_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)
    source = saved(tmp_path / "model", "qwen2_tied")
    embedding = tensors_of(source)["model.embed_tokens.weight"]
    change(source, lm_head__weight=embedding.clone())
    decoder = loaded(source)
    with torch.no_grad():
        decoder.embed_tokens.weight.add_(1)
    export_model(decoder, source, tmp_path / "out")
    exported = tensors_of(tmp_path / "out")
    assert torch.equal(exported["lm_head.weight"], embedding + 1)
    assert torch.equal(exported["model.embed_tokens.weight"], embedding + 1)

    head = embedding.clone()
    head[-1, -1] += 1
    change(source, lm_head__weight=head)
    with pytest.raises(ValueError, match="says tie_word_embeddings: true, but lm_head.weight differs"):
        loaded(source)


def test_computed_buffers_are_carried_and_not_missed(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", "llama")
    change(source, model__layers__0__self_attn__rotary_emb__inv_freq=torch.arange(6.0))
    export_model(loaded(source), source, tmp_path / "out")
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == (source / SINGLE_FILE).read_bytes()


def test_export_refuses(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    decoder = loaded(source)
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        export_model(decoder, source, source)
    other = saved(tmp_path / "other", "qwen2_window")
    with pytest.raises(ValueError, match="other/config.json: .*sliding_window, layer_windows differ from the decoder"):
        export_model(decoder, other, tmp_path / "out")
    with torch.no_grad():
        decoder.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="model.norm.weight holds NaN or Inf"):
        export_model(decoder, source, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "other"]


def test_manifest_of_an_export(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    export_model(loaded(source), source, tmp_path / "out", provenance={"step": 7})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "model"
    assert manifest["provenance"] == {"step": 7}
    assert str(source / SINGLE_FILE) in manifest["inputs"]
    assert str(source / "training_args.bin") not in manifest["inputs"]
    written = {entry.name for entry in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == written
    export_model(loaded(tmp_path / "out"), tmp_path / "out", tmp_path / "again")
    inputs = json.loads((tmp_path / "again" / "manifest.json").read_text())["inputs"]
    assert list(inputs) == [str(tmp_path / "out" / "manifest.json")]


EXPORT = """
import resource, sys, time, torch
from steep.engine import weights
from steep.engine.config import ModelConfig
from steep.engine.model import Decoder
source, out, how = sys.argv[1:]
decoder = Decoder(ModelConfig.from_folder(source))
weights.load_weights(decoder, source, torch.float32)
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
else:
    weights.CHUNK_ELEMENTS = 500
    finite = weights.is_finite
    weights.is_finite = lambda values: (print("chunk", flush=True), time.sleep(0.01), finite(values))[-1]
weights.export_model(decoder, source, out)
"""


def test_full_disk_publishes_nothing(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    command = [sys.executable, "-c", EXPORT, source, tmp_path / "out", "full"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "OSError" in result.stderr
    assert SINGLE_FILE in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_killed_export_publishes_nothing_and_the_next_cleans_up(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    process = subprocess.Popen([sys.executable, "-c", EXPORT, source, tmp_path / "out", "slow"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == b"chunk\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert [entry.name.startswith(".out.tmp-") for entry in tmp_path.iterdir() if entry.name != "model"] == [True]
    export_model(loaded(source), source, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "out"]
    SafetensorsFolder(tmp_path / "out")
