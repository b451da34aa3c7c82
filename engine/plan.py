"""What a training step will take, before anything is loaded: memory by kind, FLOPs, bytes moved, time.

Pure arithmetic on a `ModelConfig`, a `Job` and a `Gpu`; touches no device and no files. Memory is followed through the
moments of a step at which it can be highest, and the highest counts: what is allocated, as torch counts it, without
what an allocator wastes. `steep bench plan` compares it with a CPU's real steps. Time is the sum of floors over
efficiencies that are stated below; it has not been measured on a GPU yet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..kernels.linear_cross_entropy import chunk_plan
from .config import ModelConfig
from .gpus import Gpu
from .memory import (
    gradient_bytes_per_token,
    layer_bytes_per_token,
    recomputed_bytes_per_token,
    saved_bytes_per_token,
)
from .metrics import full_attention_flops, product_weights, training_flops
from .model import Decoder, Float8, Recompute
from .optimizer import BUCKET_BYTES, AdamWConfig
from .parallel import REDUCE_DTYPES, ParallelConfig
from .recipe import TrainRecipe

_CONTEXT_BYTES = 1.0e9  # a CUDA context with cuBLAS, NCCL and Triton's kernels: outside of what torch allocates
_CPU_CHUNK = 512  # rows of logits that a CPU holds at once
_CPU_PIECE = 1 << 19  # elements that its AdamW takes at a time, with so many bytes of fp32 copies and random words each
_CPU_PIECE_BYTES = 54


@dataclass(frozen=True)
class Job:
    """What of a recipe, and of how it is started, decides memory and time.

    tokens: positions of one micro batch. micro_batches: of one rank in one step. gpus: ranks, gpus_per_node of them in
    a machine. background_checkpoints: with a copy of the state in host memory; None: on a GPU.
    """

    tokens: int
    micro_batches: int = 1
    dtype: torch.dtype = torch.bfloat16
    recompute: Recompute = "none"
    float8: Float8 | None = None
    optimizer: AdamWConfig = AdamWConfig()
    parallel: ParallelConfig = ParallelConfig()
    gpus: int = 1
    gpus_per_node: int = 8
    background_checkpoints: bool | None = None

    @classmethod
    def of(cls, recipe: TrainRecipe, gpus: int = 1, gpus_per_node: int = 8) -> Job:
        """Of a recipe on so many ranks, which must divide its micro batches (`parallel.check_world`)."""
        return cls(
            tokens=recipe.batch.sequences * recipe.data.seq_len,
            micro_batches=max(recipe.batch.micro_batches // gpus, 1),
            dtype=getattr(torch, recipe.precision),
            recompute=recipe.recompute,
            float8=recipe.float8,
            optimizer=recipe.optimizer,
            parallel=recipe.parallel,
            gpus=gpus,
            gpus_per_node=min(gpus, gpus_per_node),
            background_checkpoints=recipe.checkpoint.background,
        )

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return max(self.gpus // self.parallel.replicas, 1)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of bf16 weights are summed in fp32."""
        return self.micro_batches > 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by kind, at the moment `at` of a step at which they are most. host: bytes of host memory."""

    at: str
    kinds: dict[str, float]
    host: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Parameters:
    """Shapes of a decoder's parameters, by the unit that FSDP gathers at a time: "layers.N", "lm_head" or "" (root)."""

    units: dict[str, dict[str, tuple[int, ...]]]

    @classmethod
    def of(cls, config: ModelConfig) -> Parameters:
        with torch.device("meta"):
            decoder = Decoder(config)
        units: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, parameter in decoder.named_parameters():
            unit = "lm_head" if name.startswith("lm_head.") else ""
            if name.startswith("layers."):
                unit = ".".join(name.split(".")[:2])
            units.setdefault(unit, {})[name] = tuple(parameter.shape)
        return cls(units)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for unit in self.units.values() for shape in unit.values()]

    @property
    def total(self) -> int:
        return sum(map(math.prod, self.shapes))

    def size(self, unit: str, shards: int = 1) -> int:
        """Elements of a unit on the rank that holds most."""
        return sum(_shard(shape, shards) for shape in self.units.get(unit, {}).values())

    @property
    def layer(self) -> int:
        return self.size("layers.0")


