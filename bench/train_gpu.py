"""Training steps of released 7B-47B models on one GPU, beside transformers with Liger: tokens/s, MFU, memory, phases.

Weights are random, of the real shapes (models.py), made on the device; documents have random tokens and log-normal
lengths (median 400, mean 800 as web text has, longer ones cut at a sequence), packed by best fit. Gradients are clipped
unless the optimizer is `in_backward`, which cannot. Each loop runs in a process of its own:
    steep         Engine.forward_backward and step
    transformers  the same tokens, with Liger's kernels in the model instance where they are installed and there is a
                  GPU, FlashAttention 2 where installed, else sdpa; torch's fused AdamW in bf16, with no master weights
`--scale tiny` runs the same code on small shapes, on a CPU too. Writes nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from .models import MODELS
from .train import _pack, _packed_batch

if TYPE_CHECKING:
    import torch

    from ..engine.config import ModelConfig
    from ..engine.plan import Job

LOOPS = ("steep", "transformers")
SCALES = ("full", "tiny")
_TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_LR, _WARMUP = 1e-5, 3
_MEDIAN, _SIGMA = 400, 1.18  # exp(sigma^2 / 2) = 2: the mean is twice the median


@dataclass(frozen=True)
class Case:
    """One measurement. optimizer: keys of `AdamWConfig`."""

    model: str
    seq_len: int = 8192
    sequences: int = 1
    steps: int = 8
    recompute: str = "none"
    float8: str | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    scale: str = "full"


# The targets of one GPU: exact fp32 master at 2 extra bytes and bf16 moments; float8; the largest model that fits.
_LEAST_MEMORY = {"master": "none", "moments": "8bit", "in_backward": True, "max_grad_norm": None}
CHECKS = {
    "qwen2.5-7b, bf16": Case("qwen2.5-7b"),
    "qwen2.5-7b, float8": Case("qwen2.5-7b", float8="rowwise"),
    "mistral-small-24b, 8-bit moments, in backward": Case("mistral-small-24b", steps=4, optimizer=_LEAST_MEMORY),
}
# Sequences and recomputation, the fastest first; a check takes the first that the plan says fits.
_CHOICES = ((2, "none"), (1, "none"), (2, "selective"), (1, "selective"), (1, "full"))
_USABLE = 0.95  # of the memory, as an allocator wastes some


def run(
    case: Case, *, scale: str = "full", loops: Iterable[str] = LOOPS, timeout: float | None = None
) -> dict[str, Any]:
    """Measure the loops on one case.

    Raises:
        ValueError: no GPU is there for a real shape; an option that is not known; it does not fit (by the plan).
    """
    from ..engine.plan import check_fits, expected_time, memory, traffic, work

    case = dataclasses.replace(case, scale=scale)
    _check(case)
    config, job, gpu = _config(case), _job(case), _gpu()
    if gpu is not None:
        check_fits(config, job, gpu)
    figures: dict[str, Any] = {**dataclasses.asdict(case), "device": "cpu" if gpu is None else gpu.name}
    batches = _batches(case, config)
    lengths = [np.diff(batch.cu_seqlens)[batch.source_ids >= 0] for batch in batches]
    done = [work(config, job, each, case.seq_len) for each in lengths[_WARMUP:]]
    figures["documents"] = {
        "median": float(np.median(np.concatenate(lengths))),
        "mean": float(np.concatenate(lengths).mean()),
        "padding": 1 - float(np.concatenate(lengths).sum()) / (len(lengths) * job.tokens),
    }
    figures["planned"] = {"memory_bytes": memory(config, job, gpu).total}
    if gpu is not None:
        figures["planned"]["seconds"] = expected_time(config, job, gpu, done[0], traffic(config, job)).total
    for loop in loops:
        result = _in_own_process(loop, case, timeout)
        figures[loop] = result
        if gpu is not None and "seconds" in result:
            for name in ("document_true", "full"):
                flops = statistics.mean(getattr(each, name) for each in done)
                result[f"mfu_{name}"] = flops / result["seconds"] / gpu.bf16_flops
    ours, theirs = figures.get("steep", {}), figures.get("transformers", {})
    if "tokens_per_second" in ours and "tokens_per_second" in theirs:
        figures["tokens_per_second_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
    return figures


def check(*, scale: str = "full", minutes: float = 8.0, cases: dict[str, Case] | None = None) -> dict[str, Any]:
    """All that one GPU has to reach, in so many minutes: 60 % MFU for Qwen2.5-7B in bf16 with exact master weights,
    1.2 times that in float8, and that a step of Mistral-Small-24B with all its parameters fits and runs on one H200.

    Raises:
        ValueError: there is no GPU.
    """
    deadline = time.monotonic() + 60 * minutes
    results: dict[str, Any] = {}
    for name, case in (cases or CHECKS).items():
        case = dataclasses.replace(case, scale=scale)
        _check(case)
        left = deadline - time.monotonic()
        if left < 20:
            results[name] = {"error": f"not measured: {minutes:g} minutes are over"}
            continue
        try:
            loops = LOOPS if case.float8 is None and not case.optimizer else ("steep",)
            results[name] = run(_fitted(case), scale=scale, loops=loops, timeout=left)
        except ValueError as error:
            results[name] = {"error": str(error)}
    return {"checks": results, "reached": _reached(results)}


def optimizer_options(texts: Iterable[str]) -> dict[str, Any]:
    """key=value texts as keys of `AdamWConfig`. ValueError: not of that form."""
    pairs = [text.partition("=") for text in texts]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"--optimizer: {key + equals + value!r}; expected key=value, for example moments=8bit")
    options = {key: yaml.safe_load(value) for key, _, value in pairs}
    return {"max_grad_norm": None, **options} if options.get("in_backward") else options


def _reached(results: dict[str, Any]) -> dict[str, Any]:
    steep = {name: result.get("steep", {}) for name, result in results.items()}
    bf16, float8, large = (steep.get(name, {}) for name in CHECKS)
    reached: dict[str, Any] = {"mfu_full, at least 0.60": bf16.get("mfu_full")}
    reached["mfu_document_true"] = bf16.get("mfu_document_true")
    if "tokens_per_second" in bf16 and "tokens_per_second" in float8:
        ratio = float8["tokens_per_second"] / bf16["tokens_per_second"]
        reached["float8 against bf16, at least 1.2"] = ratio
    reached["mistral-small-24b runs"] = "tokens_per_second" in large
    return reached


def _fitted(case: Case) -> Case:
    """The case with the first of _CHOICES that fits; as it is where none does, or on a CPU."""
    from ..engine.plan import memory

    gpu = _gpu()
    for sequences, recompute in _CHOICES if gpu is not None else ():
        chosen = dataclasses.replace(case, sequences=sequences, recompute=recompute)
        assert gpu is not None
        if memory(_config(chosen), _job(chosen), gpu).total <= _USABLE * gpu.memory:
            return chosen
    return case


def _check(case: Case) -> None:
    import torch
    from pydantic import ValidationError

    from ..engine.optimizer import AdamWConfig

    for option, allowed in (
        ("scale", SCALES), ("recompute", ("none", "selective", "full")), ("float8", (None, "rowwise", "blockwise")),
        ("model", tuple(MODELS)),
    ):  # fmt: skip
        if getattr(case, option) not in allowed:
            raise ValueError(f"--{option}: {getattr(case, option)!r}; allowed: {', '.join(map(str, allowed))}")
    if min(case.seq_len, case.sequences, case.steps) < 1:
        raise ValueError("--seq-len, --sequences, --steps: allowed: 1 or more")
    try:
        AdamWConfig(**case.optimizer)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"--optimizer: {'; '.join(mistakes)}") from None
    if case.scale == "full" and not torch.cuda.is_available():
        raise ValueError(f"{case.model}: needs a GPU, and torch sees none; --scale tiny runs the same code without one")


def _config(case: Case) -> ModelConfig:
    from ..engine.config import ModelConfig

    return ModelConfig.from_dict(_values(case), source=case.model)


def _values(case: Case) -> dict[str, Any]:
    return MODELS[case.model] | (_TINY if case.scale == "tiny" else {})


def _job(case: Case) -> Job:
    import torch

    from ..engine.optimizer import AdamWConfig
    from ..engine.plan import Job

    return Job(
        tokens=case.seq_len * case.sequences,
        dtype=getattr(torch, case.dtype),
        recompute=case.recompute,  # type: ignore[arg-type]
        float8=case.float8,  # type: ignore[arg-type]
        optimizer=AdamWConfig(**case.optimizer),
        background_checkpoints=False,
    )


def _gpu() -> Any:
    """The GPU's figures; None on a CPU."""
    import torch

    from ..engine.gpus import gpu_of

    if not torch.cuda.is_available():
        return None
    found = gpu_of(torch.device("cuda", 0))
    if found is None:
        raise ValueError(f"{torch.cuda.get_device_name(0)}: its peak is not known, so no MFU can be given")
    return found


