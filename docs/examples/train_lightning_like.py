"""`Engine` behind the hooks of a framework that owns the loop: Lightning with manual optimisation, or one like it.

    python docs/examples/train_lightning_like.py                             # the loop below: seconds on a CPU
    python docs/examples/train_lightning_like.py --lightning                 # lightning's, if it is installed

The framework asks for a step, for what to log and for what to save; the engine needs no more of it. It is no nn.Module,
and its weights and optimizer state go through the hooks for checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tiny import make_model, pack, progressions

from steep.data import PackedBatch
from steep.engine import AdamWConfig, Engine

Batches = list[PackedBatch]  # the micro batches of one step


class EngineHooks:
    """What a LightningModule would have, in terms of an engine. `log` is the framework's."""

    automatic_optimization = False
    log: Callable[..., None]

    def use(self, engine: Engine, lr: float, warmup_steps: int) -> None:
        self.engine, self.lr, self.warmup_steps = engine, lr, warmup_steps
        self.steps = 0

    def training_step(self, batches: Batches, batch_idx: int) -> None:
        num_valid = sum(batch.num_valid for batch in batches)
        losses = [self.engine.forward_backward(batch, num_valid) for batch in batches]
        self.steps += 1
        grad_norm, skipped = self.engine.step(self.lr * min(1.0, self.steps / self.warmup_steps))
        loss = sum(each.nll.sum() for each in losses) / num_valid
        for name, value in (("loss", loss), ("grad_norm", grad_norm), ("skipped", skipped)):
            self.log(name, value)  # tensors on the device: when they are fetched is up to who logs

    def configure_optimizers(self) -> None:
        """The engine has its own."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {name: tensor.cpu().clone() for name, tensor in self.engine.state_dict().items()}
        checkpoint["engine"], checkpoint["engine_steps"] = state, self.steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.engine.load_state_dict(checkpoint["engine"])
        self.steps = checkpoint["engine_steps"]


class Loop:
    """The least of a framework: drives hooks over data, logs every few steps, saves and goes on from what it saved."""

    def __init__(self, checkpoint: Path, every: int) -> None:
        self.checkpoint, self.every = checkpoint, every
        self.logged: dict[str, torch.Tensor] = {}

    def fit(self, module: EngineHooks, data: Iterable[Batches], max_steps: int) -> None:
        module.log = self.logged.__setitem__
        first = 0
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            first = saved["step"]
            module.on_load_checkpoint(saved)
        for step, batches in enumerate(data):
            if not first <= step < max_steps:
                continue  # done before
            module.training_step(batches, step)
            if (step + 1) % self.every == 0:
                shown = "  ".join(f"{name} {float(value):.4f}" for name, value in self.logged.items())
                print(f"step {step + 1:>4}  {shown}")
                saved = {"step": step + 1}
                module.on_save_checkpoint(saved)
                torch.save(saved, self.checkpoint)


def fit_with_lightning(hooks: EngineHooks, data: list[Batches], folder: Path) -> None:
    from lightning import LightningModule, Trainer

    class Module(EngineHooks, LightningModule):
        automatic_optimization = False

        def log(self, name: str, value: torch.Tensor) -> None:
            LightningModule.log(self, name, value.float(), prog_bar=True)

        def transfer_batch_to_device(self, batch: Batches, device: torch.device, dataloader_idx: int) -> Batches:
            return batch  # the engine does it, from page-locked memory

    module = Module()
    module.use(hooks.engine, hooks.lr, hooks.warmup_steps)
    loader = torch.utils.data.DataLoader(data, batch_size=None, collate_fn=lambda batches: batches)
    trainer = Trainer(
        max_epochs=1,  # of manual optimisation it counts no steps
        accelerator="cpu" if hooks.engine.device.type == "cpu" else "gpu",
        devices=1,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    trainer.save_checkpoint(folder / "lightning.ckpt")
    shown = "  ".join(f"{name} {float(value):.4f}" for name, value in trainer.callback_metrics.items())
    print(f"step {module.steps:>4}  {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", metavar="DIR", type=Path, help="keeps model and checkpoint, to go on from")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lightning", action="store_true")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        folder = work / "base" if (work / "base").exists() else make_model(work / "base")
        hooks = EngineHooks()
        optimizer = AdamWConfig(weight_decay=0.1, max_grad_norm=1.0)
        hooks.use(Engine.load(folder, device=options.device, optimizer=optimizer), options.lr, warmup_steps=3)
        data = [[pack(progressions(8, seed=2 * step + k)) for k in range(2)] for step in range(options.steps)]
        if options.lightning:
            fit_with_lightning(hooks, data, work)
        else:
            Loop(work / "checkpoint.pt", every=10).fit(hooks, data, options.steps)


if __name__ == "__main__":
    main()