def _shard(shape: tuple[int, ...], shards: int) -> int:
    return -(-shape[0] // shards) * math.prod(shape[1:])


def memory(config: ModelConfig, job: Job, gpu: Gpu | None = None) -> Memory:
    """Memory of one step on `gpu`; None: on a CPU, whose kernels are the torch references and which holds all of it."""
    parameters = Parameters.of(config)
    shards, size = job.shards, job.dtype.itemsize
    own = sum(_shard(shape, shards) for shape in parameters.shapes)
    state = sum(_shard(shape, shards) * job.optimizer.state_bytes(job.dtype, shape) for shape in parameters.shapes)
    offloaded = job.optimizer.offload and gpu is not None
    always = {"weights": own * size, "optimizer state": 0.0 if offloaded else state}
    if gpu is not None:
        always["CUDA context"] = _CONTEXT_BYTES

    moments = _Moments(config, job, gpu, parameters)
    at, most = max(moments.all(), key=lambda entry: sum(entry[1].values()))
    host: dict[str, float] = {}
    if gpu is not None and offloaded:
        host["optimizer state"] = state
    if job.background_checkpoints or (job.background_checkpoints is None and gpu is not None):
        host["copy for checkpoints"] = own * size + state
    return Memory(at, {**always, **most}, host)


class _Moments:
    """What comes and goes in a step, at the moments at which it may be most."""

    def __init__(self, config: ModelConfig, job: Job, gpu: Gpu | None, parameters: Parameters) -> None:
        self.config, self.job, self.gpu, self.parameters = config, job, gpu, parameters
        self.sharded = job.gpus > 1
        self.fp32_sums = job.accumulates or job.dtype == torch.float32
        self.grad_size = 4 if self.fp32_sums else job.dtype.itemsize
        self.head = parameters.size("lm_head") or config.vocab_size * config.hidden_size
        self.reduces_once = self.sharded and job.accumulates and job.parallel.reduce_every == "step"
        # the kernel of the loss adds to the gradient itself: `AdamW.main_grad`
        self.main_grad = not self.sharded and self.fp32_sums and not job.optimizer.in_backward

    def all(self) -> Iterable[tuple[str, dict[str, float]]]:
        layers = self.config.num_hidden_layers
        yield "the loss", self._at(layers, head_done=False, working=self._loss(), moment="loss")
        for done in sorted({0, 1, layers // 2, layers - 1}):
            kept = layers - done
            yield f"backward of layer {kept}", self._at(kept, head_done=True, working=self._layer(), moment="layer")
        yield "backward of the embedding", self._at(0, head_done=True, working=self._embedding(), moment="embedding")
        yield "the optimizer", self._at(0, head_done=True, working=self._optimizer(), moment="optimizer")

    def _at(self, kept_layers: int, *, head_done: bool, working: float, moment: str) -> dict[str, float]:
        """kept_layers: whose activations backward still needs."""
        config, job, tokens = self.config, self.job, self.job.tokens
        options = (config, job.recompute, job.dtype)
        float8 = job.float8 is not None
        layer = layer_bytes_per_token(*options, float8=float8)
        ends = saved_bytes_per_token(*options, float8=float8) - config.num_hidden_layers * layer
        activations = 0.0 if moment == "optimizer" else tokens * (kept_layers * layer + ends)
        if moment == "layer":
            activations += tokens * recomputed_bytes_per_token(*options, float8=float8)
        gathered, communication = self._communication(moment)
        return {
            "gathered weights": gathered,
            "gradients": self._gradients(config.num_hidden_layers - kept_layers, head_done, moment),
            "activations": activations,
            "loss" if moment == "loss" else "working memory": working,
            "communication": communication,
        }

    def _gradients(self, layers_done: int, head_done: bool, moment: str) -> float:
        """Gradients that stay until the optimizer has used them."""
        job, parameters = self.job, self.parameters
        if job.optimizer.in_backward:
            return 0.0
        complete = moment == "optimizer"
        if self.reduces_once and not complete:  # every rank holds all, and in the last micro batch its shard instead
            return parameters.total * REDUCE_DTYPES[job.parallel.reduce_dtype].itemsize
        if job.accumulates:
            layers_done, head_done, complete = self.config.num_hidden_layers, True, True
        elements = layers_done * parameters.size("layers.0", job.shards)
        if head_done or self.main_grad:  # the loss writes the head's before backward begins
            elements += parameters.size("lm_head", job.shards) or (parameters.size("", job.shards))
        if complete and parameters.size("lm_head"):
            elements += parameters.size("", job.shards)
        return elements * self.grad_size

    def _loss(self) -> float:
        """Chunks of logits, and the gradient of the head where it is not added to what is there."""
        config, tokens, size = self.config, self.job.tokens, self.job.dtype.itemsize
        if self.gpu is None:
            buffers: float = min(tokens, _CPU_CHUNK) * config.vocab_size * size
            if size == 2:  # a bf16 product is made aside, from a copy of the transposed chunk
                buffers += self.head * size + (buffers if self.main_grad else 0)
        else:
            buffers = chunk_plan(tokens, -(-config.vocab_size // 64) * 64 * size, int(self.gpu.memory))[1]
        if self.main_grad:
            return buffers
        return 4 * self.head + max(buffers, self.head * size)  # in backward it is rounded to the weights' dtype

    def _layer(self) -> float:
        """Gradients of activations, and a weight's gradient before it is added to the sum or has been reduced."""
        job, size = self.job, self.job.dtype.itemsize
        largest = max(map(math.prod, self.parameters.units["layers.0"].values()))
        if self.sharded:
            weight = 0.0  # `_communication`
        elif job.accumulates:
            weight = largest * (size + (4 if size == 2 else 0))
        else:
            weight = largest * size
        return job.tokens * gradient_bytes_per_token(self.config, job.dtype) + weight

    def _embedding(self) -> float:
        size = self.job.dtype.itemsize
        table = self.config.vocab_size * self.config.hidden_size
        converted = 4 if size == 2 and self.fp32_sums and not self.sharded else 0
        return self.job.tokens * size * self.config.hidden_size + table * (size + converted)

    def _optimizer(self) -> float:
        if self.gpu is None:
            piece = min(max(map(math.prod, self.parameters.shapes)), _CPU_PIECE)
            return piece * (_CPU_PIECE_BYTES if self.job.dtype == torch.bfloat16 else 4)
        return 2 * BUCKET_BYTES if self.job.optimizer.offload else 0.0

    def _communication(self, moment: str) -> tuple[float, float]:
        """(gathered weights, buffers of collectives): FSDP gathers a layer ahead, in a buffer from which it copies,
        and keeps what it reduces of one layer until the next one is there."""
        if not self.sharded:
            return 0.0, 0.0
        job, parameters, size = self.job, self.parameters, self.job.dtype.itemsize
        layer = parameters.layer
        ends = parameters.size("") + parameters.size("lm_head")
        if moment == "optimizer":
            return 0.0, 0.0
        # reduced once, weights stay from each backward but the last to the end of the next forward
        stays = not job.parallel.reshard_after_forward or (self.reduces_once and moment == "embedding")
        gathered = ends + (self.config.num_hidden_layers if stays else 2) * layer
        buffer = 0 if stays and moment != "loss" else layer
        reduced = 0.0
        reduce_size = REDUCE_DTYPES[job.parallel.reduce_dtype].itemsize
        if moment == "layer":
            unreduced = layer * size + layer * reduce_size
            reduced = unreduced + layer * reduce_size + 2 * parameters.size("layers.0", job.shards) * reduce_size
        if moment == "embedding":
            reduced = (parameters.size("") + layer) * reduce_size
        return gathered * size, buffer * size + reduced


# --- FLOPs, bytes and time -------------------------------------------------------------------------------------------

# Shares of the peaks that good kernels reach: large products (an H100 holds some 700 TFLOP/s), float8 with its casts,
# attention forward and backward, streams over memory, collectives over NVLink and between machines.
_PRODUCTS, _FLOAT8_PRODUCTS, _ATTENTION, _STREAMS, _COLLECTIVES = 0.70, 0.55, 0.50, 0.80, 0.75


@dataclass(frozen=True)
class Work:
    """FLOPs of one step, over all ranks. document_true: attention within documents, no padding (`training_flops`).
    full: as if every sequence were one document without a causal mask (`full_attention_flops`). Of what is computed
    really: attention, products, and what is computed a second time."""

    document_true: float
    full: float
    attention: float
    products: float
    again: float


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives or copies in one step. all_gather, reduce_scatter: within a copy of the model;
    all_reduce: between copies; host_to_device: batches and offloaded state."""

    all_gather: float
    reduce_scatter: float
    all_reduce: float
    host_to_device: float
    device_to_host: float

    @property
    def network(self) -> float:
        return self.all_gather + self.reduce_scatter + self.all_reduce


@dataclass(frozen=True)
class Time:
    """Seconds of one step on one rank, by what takes them. communication: what is not hidden behind computation."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def work(config: ModelConfig, job: Job, lengths: np.ndarray, seq_len: int) -> Work:
    """lengths: of the documents of one step, over all ranks, in sequences of seq_len."""
    tokens = job.tokens * job.micro_batches * job.gpus
    document_true = training_flops(config, lengths)
    attention = document_true - 6.0 * product_weights(config) * float(lengths.sum())
    width = config.intermediate_size * (config.num_experts_per_tok or 1)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    again = 0.0
    if job.recompute == "selective":
        again = 2.0 * tokens * layers * hidden * 2 * width
    if job.recompute == "full":  # a layer's last product excepted
        again = 2.0 * tokens * (product_weights(config) - hidden * config.vocab_size - layers * hidden * width)
        again += attention / 3
    full = full_attention_flops(config, tokens, seq_len)
    return Work(document_true, full, attention, 6.0 * product_weights(config) * tokens, again)


def traffic(config: ModelConfig, job: Job) -> Traffic:
    """What one rank moves in one step."""
    parameters, size = Parameters.of(config), job.dtype.itemsize
    layers = config.num_hidden_layers * parameters.layer
    ends = parameters.total - layers
    others = (job.shards - 1) / job.shards
    copies = job.parallel.replicas if job.gpus > 1 else 1
    once = job.parallel.reduce_every == "step"
    reductions = 1 if once else job.micro_batches
    gathers_of_layers = job.micro_batches * (2 if job.parallel.reshard_after_forward else 1)
    gathers = job.micro_batches
    if once:  # weights stay gathered from backward to the next forward
        gathers_of_layers = job.micro_batches + 1 if job.parallel.reshard_after_forward else 1
        gathers = 1
    reduce_size = REDUCE_DTYPES[job.parallel.reduce_dtype].itemsize
    state = 0.0
    if job.optimizer.offload:
        state = sum(math.prod(s) * job.optimizer.state_bytes(job.dtype, s) for s in parameters.shapes)
    batches = 24.0 * job.tokens * job.micro_batches  # tokens and labels of 8 bytes, positions and sources of 4
    return Traffic(
        all_gather=others * size * (gathers_of_layers * layers + gathers * ends),
        reduce_scatter=others * reduce_size * reductions * parameters.total,
        all_reduce=2 * (copies - 1) / copies * reduce_size * reductions * parameters.total / job.shards,
        host_to_device=batches + state,
        device_to_host=state,
    )


def expected_time(config: ModelConfig, job: Job, gpu: Gpu, done: Work, moved: Traffic) -> Time:
    """Expected seconds of one step. Collectives run beside computation; what is longer counts."""
    parameters, tokens = Parameters.of(config), job.tokens * job.micro_batches
    head = 6.0 * config.hidden_size * config.vocab_size * tokens
    products = (done.products + done.again) / job.gpus
    # what has no float8: the head, and the experts of a mixture
    lower = 0.0 if job.float8 is None or config.num_local_experts else products - head
    peak = gpu.bf16_flops if job.dtype == torch.bfloat16 else gpu.bf16_flops / 15  # fp32, without tensor cores
    seconds = {
        "products": (products - lower) / (peak * _PRODUCTS),
        "attention": done.attention / job.gpus / (peak * _ATTENTION),
        "elementwise": tokens * _streamed_bytes_per_token(config, job) / (gpu.bandwidth * _STREAMS),
    }
    if lower:
        assert gpu.float8_flops is not None
        seconds["products"] += lower / (gpu.float8_flops * _FLOAT8_PRODUCTS)
    own = parameters.total / job.shards
    state = sum(math.prod(s) * job.optimizer.state_bytes(job.dtype, s) for s in parameters.shapes) / job.shards
    gradient = 4 if job.accumulates else job.dtype.itemsize
    seconds["optimizer"] = (2 * own * (job.dtype.itemsize + gradient) + 2 * state) / (gpu.bandwidth * _STREAMS)
    if job.optimizer.offload:
        seconds["optimizer"] += (moved.host_to_device + moved.device_to_host) / (gpu.host * _STREAMS)

    # A copy of the model that spans machines uses the network of all their GPUs together; between copies on several
    # machines each GPU has its own.
    machine = min(gpu.link, gpu.network * job.gpus_per_node)
    within = gpu.link if job.shards <= job.gpus_per_node else machine
    across = gpu.link if job.gpus <= job.gpus_per_node else gpu.network
    sharding = (moved.all_gather + moved.reduce_scatter) / (within * _COLLECTIVES)
    between = moved.all_reduce / (across * _COLLECTIVES)
    hidden_behind = seconds["products"] + seconds["attention"] + seconds["elementwise"]
    seconds["communication"] = max(sharding + between - hidden_behind, 0.0)
    return Time(seconds)


def _streamed_bytes_per_token(config: ModelConfig, job: Job) -> float:
    """Bytes of memory traffic of norms, rotation, activation and loss, forward and backward, by the kernels' floors."""
    hidden, width = config.hidden_size, config.intermediate_size * (config.num_experts_per_tok or 1)
    rotated = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    norms = 2 * (4 + 5) * hidden
    layer = norms + 4 * rotated + (3 + 6) * width
    if config.num_local_experts:
        layer += 8 * hidden * (config.num_experts_per_tok or 1)  # rows into the order of the experts, and back
    if job.float8 is not None:  # casts of what every projection multiplies, in both orientations
        layer += 2 * (3 * hidden + 3 * width + 2 * rotated)
    if job.recompute == "full":
        layer += norms // 2 + 2 * rotated + 3 * width
    return job.dtype.itemsize * (config.num_hidden_layers * layer + 5 * config.vocab_size)


# --- what cannot work ------------------------------------------------------------------------------------------------


def check_fits(config: ModelConfig, job: Job, gpu: Gpu) -> Memory:
    """The memory of a job on a GPU.

    Raises:
        ValueError: it is more than the GPU has; with what would help, and how far.
    """
    needed = memory(config, job, gpu)
    if needed.total <= gpu.memory:
        return needed
    largest = sorted(needed.kinds.items(), key=lambda entry: -entry[1])[:3]
    kinds = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
    helps = [f"{what}: {size / 1e9:.1f} GB" for what, size in _what_helps(config, job, gpu, needed.total)]
    raise ValueError(
        f"does not fit: a step takes {needed.total / 1e9:.1f} GB of the {gpu.memory / 1e9:.1f} GB of one {gpu.name} "
        f"(at {needed.at}: {kinds}). What would help: {'; '.join(helps) or 'a smaller model'}"
    )


def _what_helps(config: ModelConfig, job: Job, gpu: Gpu, now: float) -> list[tuple[str, float]]:
    """Changes of a recipe with the memory that they lead to: those that fit, or the best two if none does alone."""
    optimizer = job.optimizer
    changes: dict[str, Job] = {}
    for mode in ("selective", "full"):
        changes[f"recompute={mode}"] = dataclasses.replace(job, recompute=mode)  # type: ignore[arg-type]
    if optimizer.moments != "8bit":
        changes["optimizer.moments=8bit"] = _with_optimizer(job, moments="8bit")
    if optimizer.master != "none":
        changes["optimizer.master=none"] = _with_optimizer(job, master="none")
    if job.gpus == 1:
        if not optimizer.offload:
            changes["optimizer.offload=true"] = _with_optimizer(job, offload=True)
        in_backward = _with_optimizer(job, in_backward=True, max_grad_norm=None)
        if not optimizer.in_backward and job.micro_batches == 1:
            changes["optimizer.in_backward=true with optimizer.max_grad_norm=null"] = in_backward
        smallest = {"moments": "8bit", "master": "none", "in_backward": True, "max_grad_norm": None}
        least = dataclasses.replace(_with_optimizer(job, **smallest), recompute="full", micro_batches=1)
        changes["all of recompute=full, moments=8bit, master=none, in_backward, batch.micro_batches=1"] = least
    if job.parallel.replicas > 1:
        one_copy = job.parallel.model_copy(update={"replicas": 1})
        changes["parallel.replicas=1"] = dataclasses.replace(job, parallel=one_copy)
    for gpus in (2, 4, 8, 16, 32, 64):
        if gpus > job.gpus:
            without = _with_optimizer(job, offload=False, in_backward=False)
            more = dataclasses.replace(without, gpus=gpus, micro_batches=max(job.micro_batches * job.gpus // gpus, 1))
            changes[f"{gpus} GPUs"] = more
    results = [(what, memory(config, changed, gpu).total) for what, changed in changes.items()]
    fits = [entry for entry in results if entry[1] <= gpu.memory]
    enough = next((what for what, _ in fits if what.endswith(" GPUs")), None)
    fits = [entry for entry in fits if not entry[0].endswith(" GPUs") or entry[0] == enough]
    return fits or sorted((entry for entry in results if entry[1] < now), key=lambda entry: entry[1])[:2]


def _with_optimizer(job: Job, **changes: object) -> Job:
    return dataclasses.replace(job, optimizer=job.optimizer.model_copy(update=changes))