def _documents(vocab_size: int, seq_len: int) -> Iterator[np.ndarray]:
    """Documents without end, the long ones in parts no longer than a sequence."""
    generator = np.random.default_rng(0)
    while True:
        length = max(int(generator.lognormal(np.log(_MEDIAN), _SIGMA)), 2)
        ids = generator.integers(0, vocab_size, length)
        yield from (part for part in np.split(ids, range(seq_len, length, seq_len)) if len(part) > 1)


def _batches(case: Case, config: ModelConfig) -> list[Any]:
    """The packed batches of the warm-up and of the measured steps."""
    steps = _WARMUP + case.steps
    packed = _pack(_documents(config.vocab_size, case.seq_len), case.seq_len, steps * case.sequences)
    documents = np.split(packed["tokens"], np.cumsum(packed["length"])[:-1])
    ends = np.cumsum([0, *packed["docs_in_sequence"]])
    sequences = [documents[first:last] for first, last in zip(ends[:-1], ends[1:])]
    groups = [sequences[first : first + case.sequences] for first in range(0, len(sequences), case.sequences)]
    return [_packed_batch(group, case.seq_len) for group in groups]


# --- the loops, each in its own process ---


def _in_own_process(loop: str, case: Case, timeout: float | None) -> dict[str, Any]:
    """What the loop measured, or {"error": one line}: a peer that is not there or does not fit ends nothing."""
    command = [sys.executable, "-m", "steep.bench.train_gpu", loop, json.dumps(dataclasses.asdict(case))]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"{loop} did not end within {timeout:.0f} s"}
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"status {finished.returncode}"]
        return {"error": lines[-1][:300]}
    return json.loads(finished.stdout.splitlines()[-1])


