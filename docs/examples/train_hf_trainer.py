"""steep's decoder in the `model` slot of the Trainer of transformers: its loop, optimizer and logs, our forward.

    python docs/examples/train_hf_trainer.py                                 # a tiny random model: seconds on a CPU
    python docs/examples/train_hf_trainer.py --model DIR --store STORE --out DIR

Other than in hf_trainer.py, which patches a model of transformers, none is there: the decoder reads and writes the
Hugging Face folder itself. The optimizer is the Trainer's, so train in float32; bf16 weights with an exact master are
what `Engine` has (train_plain_loop.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import make_model, pack, progressions
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from steep.data import IGNORE, PackedBatch, SequentialLoader
from steep.engine import Decoder, ModelConfig, export_model, load_weights


class PackedModel(nn.Module):
    """Packed batches in, a loss out."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_items_in_batch: Tensor | None = None,
        **unused: Any,  # by this the Trainer knows that the loss is divided by the targets of all micro batches
    ) -> dict[str, Tensor]:
        if num_items_in_batch is None:
            num_items_in_batch = (labels != IGNORE).sum()
        hidden = self.decoder(tokens, positions, cu_seqlens, max_seqlen)
        loss, _ = self.decoder.loss(hidden, labels, scale=1.0 / num_items_in_batch.float(), ignore_index=IGNORE)
        return {"loss": loss}


def collate(batches: list[PackedBatch]) -> dict[str, Any]:
    """Tensors for the Trainer to move. A batch is packed already: its loader makes one at a time."""
    (batch,) = batches
    fields = dataclasses.asdict(batch)
    tensors = {name: torch.from_numpy(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
    return {**tensors, "max_seqlen": batch.max_seqlen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", type=Path, help="a Hugging Face folder; default: a tiny random llama")
    parser.add_argument("--store", metavar="DIR", help="a token store for it (steep data tokenize)")
    parser.add_argument("--out", metavar="DIR", help="where the trained model is published; default: nowhere")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=5e-3)
    options = parser.parse_args()
    if bool(options.model) != bool(options.store):
        parser.error("--model and --store go together")

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or make_model(Path(scratch) / "base")
        if options.store:
            loader = SequentialLoader(options.store, seq_len=2048, seqs_per_batch=4)
            batches = [loader.batch_at(4 * k) for k in range(min(2 * options.steps, loader.num_batches))]
        else:
            batches = [pack(progressions(8, seed=k)) for k in range(2 * options.steps)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device("meta"):
            decoder = Decoder(ModelConfig.from_folder(folder))
        load_weights(decoder, folder, dtype=torch.float32, device=device)
        decoder.recompute = "selective"

        trainer = Trainer(
            model=PackedModel(decoder),
            train_dataset=batches,
            data_collator=collate,
            args=TrainingArguments(
                output_dir=f"{scratch}/trainer",
                per_device_train_batch_size=1,  # one packed batch
                gradient_accumulation_steps=2,
                max_steps=options.steps,
                learning_rate=options.lr,
                remove_unused_columns=False,
                use_cpu=device == "cpu",
                dataloader_pin_memory=device == "cuda",
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        )
        trainer.train()
        if options.out:
            export_model(decoder, folder, options.out)
            print(f"trained model: {options.out}")


if __name__ == "__main__":
    main()
