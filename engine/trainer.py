"""Trainer: the training loop around an Engine, with everything that a run needs and a library must not have.

Data cursor, learning rate, validation, metrics, checkpoints and exact resume, exports, signals, progress display, alone
or on every rank of a torchrun. Rank 0 speaks and writes metrics; weights are written by all. Below the recipe's `out`:

    recipe.yaml                   the recipe, with every default filled in
    metrics.jsonl                 one line per `log.every` steps and per validation
    checkpoints/step-NNNNNNNN/    what a resume needs
    exports/step-NNNNNNNN/        the model in Hugging Face form, every `export.every` steps
    model/                        the trained model; adapters are merged into it
    adapter/                      with `lora`: the adapters alone, in PEFT's form, as are the exports of steps then
    manifest.json                 written last: inputs, recipe, versions, figures
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.distributed_c10d import _get_default_store

from ..data.batch import PackedBatch, prefetch
from ..data.files import MANIFEST, atomic_write, hash_inputs, make_manifest, read_manifest, sha256_json, write_manifest
from ..kernels import attention_backend
from .checkpoint import CheckpointWriter, list_checkpoints, load_newest, read_progress, remove_unfinished
from .config import ModelConfig
from .engine import DTYPES, Engine
from .metrics import LateFigures, MetricsFile, peak_flops, peak_memory_bytes, read_metrics, training_flops
from .parallel import check_world, make_mesh, start_process_group, world_from_environment
from .plan_report import refuse_what_cannot_fit
from .ranks import Ranks
from .recipe import TrainRecipe, changed_keys, load_recipe
from .run_setup import count_steps, open_data, pick_device
from .schedule import learning_rate
from .signals import exit_status, stop_requests
from .spikes import SpikeGuard
from .watchdog import PeerLost, Watchdog

_KIND = "training run"


_HOST_FIGURES = ("seconds of the step before", "seconds waited for data", "FLOPs", "signal")
_COLLECT_EVERY = 100  # steps between garbage collections, which every rank makes at the same time


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were skipped: gradients that were not finite, or spikes."""