class _Clock:
    """Times on the device's stream, or the host's where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.steps: list[dict[str, Any]] = []

    def start(self) -> None:
        self.steps.append({})
        self.stamp("start")

    def stamp(self, name: str) -> None:
        import torch

        if not self.cuda:
            self.steps[-1][name] = time.perf_counter()
            return
        event = self.steps[-1][name] = torch.cuda.Event(enable_timing=True)
        event.record()

    def medians(self) -> dict[str, float]:
        """Seconds of each phase, named by its end, over the steps after the warm-up."""
        phases: dict[str, list[float]] = {}
        for step in self.steps[_WARMUP:]:
            names = list(step)
            for begin, end in zip(names, names[1:]):
                seconds = step[begin].elapsed_time(step[end]) / 1e3 if self.cuda else step[end] - step[begin]
                phases.setdefault(end, []).append(seconds)
        return {name: statistics.median(each) for name, each in phases.items()}


TrainStep = Callable[[Any], Any]


def _measure(loop: str, case: Case) -> dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = _Clock(device)
    train_step, about = {"steep": _steep, "transformers": _transformers}[loop](case, device, clock)
    batches = _batches(case, _config(case))
    losses, began = [], 0.0
    for number, batch in enumerate(batches):
        if number == _WARMUP:
            _synchronize(device)
            began = time.perf_counter()
        clock.start()
        losses.append(train_step(batch))
        clock.stamp("optimizer")
    _synchronize(device)
    seconds = (time.perf_counter() - began) / case.steps
    tokens = statistics.mean(batch.num_valid for batch in batches[_WARMUP:])
    figures = {
        **about,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "phases_seconds": clock.medians(),
        "losses": [float(loss) for loss in losses],
    }
    if device.type == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        figures["reserved_memory_bytes"] = torch.cuda.max_memory_reserved(device)
    return figures


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steep(case: Case, device: torch.device, clock: _Clock) -> tuple[TrainStep, dict[str, Any]]:
    import torch

    from ..engine import AdamWConfig, Decoder, Engine
    from ..kernels import attention_backend

    config = _config(case)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to(getattr(torch, case.dtype)).to_empty(device=device)
    decoder.init_weights(0)
    engine = Engine(decoder, AdamWConfig(**case.optimizer), accumulate_in_fp32=False)
    decoder.recompute = case.recompute  # type: ignore[assignment]
    decoder.float8 = case.float8  # type: ignore[assignment]
    loss_of = decoder.loss

    def loss(*arguments: Any, **options: Any) -> Any:
        result = loss_of(*arguments, **options)
        clock.stamp("forward")
        return result

    decoder.loss = loss  # type: ignore[method-assign]

    def train_step(batch: Any) -> torch.Tensor:
        engine.begin_step(_LR)
        sums = engine.forward_backward(batch, batch.num_valid)
        clock.stamp("backward")
        engine.step(_LR)
        return sums.nll.sum() / batch.num_valid

    return train_step, {"attention": attention_backend(device.type)}


def _transformers(case: Case, device: torch.device, clock: _Clock) -> tuple[TrainStep, dict[str, Any]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for_model = AutoConfig.for_model(**_values(case))
    attention = "sdpa"
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        attention = "flash_attention_2"
    with device:
        dtype = getattr(torch, case.dtype)
        model = AutoModelForCausalLM.from_config(for_model, dtype=dtype, attn_implementation=attention).train()
    liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if case.recompute != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train_step(batch: Any) -> torch.Tensor:
        tokens, positions, labels = (
            torch.from_numpy(array).to(device, non_blocking=True).long()[None]
            for array in (batch.tokens, batch.positions, np.roll(batch.labels, 1))
        )
        loss = model(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False).loss
        clock.stamp("forward")
        loss.backward()
        clock.stamp("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step, {"attention": attention, "liger": liger or "not installed, or no GPU: transformers alone"}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], Case(**json.loads(sys.argv[2])))))
