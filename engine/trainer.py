"""Trainer: the training loop around an Engine, with everything that a run needs and a library must not have.

Data cursor, learning rate, validation, metrics, checkpoints and exact resume, exports, signals, progress display. It
writes below the recipe's `out` only:

    recipe.yaml                   the recipe, with every default filled in
    metrics.jsonl                 one line per `log.every` steps and per validation
    checkpoints/step-NNNNNNNN/    what a resume needs
    exports/step-NNNNNNNN/        the model in Hugging Face form, every `export.every` steps
    model/                        the trained model
    manifest.json                 written last: inputs, recipe, versions, figures
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.batch import BatchLoader, PackedBatch, SequentialLoader, prefetch
from ..data.files import MANIFEST, atomic_write, hash_inputs, make_manifest, read_manifest, sha256_json, write_manifest
from ..data.tokenizer import load_tokenizer
from ..kernels import attention_backend
from .checkpoint import CheckpointWriter, list_checkpoints, load_newest, read_progress, remove_unfinished
from .config import ModelConfig
from .engine import DTYPES, Engine, SourceLoss
from .metrics import LateFigures, MetricsFile, peak_flops, peak_memory_bytes, read_metrics, training_flops
from .recipe import TrainRecipe, changed_keys, load_recipe
from .schedule import learning_rate

_KIND = "training run"


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a gradient that was not finite."""


