"""verify: what is whole passes, and every kind of damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steep.data import tokenize_files
from steep.data.files import read_manifest
from steep.engine.checkpoint import CheckpointWriter
from steep.engine.config import ModelConfig
from steep.engine.gguf_tokenizer import tokenizer_files
from steep.engine.model import Decoder
from steep.engine.safetensors_io import SINGLE_FILE
from steep.engine.verify import verify
from steep.engine.weights import export_model, load_weights
from tests.engine.parity import tiny_transformers
from tests.engine.test_gguf import SMOLLM, bpe_metadata, byte_level_vocabulary


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as somebody else published it: no manifest."""
    folder = tmp_path / "model"
    tiny_transformers("qwen2_tied", vocab_size=330).save_pretrained(folder)
    for name, content in tokenizer_files(bpe_metadata(byte_level_vocabulary(SMOLLM), "smollm"), "test").items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def exported(model: Path) -> Path:
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_folder(model))
    load_weights(decoder, model, torch.float32)
    export_model(decoder, model, model.parent / "exported")
    return model.parent / "exported"


def change_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(folder / SINGLE_FILE) | {name: tensor}, folder / SINGLE_FILE)


def test_a_model_folder(model: Path) -> None:
    report = verify(model)
    (artefact,) = report["artefacts"]
    assert artefact["kind"] == "model"
    assert artefact["tensors"] == len(load_file(model / SINGLE_FILE))
    assert artefact["tokenizer"] == f"{byte_level_vocabulary(SMOLLM).get_vocab_size()} ids"
    assert "names and shapes" in artefact["config"]
    json.dumps(report)


def test_damaged_model_folders(model: Path) -> None:
    change_tensor(model, "model.norm.weight", torch.full((48,), float("nan")))
    with pytest.raises(ValueError, match="1 problem: .*model.safetensors: model.norm.weight holds NaN or Inf"):
        verify(model)
    change_tensor(model, "model.norm.weight", torch.ones(47))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \[47\]"):
        verify(model)
    change_tensor(model, "model.norm.weight", torch.ones(48))
    verify(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="1 problem: .*no tokenizer"):
        verify(model)
    (model / SINGLE_FILE).write_bytes((model / SINGLE_FILE).read_bytes()[:-1])
    with pytest.raises(ValueError, match="1 problem: .*model.safetensors: truncated"):
        verify(model)


def test_a_tokenizer_larger_than_the_embedding(model: Path) -> None:
    metadata = bpe_metadata(byte_level_vocabulary(SMOLLM), "smollm")
    count = 331 - len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"<extra {i}>" for i in range(count)]
    metadata["tokenizer.ggml.token_type"] += [4] * count
    (model / "tokenizer.json").write_text(tokenizer_files(metadata, "test")["tokenizer.json"])
    with pytest.raises(ValueError, match="1 problem: .*the tokenizer has 331 ids, the model only 330"):
        verify(model)


def test_an_architecture_that_is_not_computed_is_checked_as_far_as_possible(model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"model_type": "gemma2"}
    (model / "config.json").write_text(json.dumps(config))
    assert "gemma2: not an architecture that steep computes" in verify(model)["artefacts"][0]["config"]
    change_tensor(model, "model.norm.weight", torch.full((48,), float("inf")))
    with pytest.raises(ValueError, match="model.norm.weight holds NaN or Inf"):
        verify(model)


def test_checksums_of_an_export(exported: Path) -> None:
    assert verify(exported)["artefacts"][0]["files"] == len(list(exported.iterdir())) - 1
    content = bytearray((exported / SINGLE_FILE).read_bytes())
    content[-3] ^= 1  # the lowest bits of a number: still a valid, finite model
    (exported / SINGLE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="1 problem: .*model.safetensors: SHA-256 is"):
        verify(exported)
    (exported / "generation_config.json").unlink()
    with (exported / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="3 problems: ") as error:
        verify(exported)
    assert "generation_config.json: not found, but manifest.json lists it" in str(error.value)
    assert "tokenizer_config.json: has" in str(error.value)


def test_a_token_store(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "Hello world"}\n{"text": "mg/kg"}\n')
    tokenize_files([tmp_path / "text.jsonl"], model, tmp_path / "store", workers=1)
    (artefact,) = verify(tmp_path / "store")["artefacts"]
    assert artefact["kind"] == "token_store"
    assert artefact["documents"] == 2
    shard = tmp_path / "store" / read_manifest(tmp_path / "store")["shards"][0]["file"]
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name}: SHA-256 is"):
        verify(tmp_path / "store")


def test_a_checkpoint_and_the_artefacts_below_a_folder(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    writer = CheckpointWriter(folder.parent, keep=1)
    writer.save(1, {"model.a": torch.ones(3), "optimizer.rest.a": torch.ones(3, dtype=torch.int16)}, {})
    assert writer.wait() is None
    size = (folder / SINGLE_FILE).stat().st_size
    exported.rename(tmp_path / "run" / "model")
    hidden = tmp_path / "run" / ".model.tmp-host-1-ab"
    hidden.mkdir()
    (hidden / SINGLE_FILE).write_bytes(b"half")
    report = verify(tmp_path / "run")
    assert [Path(artefact["path"]).name for artefact in report["artefacts"]] == ["step-00000001", "model"]
    assert [artefact["kind"] for artefact in report["artefacts"]] == ["checkpoint", "model"]

    save_file({"model.a": torch.full((3,), float("nan"))}, folder / SINGLE_FILE)
    with pytest.raises(ValueError, match="3 problems: ") as error:
        verify(tmp_path / "run")
    assert "model.a holds NaN or Inf" in str(error.value)
    assert "of model.a have CRC-32" in str(error.value)
    assert f"manifest.json says {size}" in str(error.value)


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: not found"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a model folder nor an artefact of steep"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: not valid JSON"):
        verify(tmp_path)
