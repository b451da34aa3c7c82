"""`Engine` in a loop of one's own: schedule, accumulation, figures without waiting, checkpoints, resume, export.

    python docs/examples/train_plain_loop.py                                  # a tiny random model: seconds on a CPU
    python docs/examples/train_plain_loop.py --lora --work runs/mine          # adapters only; run it again to go on
    python docs/examples/train_plain_loop.py --model DIR --store STORE --device cuda --dtype bfloat16 --work runs/mine

The engine is a model, its optimizer and one step; whatever else there is in a training run is below.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tiny import make_model, pack, progressions

from steep.data import BatchLoader, PackedBatch, Source
from steep.engine import (
    AdamWConfig,
    CheckpointWriter,
    Engine,
    LoraConfig,
    ScheduleConfig,
    learning_rate,
    load_newest,
)


def micro_batches(step: int, loader: BatchLoader | None) -> list[PackedBatch]:
    """Two of a step, as a pure function of its number: so there is nothing to save of the data."""
    if loader is not None:
        return [loader.batch_at((2 * step + k) * 4) for k in range(2)]
    return [pack(progressions(8, seed=2 * step + k)) for k in range(2)]


def train(options: argparse.Namespace, work: Path) -> None:
    model = options.model or work / "base"
    if not model.exists():
        make_model(model)
    loader = None
    if options.store:
        loader = BatchLoader([Source("text", options.store)], seq_len=2048, seqs_per_batch=4, seed=0)
    engine = Engine.load(
        model,
        dtype=options.dtype,
        device=options.device,
        optimizer=AdamWConfig(weight_decay=0.1, max_grad_norm=1.0),
        lora=LoraConfig(rank=8, alpha=16) if options.lora else None,
    )
    engine.decoder.recompute = "selective"
    schedule = ScheduleConfig(kind="cosine", lr=options.lr, end_lr=options.lr / 10, warmup_steps=3)

    checkpoints = CheckpointWriter(work / "checkpoints", keep=2)
    restored = load_newest(checkpoints.folder, engine.state_dict())  # in place
    first = 0 if restored is None else restored.progress["step"]

    before: tuple[int, torch.Tensor] | None = None
    for step in range(first, options.steps):
        batches = micro_batches(step, loader)
        num_valid = sum(batch.num_valid for batch in batches)  # so that the gradient is that of the mean over all
        losses = [engine.forward_backward(batch, num_valid) for batch in batches]
        grad_norm, skipped = engine.step(learning_rate(schedule, step + 1, options.steps))

        # On the device still. What is printed is the step before, which is done: nobody waits.
        figures = torch.stack([sum(each.nll.sum() for each in losses) / num_valid, grad_norm, skipped])
        if before is not None:
            show(*before)
        before = step, figures
        if (step + 1) % 10 == 0:
            failure = checkpoints.save(step + 1, engine.state_dict(), {})  # copied at once, written in the background
            assert failure is None, failure
    if before is not None:
        show(*before)
    failure = checkpoints.wait()
    assert failure is None, failure
    if options.lora:
        engine.export_adapter(work / "adapter")  # for peft
    engine.export(work / "model")  # opens in transformers; adapters are merged into it
    print(f"trained model: {work / 'model'}")


def show(step: int, figures: torch.Tensor) -> None:
    loss, grad_norm, skipped = figures.tolist()
    print(f"step {step + 1:>4}  loss {loss:.4f}  gradient norm {grad_norm:.3f}{'  skipped' if skipped else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", type=Path, help="a Hugging Face folder; default: a tiny random llama")
    parser.add_argument("--store", metavar="DIR", help="a token store for it (steep data tokenize)")
    parser.add_argument("--work", metavar="DIR", type=Path, help="for checkpoints and results; default: thrown away")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if bool(options.model) != bool(options.store):
        parser.error("--model and --store go together")
    with tempfile.TemporaryDirectory() as scratch:
        train(options, options.work or Path(scratch))


if __name__ == "__main__":
    main()