def train(recipe: TrainRecipe | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Carry out a training recipe, or continue it where it was left; return the manifest of the finished run.

    A run that is already finished is left as it is. SIGTERM and SIGINT let the step in hand finish, write a checkpoint
    and end the process with status 128 + signal; a second one ends it at once.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: a mistake in the recipe or its inputs, found before anything is
            written.
        TrainingDiverged: `max_consecutive_skips` steps in a row were skipped.
    """
    if not isinstance(recipe, TrainRecipe):
        recipe = load_recipe(recipe, overrides)
    return Trainer(recipe).run()


class Trainer:
    """One training run in one process. Making it checks recipe and inputs against each other; `run` trains."""

    def __init__(self, recipe: TrainRecipe) -> None:
        self.recipe = recipe
        self.console = Console(highlight=False)
        self.device = _device(recipe.device)
        self.config = ModelConfig.from_folder(recipe.model)
        self.loader, self.validation_loaders = _open_data(recipe, self.config)
        self.sources = self.loader.source_names
        self.sequences_per_step = recipe.batch.sequences * recipe.batch.accumulation
        self.total_steps = _total_steps(recipe, self.loader)
        self.loader.order.check(self.total_steps * self.sequences_per_step)
        learning_rate(recipe.schedule, 1, self.total_steps)  # refuses a schedule that does not fit
        if recipe.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("log.tensorboard: tensorboard is not installed; pip install 'steep[tensorboard]'")

        # Beside the engine's tensors this is all that a resume needs.
        self.step = 0  # optimizer steps done
        self.cursor = 0  # global number of the next packed sequence
        self.tokens = 0  # targets trained on
        self.skipped_steps = 0
        self.consecutive_skips = 0

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if there is one; the manifest of the finished run."""
        recipe, out = self.recipe, self.recipe.out
        model_files = hash_inputs([recipe.model])
        self.model_hash = sha256_json(sorted((Path(path).name, entry["sha256"]) for path, entry in model_files.items()))
        self.inputs = model_files | hash_inputs(store.path for store in self.loader.stores)
        checkpoint = self._check_out()
        if (out / MANIFEST).is_file():
            self.console.print(f"{out}: this run is finished")
            return read_manifest(out, _KIND)

        self.checkpoints = CheckpointWriter(out / "checkpoints", recipe.checkpoint.keep)
        self.engine = Engine.load(
            recipe.model,
            dtype=recipe.precision,
            device=self.device,
            optimizer=recipe.optimizer,
            accumulate_in_fp32=recipe.batch.accumulation > 1,
        )
        if checkpoint is not None:
            self._restore()
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        self.metrics = MetricsFile(out / "metrics.jsonl", self.step if checkpoint else -1, recipe.log.tensorboard)
        self._begin_interval()

        with (
            contextlib.closing(self.metrics),
            self._display() as show,
            _stop_requests() as stop,
        ):
            if checkpoint is None:
                self._validate()
            for batches in prefetch(self._remaining_steps()):
                started = time.perf_counter()
                lr = learning_rate(recipe.schedule, self.step + 1, self.total_steps)
                num_valid = sum(batch.num_valid for batch in batches)
                losses = [self.engine.forward_backward(batch, num_valid, len(self.sources)) for batch in batches]
                grad_norm, skipped = self.engine.step(lr)
                self.step += 1
                self.cursor += self.sequences_per_step
                self._queue_figures(batches, losses, grad_norm, skipped)

                last = self.step == self.total_steps
                validates = self._due(recipe.validation.every, last) and (last or not stop)
                checkpoints = self._due(recipe.checkpoint.every, last or bool(stop))
                exports, logs = self._due(recipe.export.every), self._due(recipe.log.every, checkpoints)
                # Read one step late, so that the device never waits for the host between steps.
                self._read_figures(pending=0 if validates or checkpoints or exports or logs else 1)
                self.interval_seconds += time.perf_counter() - started
                show(self._log(lr) if logs else None)
                if validates:
                    self._validate()
                if checkpoints:
                    self._checkpoint()
                if exports:
                    self._export(out / "exports" / f"step-{self.step:08d}")
                if stop:
                    break
        self._show_failure(self.checkpoints.wait())
        if self.step < self.total_steps:
            self.console.print(f"stopped after step {self.step}; the same command continues from there")
            raise SystemExit(128 + stop[0])
        return self._finish()

    # --- the loop's parts ---

    def _remaining_steps(self) -> Iterator[list[PackedBatch]]:
        """The micro batches of every step that is left: a pure function of the cursor."""
        size = self.recipe.batch.sequences
        for first in range(self.cursor, self.total_steps * self.sequences_per_step, self.sequences_per_step):
            yield [self.loader.batch_at(first + k * size) for k in range(self.recipe.batch.accumulation)]

    def _due(self, every: int | None, always: bool = False) -> bool:
        return always or (every is not None and self.step % every == 0)

    def _begin_interval(self) -> None:
        """Start the sums that one line of metrics reports."""
        self.late: deque[tuple[int, LateFigures]] = deque()
        self.interval_seconds, self.interval_tokens, self.interval_flops, self.interval_skips = 0.0, 0, 0.0, 0
        self.grad_norm = math.nan
        self.nll, self.counts = np.zeros((2, len(self.sources)))

    def _queue_figures(
        self, batches: list[PackedBatch], losses: list[SourceLoss], grad_norm: torch.Tensor, skipped: torch.Tensor
    ) -> None:
        """Add up what the host knows of a step, and queue what the device knows for reading, in one copy."""
        for batch in batches:
            self.interval_tokens += batch.num_valid
            self.interval_flops += training_flops(self.config, np.diff(batch.cu_seqlens)[batch.source_ids >= 0])
        nll = torch.stack([loss.nll for loss in losses]).sum(0, dtype=torch.float64)
        tokens = torch.stack([loss.tokens for loss in losses]).sum(0)
        self.late.append((self.step, LateFigures(torch.cat([grad_norm[None], skipped[None], nll, tokens]))))

    def _read_figures(self, pending: int) -> None:
        """Read queued figures until `pending` steps are left; stop the run if it skips step after step."""
        while len(self.late) > pending:
            step, figures = self.late.popleft()
            self.grad_norm, skipped, *sums = figures.get()
            if not skipped:
                self.consecutive_skips = 0
                nll, counts = np.split(np.array(sums), 2)
                self.nll += nll
                self.counts += counts
                continue
            self.interval_skips += 1
            self.skipped_steps += 1
            self.consecutive_skips += 1
            if self.consecutive_skips >= self.recipe.max_consecutive_skips:
                raise TrainingDiverged(
                    f"step {step}: the gradient was not finite in {self.consecutive_skips} steps in a row "
                    "(max_consecutive_skips). Those steps changed nothing, and the last checkpoint is kept; "
                    "a lower schedule.lr, a longer warm-up or other data may help."
                )

    def _log(self, lr: float) -> str:
        """Write one line of metrics over the steps since the last one; return what of it to display."""
        self.tokens += self.interval_tokens
        figures: dict[str, Any] = {
            "loss": self.nll.sum() / self.counts.sum() if self.counts.any() else math.nan,  # of steps not skipped
            "losses": {name: self.nll[i] / self.counts[i] for i, name in enumerate(self.sources) if self.counts[i]},
            "lr": lr,
            "grad_norm": self.grad_norm,
            "skipped": self.interval_skips,
            "tokens": self.tokens,
            "tokens_per_second": self.interval_tokens / self.interval_seconds,
            "memory_bytes": peak_memory_bytes(self.device),
        }
        summary = f"loss {figures['loss']:.4f}  lr {lr:.2e}  {figures['tokens_per_second']:,.0f} tokens/s"
        peak = peak_flops(self.device, DTYPES[self.recipe.precision])
        if peak is not None:
            figures["mfu"] = self.interval_flops / self.interval_seconds / peak
            summary += f"  MFU {figures['mfu']:.1%}"
        self.metrics.write("train", self.step, **figures)
        self._begin_interval()
        return summary

    def _validate(self) -> None:
        """Mean loss of every validation store over batches spread evenly over it."""
        losses, counts = {}, {}
        for loader in self.validation_loaders:
            wanted = self.recipe.validation.sequences or loader.num_seqs
            number = min(loader.num_batches, -(-wanted // loader.seqs_per_batch))
            chosen = (k * loader.num_batches // number for k in range(number))
            sums = [self.engine.eval_nll(loader.batch_at(k * loader.seqs_per_batch)) for k in chosen]
            count = int(torch.cat([each.tokens for each in sums]).sum())
            nll = float(torch.cat([each.nll for each in sums]).sum(dtype=torch.float64))
            losses[loader.name], counts[loader.name] = nll / count if count else math.nan, count
        if losses:
            self.metrics.write("validation", self.step, losses=losses, counts=counts)
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self.console.print(f"validation after step {self.step}: {shown}")

    def _checkpoint(self) -> None:
        healthy = self.consecutive_skips == 0
        self._show_failure(self.checkpoints.save(self.step, self.engine.state_dict(), self._progress(), healthy))

    def _show_failure(self, failure: Exception | None) -> None:
        if failure is not None:
            self.console.print(f"a checkpoint was not written, the one before stays: {failure}")

    def _export(self, path: Path) -> None:
        if path.exists():  # published by a process that was killed right after
            return
        dtype = self.recipe.export.dtype
        provenance = {"recipe": self.recipe.model_dump(mode="json"), "step": self.step, "inputs": self.inputs}
        self.engine.export(path, dtype=getattr(torch, dtype) if dtype else None, provenance=provenance)

    @contextlib.contextmanager
    def _display(self) -> Iterator[Callable[[str | None], None]]:
        """A progress bar on a terminal, else one printed line per line of metrics; call with that line, or None."""

        def print_line(summary: str | None) -> None:
            if summary is not None:
                self.console.print(f"step {self.step}/{self.total_steps}  {summary}")

        def move_bar(summary: str | None) -> None:
            progress.update(bar, completed=self.step)
            if summary is not None:
                progress.update(bar, summary=summary)

        if not self.console.is_terminal:
            yield print_line
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[summary]}"))
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("train", total=self.total_steps, completed=self.step, summary="")
            yield move_bar

    # --- resume and end ---

    def _check_out(self) -> Path | None:
        """The checkpoint to continue from. ValueError if `out` holds another run, FileExistsError if anything else."""
        recipe, out = self.recipe, self.recipe.out
        if not (out / "recipe.yaml").is_file():
            if out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
                raise FileExistsError(f"out: {out} is not empty and holds no training run; choose another folder")
            return None
        remove_unfinished(out / "checkpoints")
        checkpoints = list_checkpoints(out / "checkpoints")
        for damaged in sorted({*(out / "checkpoints").glob("step-*")} - {*checkpoints}):
            self.console.print(f"{damaged} is damaged and not used")
        if (out / MANIFEST).is_file():
            progress = read_manifest(out, _KIND)["config"]
        else:
            progress = read_progress(checkpoints[0]) if checkpoints else None

        old = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
        new = recipe.model_dump(mode="json")
        changed = changed_keys(old, new)
        if progress is None or progress["data"] != self.loader.fingerprint_at(progress["cursor"]):
            changed += changed_keys(old["data"], new["data"], "data.")
            if progress is not None and not changed:
                changed.append("data (the stores hold other tokens)")
        if progress is not None and progress["model"] != self.model_hash:
            changed.append(f"model ({recipe.model} holds other files)")
        if changed:
            raise ValueError(
                f"out: {out} holds a run that cannot go on with this recipe, as it would not have come to where it is "
                f"with: {'; '.join(changed)}. Undo the change or choose another out."
            )
        return checkpoints[0] if checkpoints else None

    def _progress(self) -> dict[str, Any]:
        return {
            "cursor": self.cursor,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "consecutive_skips": self.consecutive_skips,
            "model": self.model_hash,
            "data": self.loader.fingerprint_at(self.cursor),
        }

    def _restore(self) -> None:
        restored = load_newest(self.recipe.out / "checkpoints", self.engine.state_dict())
        assert restored is not None
        for problem in restored.damaged:
            self.console.print(f"not used: {problem}")
        progress = restored.progress
        self.step, self.cursor, self.tokens = progress["step"], progress["cursor"], progress["tokens"]
        self.skipped_steps, self.consecutive_skips = progress["skipped_steps"], progress["consecutive_skips"]
        self.console.print(f"continuing from {restored.path}")

    def _finish(self) -> dict[str, Any]:
        """Publish the model, then the manifest that says the run is complete."""
        out = self.recipe.out
        self._export(out / "model")
        records = read_metrics(out / "metrics.jsonl")
        figures: dict[str, Any] = {
            "steps": self.step,
            "tokens": self.tokens,
            "sequences": self.cursor,
            "epochs": dict(self.loader.order.epochs(self.cursor)),
            "skipped_steps": self.skipped_steps,
            "parameters": sum(parameter.numel() for parameter in self.engine.decoder.parameters()),
            "loss": [record["loss"] for record in records if record["event"] == "train"][-1],
        }
        validations = [record["losses"] for record in records if record["event"] == "validation"]
        if validations:
            figures["validation_before"], figures["validation_after"] = validations[0], validations[-1]
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        manifest = make_manifest(
            _KIND,
            inputs=self.inputs,
            config={**self._progress(), "recipe": self.recipe.model_dump(mode="json")},
            figures=figures,
            device=device,
            attention=attention_backend(self.device.type),
        )
        write_manifest(out, manifest)
        self.console.print(f"trained model: {out / 'model'}")
        return manifest


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch sees no GPU; allowed here: cpu, auto")
    return torch.device(name)


def _open_data(recipe: TrainRecipe, config: ModelConfig) -> tuple[BatchLoader, list[SequentialLoader]]:
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


def _total_steps(recipe: TrainRecipe, loader: BatchLoader) -> int:
    if recipe.steps is not None:
        return recipe.steps
    if recipe.tokens is not None:
        sequences: float = recipe.tokens / recipe.data.seq_len
    else:
        assert recipe.epochs is not None
        sequences = recipe.epochs * sum(packing.num_seqs for packing in loader.packings)
    return max(1, math.ceil(sequences / (recipe.batch.sequences * recipe.batch.accumulation)))


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put their number into; a second signal acts as it did before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
