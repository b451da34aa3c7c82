"""What a training run needs before it starts, checked against each other: device, data, length."""

from __future__ import annotations

import math

import torch

from ..data.batch import BatchLoader, SequentialLoader
from ..data.tokenizer import load_tokenizer
from .config import ModelConfig
from .recipe import TrainRecipe


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of this process. ValueError: a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch sees no GPU; allowed here: cpu, auto")
    if name == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device: process {local_rank} of this machine has no GPU; torch sees {torch.cuda.device_count()}; start "
            "as many processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def open_data(recipe: TrainRecipe, config: ModelConfig) -> tuple[BatchLoader, list[SequentialLoader]]:
    """Open and pack the stores, refusing those that were not made for this model."""
    data, sequences = recipe.data, recipe.batch.sequences
    if data.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"data.seq_len: {data.seq_len} is longer than the model's max_position_embeddings, "
            f"{config.max_position_embeddings}"
        )
    loader = BatchLoader.from_config(data, sequences)
    validation = [
        SequentialLoader(entry.store, data.seq_len, sequences, data.packing, entry.name) for entry in data.validation
    ]
    has_tokenizer = any((recipe.model / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    fingerprint = load_tokenizer(recipe.model).fingerprint if has_tokenizer else None
    for store in [*loader.stores, *(each.store for each in validation)]:
        store.check_model(config.vocab_size, fingerprint)
    return loader, validation


def count_steps(recipe: TrainRecipe, loader: BatchLoader) -> int:
    """Optimizer steps of the whole run."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.tokens is not None:
        sequences: float = recipe.tokens / recipe.data.seq_len
    else:
        assert recipe.epochs is not None
        sequences = recipe.epochs * sum(packing.num_seqs for packing in loader.packings)
    return max(1, math.ceil(sequences / (recipe.batch.sequences * recipe.batch.micro_batches)))