def train(recipe: TrainRecipe | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Carry out a training recipe, or continue it where it was left; return the manifest of the finished run.

    A run that is already finished is left as it is. SIGTERM, SIGUSR1 and SIGINT let the step in hand finish, write a
    checkpoint and end the process, with status 0 (SIGTERM, SIGUSR1: to be queued again) or 130; a second one ends it at
    once. Under torchrun the processes agree on the step to stop after, whichever of them got the signal.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: a mistake in the recipe or its inputs, found before anything is
            written.
        TrainingDiverged: `max_consecutive_skips` steps in a row were skipped.
    """
    if not isinstance(recipe, TrainRecipe):
        recipe = load_recipe(recipe, overrides)
    trainer = Trainer(recipe)
    if trainer.world_size == 1 or dist.is_initialized():
        return trainer.run()
    start_process_group(trainer.device.type, recipe.parallel.timeout_seconds)
    try:
        return trainer.run()
    finally:
        dist.destroy_process_group()


class Trainer:
    """One training run. Making it checks recipe and inputs against each other; `run` trains. Under torchrun every
    process makes one, and `run` needs the process group."""

    def __init__(self, recipe: TrainRecipe) -> None:
        self.recipe = recipe
        self.rank, local_rank, self.world_size = world_from_environment()
        check_world(recipe.parallel, self.world_size, recipe.batch.micro_batches)
        self.console = Console(highlight=False, quiet=self.rank > 0)
        self.device = pick_device(recipe.device, local_rank)
        self.config = ModelConfig.from_folder(recipe.model)
        if recipe.lora is not None:
            if self.world_size > 1:
                raise ValueError(f"lora: works in one process only; there are {self.world_size}")
            recipe.lora.resolved().targets(self.config)
        self.loader, self.validation_loaders = open_data(recipe, self.config)
        self.sources = self.loader.source_names
        self.sequences_per_step = recipe.batch.sequences * recipe.batch.micro_batches
        self.total_steps = count_steps(recipe, self.loader)
        self.loader.order.check(self.total_steps * self.sequences_per_step)
        learning_rate(recipe.schedule, 1, self.total_steps)  # refuses a schedule that does not fit
        if recipe.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("log.tensorboard: tensorboard is not installed; pip install 'steep[tensorboard]'")
        refuse_what_cannot_fit(recipe, self.config, self.device, self.world_size)

        # Beside the engine's tensors this is all that a resume needs.
        self.step = 0  # optimizer steps done
        self.cursor = 0  # global number of the next packed sequence
        self.tokens = 0  # targets trained on
        self.skipped_steps = 0
        self.consecutive_skips = 0

        self.late: deque[tuple[int, LateFigures]] = deque()
        self.step_seconds = 0.0
        self.agreed_stop = 0

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if there is one; the manifest of the finished run.

        Raises:
            PeerLost: another rank is dead.
        """
        if self.world_size == 1:
            return self._run()
        timeout = self.recipe.parallel.timeout_seconds
        with Watchdog(_get_default_store(), self.rank, self.world_size, timeout) as self.watchdog:
            try:
                return self._run()
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError | TrainingDiverged):
                    raise
                dead = self.watchdog.find_dead()
                if dead is None:
                    raise
                raise PeerLost(dead) from error

    def _run(self) -> dict[str, Any]:
        recipe, out = self.recipe, self.recipe.out
        self.ranks = Ranks.world() if self.world_size > 1 else Ranks()
        models = [recipe.model]
        if recipe.lora is not None and recipe.lora.start is not None:
            models.append(recipe.lora.start)
        model_files = self.ranks.from_first(lambda: hash_inputs(models))
        self.model_hash = sha256_json(sorted((Path(path).name, entry["sha256"]) for path, entry in model_files.items()))
        self.inputs = model_files | hash_inputs(store.path for store in self.loader.stores)
        checkpoint = self.ranks.from_first(self._check_out)
        if self.ranks.from_first((out / MANIFEST).is_file):
            self.console.print(f"{out}: this run is finished")
            return read_manifest(out, _KIND)

        background = recipe.checkpoint.background
        self.checkpoints = CheckpointWriter(
            out / "checkpoints",
            recipe.checkpoint.keep,
            Ranks.world() if self.world_size > 1 else None,  # a group of its own, used from a thread
            background=self.device.type == "cuda" if background is None else background,
            parallel_write=recipe.export.parallel_write,
        )
        self.engine = Engine.load(
            recipe.model,
            dtype=recipe.precision,
            device=self.device,
            optimizer=recipe.optimizer,
            accumulate_in_fp32=recipe.batch.micro_batches > self.world_size,
            mesh=make_mesh(self.device.type, recipe.parallel.replicas) if self.world_size > 1 else None,
            parallel=recipe.parallel,
            lora=recipe.lora,
        )
        self.engine.decoder.recompute = recipe.recompute
        self.engine.decoder.float8 = recipe.float8
        if recipe.router_aux_loss_coef is not None:
            self.engine.router_aux_loss_coef = recipe.router_aux_loss_coef
        self.guard = SpikeGuard(recipe.spikes, self.device)
        if checkpoint is not None:
            self._restore()
        if self.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            atomic_write(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        self.metrics = MetricsFile(
            out / "metrics.jsonl" if self.rank == 0 else None,
            self.step if checkpoint else -1,
            recipe.log.tensorboard and self.rank == 0,
        )
        self._begin_interval()
        stop = 0
        with (
            contextlib.closing(self.metrics),
            self._display() as show,
            stop_requests() as signals,
            _collecting_by_hand(),
        ):
            if checkpoint is None:
                self._validate()
            started = time.perf_counter()
            for batches, num_valid in prefetch(self._remaining_steps()):
                waited = time.perf_counter() - started
                self._at(f"step {self.step + 1}")
                lr = learning_rate(recipe.schedule, self.step + 1, self.total_steps)
                figures = self._train_step(batches, num_valid, lr)
                self.step += 1
                self.cursor += self.sequences_per_step
                self._queue_figures(batches, figures, waited, signals)

                stop = self._stop_agreed(signals)
                last = self.step == self.total_steps
                validates = self._due(recipe.validation.every, last) and (last or not stop)
                checkpoints = self._due(recipe.checkpoint.every, last or bool(stop))
                exports, logs = self._due(recipe.export.every), self._due(recipe.log.every, checkpoints)
                # Read one step late, so that the device never waits for the host between steps.
                self._read_figures(pending=0 if validates or checkpoints or exports or logs else 1)
                self.step_seconds = time.perf_counter() - started
                self.interval_seconds += self.step_seconds
                show(self._log(lr) if logs else None)
                if validates:
                    self._validate()
                if checkpoints:
                    self._checkpoint()
                if exports:
                    self._export(out / "exports" / f"step-{self.step:08d}", merged=False)
                if self.step % _COLLECT_EVERY == 0:
                    gc.collect()
                if stop:
                    break
                started = time.perf_counter()
        unsaved = self._show_failure(self.checkpoints.wait())
        if self.step < self.total_steps:
            self.console.print(f"stopped after step {self.step}; the same command continues from the newest checkpoint")
            raise SystemExit(1 if unsaved else exit_status(stop))
        return self._finish()

    # --- the loop's parts ---

    def _at(self, what: str) -> None:
        """Tell the other ranks where this one is."""
        if self.world_size > 1:
            self.watchdog.at(what)

    def _remaining_steps(self) -> Iterator[tuple[list[PackedBatch], int]]:
        """This rank's micro batches of every step that is left, and the targets of the whole step: pure functions of
        the cursor. Rank r takes the micro batches r, r + world size, ... of a step."""
        size, count = self.recipe.batch.sequences, self.recipe.batch.micro_batches
        for first in range(self.cursor, self.total_steps * self.sequences_per_step, self.sequences_per_step):
            own = range(self.rank, count, self.world_size)
            batches = [self.loader.batch_at(first + k * size) for k in own]
            yield batches, self.loader.num_valid(first, self.sequences_per_step)

    def _train_step(self, batches: list[PackedBatch], num_valid: int, lr: float) -> torch.Tensor:
        """One optimizer step; what came of it, fp64 on the device: [loss, gradient norm, skipped, then by source the
        summed nll and the targets, then by layer and expert the tokens, of all ranks]."""
        engine = self.engine
        engine.begin_step(lr)
        losses = []
        for batch in batches:
            # A step of which every sample is skipped has no targets, and a gradient of zero.
            last = batch is batches[-1]
            losses.append(engine.forward_backward(batch, max(num_valid, 1), len(self.sources), last=last))
        nll = torch.stack([loss.nll for loss in losses]).sum(0, dtype=torch.float64)
        tokens = torch.stack([loss.tokens for loss in losses]).sum(0)
        loads = [loss.expert_load.flatten() for loss in losses if loss.expert_load is not None]
        sums = torch.cat([nll, tokens, *([torch.stack(loads).sum(0)] if loads else [])])
        if self.world_size > 1:
            dist.all_reduce(sums)
        loss = sums[: len(self.sources)].sum() / max(num_valid, 1)
        grad_norm, skipped = engine.step(lr, veto=lambda grad_norm: self.guard.judge(loss, grad_norm))
        self.guard.update(loss, grad_norm, skipped)
        return torch.cat([torch.stack([loss, grad_norm.double(), skipped.double()]), sums])

    def _due(self, every: int | None, always: bool = False) -> bool:
        return always or (every is not None and self.step % every == 0)

    def _begin_interval(self) -> None:
        """Start the sums that one line of metrics reports."""
        self.interval_seconds, self.interval_tokens, self.interval_flops, self.interval_skips = 0.0, 0.0, 0.0, 0
        self.grad_norm = math.nan
        self.nll, self.counts = np.zeros((2, len(self.sources)))
        self.rank_seconds, self.rank_waits = np.zeros((2, self.world_size))
        experts = self.config.num_local_experts
        self.expert_load = np.zeros((self.config.num_hidden_layers, experts) if experts else (0, 0))

    def _queue_figures(
        self, batches: list[PackedBatch], figures: torch.Tensor, waited: float, signals: list[int]
    ) -> None:
        """Queue a step's figures for reading, in one copy: of the device, and what only one rank's host knows, which
        is each rank's own entry in a sum over the ranks."""
        own = np.zeros((len(_HOST_FIGURES), self.world_size))
        documents = [np.diff(each.cu_seqlens)[each.source_ids >= 0] for each in batches]
        flops = sum(training_flops(self.config, each, frozen=self.recipe.lora is not None) for each in documents)
        own[:, self.rank] = [self.step_seconds, waited, flops, max(signals, default=0)]
        host = torch.from_numpy(own.ravel())
        if self.device.type == "cuda":
            host = host.pin_memory().to(self.device, non_blocking=True)
        if self.world_size > 1:
            dist.all_reduce(host)
        self.late.append((self.step, LateFigures(torch.cat([figures, host]))))

    def _read_figures(self, pending: int) -> None:
        """Read queued figures until `pending` steps are left; stop the run if it skips step after step."""
        while len(self.late) > pending:
            step, late = self.late.popleft()
            sizes = (3, 2 * len(self.sources), self.expert_load.size)
            (loss, self.grad_norm, skipped), sums, load, host = np.split(np.array(late.get()), np.cumsum(sizes))
            nll, counts = sums.reshape(2, -1)
            seconds, waits, flops, signals = host.reshape(-1, self.world_size)
            self.expert_load += load.reshape(self.expert_load.shape)
            self.rank_seconds += seconds
            self.rank_waits += waits
            self.interval_flops += flops.sum()
            self.interval_tokens += counts.sum()
            self.agreed_stop = int(signals.max())
            if not skipped:
                self.consecutive_skips = 0
                self.nll += nll
                self.counts += counts
                continue
            self.interval_skips += 1
            self.skipped_steps += 1
            self.consecutive_skips += 1
            first = (step - 1) * self.sequences_per_step
            samples = [first, first + self.sequences_per_step - 1]
            reason = "spike" if math.isfinite(self.grad_norm) else "not finite"
            self.metrics.write("skip", step, reason=reason, loss=loss, grad_norm=self.grad_norm, samples=samples)
            if self.consecutive_skips >= self.recipe.max_consecutive_skips:
                raise TrainingDiverged(
                    f"step {step}: {self.consecutive_skips} steps in a row were skipped (max_consecutive_skips), the "
                    f"last with a gradient norm of {self.grad_norm:g} and a loss of {loss:g}. Those steps changed "
                    "nothing, and the last checkpoint is kept; a lower schedule.lr, a longer warm-up or other data may "
                    "help. Their samples are in metrics.jsonl, and data.skip_samples leaves samples out."
                )

    def _stop_agreed(self, signals: list[int]) -> int:
        """The signal to stop for after this step, 0 for none. Several ranks must stop after the same step, so they go
        by what they have all read, one step late."""
        return max(signals, default=0) if self.world_size == 1 else self.agreed_stop

    def _log(self, lr: float) -> str:
        """Write one line of metrics over the steps since the last one; return what of it to display."""
        self.tokens += int(self.interval_tokens)
        figures: dict[str, Any] = {
            "loss": self.nll.sum() / self.counts.sum() if self.counts.any() else math.nan,  # of steps not skipped
            "losses": {name: self.nll[i] / self.counts[i] for i, name in enumerate(self.sources) if self.counts[i]},
            "lr": lr,
            "grad_norm": self.grad_norm,
            "skipped": self.interval_skips,
            "tokens": self.tokens,
            "tokens_per_second": self.interval_tokens / self.interval_seconds,
            "data_wait": self.rank_waits.max() / self.interval_seconds,
            "memory_bytes": peak_memory_bytes(self.device),
        }
        if self.expert_load.any():  # by layer, the share of the tokens that each expert read
            shares = self.expert_load / self.expert_load.sum(1, keepdims=True)
            figures["expert_load"] = shares.round(4).tolist()
        if self.world_size > 1:
            figures["rank_seconds"] = self.rank_seconds.tolist()
        summary = f"loss {figures['loss']:.4f}  lr {lr:.2e}  {figures['tokens_per_second']:,.0f} tokens/s"
        peak = peak_flops(self.device, DTYPES[self.recipe.precision])
        if peak is not None:
            figures["mfu"] = self.interval_flops / self.interval_seconds / peak / self.world_size
            summary += f"  MFU {figures['mfu']:.1%}"
        self.metrics.write("train", self.step, **figures)
        self._begin_interval()
        return summary

    def _validate(self) -> None:
        """Mean loss of every validation store over batches spread evenly over it."""
        self._at(f"validation after step {self.step}")
        losses, counts = {}, {}
        for loader in self.validation_loaders:
            wanted = self.recipe.validation.sequences or loader.num_seqs
            number = min(loader.num_batches, -(-wanted // loader.seqs_per_batch))
            chosen = [k * loader.num_batches // number for k in range(number)]
            # Every rank runs as many batches as any other: batches beyond the last are padding.
            chosen += [loader.num_batches] * (-number % self.world_size)
            own = chosen[self.rank :: self.world_size]
            sums = [self.engine.eval_nll(loader.batch_at(k * loader.seqs_per_batch)) for k in own]
            total = torch.stack([torch.cat([each.nll, each.tokens]).double() for each in sums]).sum(0)
            if self.world_size > 1:
                dist.all_reduce(total)
            nll, count = total.tolist()
            losses[loader.name], counts[loader.name] = nll / count if count else math.nan, int(count)
        if losses:
            self.metrics.write("validation", self.step, losses=losses, counts=counts)
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self.console.print(f"validation after step {self.step}: {shown}")

    def _checkpoint(self) -> None:
        self._at(f"checkpoint of step {self.step}")
        healthy = self.consecutive_skips == 0
        self._show_failure(self.checkpoints.save(self.step, self._state(), self._progress(), healthy))

    def _show_failure(self, failure: Exception | None) -> bool:
        """Whether a checkpoint could not be written; training goes on."""
        if failure is not None:
            self.console.print(f"a checkpoint was not written, the one before stays: {failure}")
            self.metrics.write("checkpoint failed", self.step, error=str(failure))
        return failure is not None

    def _export(self, path: Path, merged: bool) -> None:
        """Publish the model. merged: with adapters in it, of a run that trains adapters; else they are published."""
        self._at(f"export to {path.name}")
        if self.ranks.from_first(path.exists):  # published by a process that was killed right after
            return
        dtype = self.recipe.export.dtype
        provenance = {"recipe": self.recipe.model_dump(mode="json"), "step": self.step, "inputs": self.inputs}
        if self.recipe.lora is not None and not merged:
            return self.engine.export_adapter(path, provenance)
        self.engine.export(
            path,
            getattr(torch, dtype) if dtype else None,
            provenance,
            parallel_write=self.recipe.export.parallel_write,
        )

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

    def _state(self) -> dict[str, torch.Tensor]:
        """Every tensor that a resume needs."""
        return self.engine.state_dict() | {f"spikes.{name}": each for name, each in self.guard.state_dict().items()}

    def _restore(self) -> None:
        restored = load_newest(self.recipe.out / "checkpoints", self._state())
        assert restored is not None
        for problem in restored.damaged:
            self.console.print(f"not used: {problem}")
        progress = restored.progress
        self.step, self.cursor, self.tokens = progress["step"], progress["cursor"], progress["tokens"]
        self.skipped_steps, self.consecutive_skips = progress["skipped_steps"], progress["consecutive_skips"]
        self.console.print(f"continuing from {restored.path}")

    def _finish(self) -> dict[str, Any]:
        """Publish the model, then the manifest that says the run is complete."""
        if self.recipe.lora is not None:
            self._export(self.recipe.out / "adapter", merged=False)
        self._export(self.recipe.out / "model", merged=True)
        manifest = self.ranks.from_first(self._write_manifest)
        self.console.print(f"trained model: {self.recipe.out / 'model'}")
        return manifest

    def _write_manifest(self) -> dict[str, Any]:
        out = self.recipe.out
        records = read_metrics(out / "metrics.jsonl")
        figures: dict[str, Any] = {
            "steps": self.step,
            "tokens": self.tokens,
            "sequences": self.cursor,
            "epochs": dict(self.loader.order.epochs(self.cursor)),
            "skipped_steps": self.skipped_steps,
            "parameters": sum(parameter.numel() for parameter in self.engine.decoder.parameters()),
            "trained_parameters": sum(each.numel() for each in self.engine.optimizer.parameters.values()),
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
            world_size=self.world_size,
            attention=attention_backend(self.device.type),
        )
        write_manifest(out, manifest)
        return manifest


@contextlib.contextmanager
def _collecting_by_hand() -> Iterator[None]:
    """Without this Python would collect garbage on one rank now and on another then, and all would wait each time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
