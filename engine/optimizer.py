"""AdamW over the flat shards of a model: what is stored, clipping, the finite check, all on the device.

Knows parameters and their gradients, plain or DTensor, nothing of models, files or schedules. A step never asks the
device for a value. The arithmetic is `kernels.adamw_`; its result does not depend on how the parameters are sharded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..kernels import AdamWShard, adamw_, clip_coefficient, squared_norm
from .parallel import shard_group
from .shards import local_shard

MOMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
_BLOCK = 256  # elements that share a scale of 8-bit moments; every parameter begins at a multiple in the numbering
BUCKET_BYTES = 256 << 20  # of offloaded state on the device at a time


class AdamWConfig(BaseModel):
    """The `optimizer` section of a training recipe.

    betas, eps: as in Loshchilov & Hutter 2019 (arXiv:1711.05101), with bias correction.
    weight_decay: decoupled; applied to matrices only (parameters with at least two dimensions: projections, embedding
        and head), never to norms and biases, unless `decay_vectors` is set.
    max_grad_norm: gradients are scaled down to this global 2-norm; None: no clipping.
    master: what a bf16 weight has beside it. `remainder`: the 16 bits that make an exact fp32 master of it, 2 bytes a
        parameter; `none`: nothing, and the update is rounded stochastically. fp32 weights are their own master.
    moments: how both moments are stored, rounded stochastically where that is not float32. None: as the weights.
        `8bit`: with one scale per 256 elements; parameters whose rows are no multiple of that (norms and biases above
        all) keep bfloat16.
    offload: keep moments and remainder in host memory and bring them to the device a bucket at a time. One process.
    in_backward: update a parameter as soon as its gradient is there and drop the gradient, so that no more than one
        parameter's is held. One process; forbids clipping and more than one micro batch, and a gradient that is not
        finite skips its parameter, not the step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay_vectors: bool = False
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    master: Literal["remainder", "none"] = "remainder"
    moments: Literal["float32", "bfloat16", "8bit"] | None = None
    offload: bool = False
    in_backward: bool = False

    @model_validator(mode="after")
    def _check_in_backward(self) -> AdamWConfig:
        if self.in_backward and self.max_grad_norm is not None:
            raise ValueError(
                f"in_backward updates before the global norm is known: max_grad_norm is {self.max_grad_norm:g}; "
                "allowed: null"
            )
        return self

    def moment_dtype(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.dtype:
        """Storage of the moments of a parameter of this dtype and global shape."""
        chosen = dtype if self.moments is None else MOMENTS[self.moments]
        if chosen == torch.uint8 and (len(shape) < 2 or math.prod(shape[1:]) % _BLOCK):
            return torch.bfloat16
        return chosen

    def state_bytes(self, dtype: torch.dtype, shape: Sequence[int]) -> float:
        """Bytes of optimizer state per element of a parameter."""
        moments = self.moment_dtype(dtype, shape)
        scales = 2 * 4 / _BLOCK if moments == torch.uint8 else 0.0
        return 2 * moments.itemsize + scales + (2 if dtype == torch.bfloat16 and self.master == "remainder" else 0)


@dataclass(frozen=True)
class _State:
    """A parameter and its optimizer state, as tensors of the parameter's sharding. first: number of the parameter's
    first element among all elements of the model."""

    parameter: Tensor
    first: int
    tensors: dict[str, Tensor]  # by the names of AdamWShard

    def local(self) -> dict[str, Tensor]:
        """The rank's piece of every state tensor, flat."""
        return {name: local_shard(tensor).values for name, tensor in self.tensors.items()}

    def shard(self, tensors: Mapping[str, Tensor]) -> AdamWShard:
        """The rank's piece of the parameter, with state from `tensors`."""
        local = local_shard(self.parameter)
        return AdamWShard(local.values, first_index=self.first + local.first, **tensors)  # type: ignore[arg-type]


class AdamW:
    """AdamW over named parameters that are all fp32 or all bf16, plain or sharded by rows.

    bf16 with `master: remainder`: master = bf16 * 2^16 + remainder on the bit patterns, so the weight is always the
    master rounded to nearest and nothing is stored twice.

    A non-finite gradient norm skips the update by selection inside the kernel: parameters, moments and the step count
    keep their bits (a factor of zero would turn them into NaN).
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Tensor]], config: AdamWConfig, *, accumulate_in_fp32: bool = False
    ) -> None:
        """Moments start at zero, on the device of their parameter.

        Args:
            accumulate_in_fp32: gradients of several micro batches are added up in fp32, whatever the weights are.

        Raises:
            ValueError: parameters of another dtype than fp32 or bf16, or of both; offload or in_backward with sharded
                parameters, in_backward with sums of gradients.
        """
        self.config = config
        self.parameters = dict(named_parameters)
        dtypes = {parameter.dtype for parameter in self.parameters.values()}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            raise ValueError(f"AdamW: parameters must be all float32 or all bfloat16, found {sorted(map(str, dtypes))}")
        some = next(iter(self.parameters.values()))
        self.device, self.group = some.device, shard_group(some)
        for option in ("offload", "in_backward"):
            if self.group is not None and getattr(config, option):
                raise ValueError(f"optimizer.{option}: works in one process only; allowed with several: false")
        if config.in_backward and accumulate_in_fp32:
            raise ValueError("optimizer.in_backward: works with one micro batch per step only")

        self.step_count = torch.zeros((), dtype=torch.float32, device=self.device)
        self.states: dict[str, _State] = {}
        first = 0
        for name, parameter in self.parameters.items():
            self.states[name] = _State(parameter, first, self._zeros(parameter))
            first += -(-parameter.numel() // _BLOCK) * _BLOCK

        self._sums: dict[Tensor, Tensor] = {}  # of sharded gradients in fp32, by parameter
        if config.in_backward:
            self._in_backward = _InBackward(self)
        elif accumulate_in_fp32 and dtypes == {torch.bfloat16}:
            for parameter in self.parameters.values():
                if self.group is not None:
                    parameter.register_post_accumulate_grad_hook(self._add_up)
                else:
                    parameter.grad_dtype = torch.float32

    def _zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """Moments, remainder and scales of a parameter, sharded as it is."""
        dtype = self.config.moment_dtype(parameter.dtype, parameter.shape)
        tensors = {name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        if parameter.dtype == torch.bfloat16 and self.config.master == "remainder":
            tensors["remainder"] = torch.zeros_like(parameter, dtype=torch.int16)
        if dtype == torch.uint8:
            rows = parameter.shape[0]
            for name in ("exp_avg_scale", "exp_avg_sq_scale"):
                tensors[name] = _sharded_zeros((rows, parameter.numel() // rows // _BLOCK), parameter)
        if self.config.offload and self.device.type == "cuda":
            tensors = {name: tensor.cpu().pin_memory() for name, tensor in tensors.items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def main_grad(self, parameter: Tensor) -> Tensor | None:
        """The fp32 buffer that becomes the gradient of a plain parameter, for kernels that add to it themselves; None
        where autograd has to bring the gradient."""
        fp32 = torch.float32 in (parameter.dtype, parameter.grad_dtype)
        if self.group is not None or self.config.in_backward or not fp32:
            return None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
        return parameter.grad

    def _add_up(self, parameter: Tensor) -> None:
        """FSDP2 rounds what it has summed in fp32 to the weights' dtype; the sum over micro batches stays fp32."""
        assert parameter.grad is not None
        gradient = local_shard(parameter.grad).values
        if parameter in self._sums:
            self._sums[parameter] += gradient
        else:
            self._sums[parameter] = gradient.float()
        parameter.grad = None

    def _gradient(self, name: str) -> Tensor:
        """Flat gradient of the rank's piece of a parameter."""
        parameter = self.parameters[name]
        if parameter in self._sums:
            return self._sums[parameter]
        assert parameter.grad is not None, f"{name} has no gradient"
        return local_shard(parameter.grad).values

    @torch.no_grad()
    def step(self, lr: float, veto: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Update every parameter from its gradient, and drop the gradients.

        Args:
            veto: of the gradient norm; fp32 0-dim, 1 to skip the step (in_backward comes too early to ask).

        Returns:
            grad_norm: fp32 0-dim, global 2-norm before clipping, over all ranks.
            skipped: fp32 0-dim, 1 if the norm was not finite or vetoed and nothing was changed, else 0.
        """
        if self.config.in_backward:
            return self._in_backward.end()
        gradients = {name: self._gradient(name) for name in self.parameters}
        square = squared_norm(list(gradients.values()))
        if self.group is not None:
            dist.all_reduce(square, group=self.group)
        grad_norm = square.sqrt().float()
        grad_scale, skipped = clip_coefficient(grad_norm, self.config.max_grad_norm)
        if veto is not None:
            skipped = torch.maximum(skipped, veto(grad_norm))
        self.step_count += 1.0 - skipped
        self.update(gradients, lr, grad_scale, skipped)
        self._sums.clear()
        for parameter in self.parameters.values():
            parameter.grad = None  # freed, not zeroed: the next forward's activations take its place
        return grad_norm, skipped

    def update(self, gradients: Mapping[str, Tensor], lr: float, grad_scale: Tensor | None, skip: Tensor) -> None:
        """AdamW on the parameters whose gradients are given, as step number `step_count`."""
        for decayed in (True, False):
            names = [name for name in gradients if self._is_decayed(self.parameters[name]) == decayed]
            for bucket in self._buckets(names):
                stored = [self.states[name].local() for name in bucket]
                present = [{key: t.to(self.device, non_blocking=True) for key, t in each.items()} for each in stored]
                adamw_(
                    [self.states[name].shard(tensors) for name, tensors in zip(bucket, present)],
                    [gradients[name] for name in bucket],
                    lr=lr, betas=self.config.betas, eps=self.config.eps,
                    weight_decay=self.config.weight_decay if decayed else 0.0,
                    step=self.step_count, grad_scale=grad_scale, skip=skip,
                )  # fmt: skip
                for home, here in zip(stored, present):
                    for key, tensor in home.items():
                        if tensor is not here[key]:
                            tensor.copy_(here[key], non_blocking=True)

    def _buckets(self, names: list[str]) -> Iterator[list[str]]:
        """All names at once; with offloaded state as many as fit into the memory set aside for it."""
        bucket: list[str] = []
        filled = 0
        for name in names:
            size = sum(tensor.nbytes for tensor in self.states[name].tensors.values()) if self.config.offload else 0
            if bucket and filled + size > BUCKET_BYTES:
                yield bucket
                bucket, filled = [], 0
            bucket.append(name)
            filled += size
        if bucket:
            yield bucket

    def _is_decayed(self, parameter: Tensor) -> bool:
        return parameter.dim() >= 2 or self.config.decay_vectors

    def begin(self, lr: float) -> None:
        """With `in_backward`: the learning rate of the updates that the coming backward pass makes."""
        if self.config.in_backward:
            self._in_backward.begin(lr)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat {"step", "exp_avg.NAME", "exp_avg_sq.NAME", "remainder.NAME", ...}: the tensors themselves, sharded as
        their parameters are."""
        state = {"step": self.step_count}
        for name, each in self.states.items():
            state.update({f"{kind}.{name}": tensor for kind, tensor in each.tensors.items()})
        return state


def _sharded_zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """fp32 zeros whose rows lie where those of `like` do."""
    if shard_group(like) is None:
        return torch.zeros(shape, device=like.device)
    from torch.distributed.tensor import zeros

    return zeros(*shape, device_mesh=like.device_mesh, placements=like.placements)  # type: ignore[attr-defined]


class _InBackward:
    """Updates by hooks that fire as soon as a parameter's gradient is complete."""

    def __init__(self, optimizer: AdamW) -> None:
        self.optimizer = optimizer
        self.lr: float | None = None
        self.squares: list[Tensor] = []
        self.skips: list[Tensor] = []
        for name, parameter in optimizer.parameters.items():
            parameter.register_post_accumulate_grad_hook(functools.partial(self._update, name))

    def begin(self, lr: float) -> None:
        assert self.lr is None, "the step before has not ended: in_backward takes one micro batch per step"
        self.lr = lr
        self.optimizer.step_count += 1.0

    @torch.no_grad()
    def _update(self, name: str, parameter: Tensor) -> None:
        assert self.lr is not None, "begin was not called before backward"
        assert parameter.grad is not None
        gradient = parameter.grad.view(-1)
        square = squared_norm([gradient])
        skip = 1.0 - torch.isfinite(square).float()
        self.optimizer.update({name: gradient}, self.lr, None, skip)
        self.squares.append(square)
        self.skips.append(skip)
        parameter.grad = None

    def end(self) -> tuple[Tensor, Tensor]:
        """(gradient norm, whether any parameter was skipped)."""
        assert len(self.squares) == len(self.optimizer.parameters), "a parameter has no gradient"
        grad_norm = torch.stack(self.squares).sum().sqrt().float()
        skipped = torch.stack(self.skips).amax()
        self.lr, self.squares, self.skips = None, [], []
        return grad_norm, skipped
