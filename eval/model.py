"""A model folder opened for evaluation, and the identity of weights in a result. Touches engine's loader, read only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..data.files import sha256_file, sha256_json
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..engine.config import ModelConfig
from ..engine.generate import stop_ids_of
from ..engine.model import Decoder
from ..engine.weights import load_weights


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Decoder, Tokenizer, tuple[int, ...]]:
    """Decoder in eval mode, tokenizer, and the ids at which the model ends a text."""
    tokenizer = load_tokenizer(folder)
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_folder(folder))
    load_weights(decoder, folder, dtype, device)
    return decoder.eval(), tokenizer, stop_ids_of(folder)


def fingerprint_of_folder(folder: Path) -> dict[str, str]:
    """SHA-256 over the configuration and every safetensors file of a folder."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {"of": "files", "sha256": sha256_json({path.name: sha256_file(path) for path in files})}


def fingerprint_of_decoder(decoder: Decoder) -> dict[str, str]:
    """SHA-256 over names, dtypes, shapes and bytes of the parameters; not comparable with that of a folder."""
    digest = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"of": "tensors", "sha256": digest.hexdigest()}
