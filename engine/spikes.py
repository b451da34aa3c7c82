"""Loss and gradient spikes: which steps stand out from those before. On device tensors; nothing here waits for them."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class SpikeConfig(BaseModel):
    """The `spikes` section of a training recipe.

    factor: a step whose loss or gradient norm lies more than so many standard deviations above the mean of the accepted
        steps before it is skipped. None: no step is skipped for that.
    window: how many accepted steps are looked back on.
    min_steps: nothing is judged before so many steps were accepted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float | None = Field(default=None, gt=0)
    window: int = Field(default=128, ge=2)
    min_steps: int = Field(default=32, ge=2)


class SpikeGuard:
    """Mean and spread of loss and gradient norm over the last accepted steps. What was skipped leaves no trace in them,
    so one spike does not widen the gate for the next, and a NaN cannot poison it."""

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self.history = torch.zeros(2, config.window, device=device)  # of loss and gradient norm, a ring
        self.accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._slots = torch.arange(config.window, device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """fp32 0-dim: 1 where this step stands out, else 0."""
        values = torch.stack([loss, grad_norm]).float()
        if self.config.factor is None:
            return torch.zeros_like(values[0])
        count = self.accepted.clamp(max=self.config.window)
        known = self._slots < count
        mean = torch.where(known, self.history, 0.0).sum(1) / count.clamp(min=1)
        variance = torch.where(known, (self.history - mean[:, None]) ** 2, 0.0).sum(1) / (count - 1).clamp(min=1)
        high = (values > mean + self.config.factor * variance.sqrt()).any()
        return (high & (self.accepted >= self.config.min_steps)).float()

    def update(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Remember a step, unless it was skipped."""
        values = torch.stack([loss, grad_norm]).float()
        kept = skipped == 0
        here = (self._slots == self.accepted % self.config.window) & kept
        self.history.copy_(torch.where(here, values[:, None], self.history))
        self.accepted += kept

    def state_dict(self) -> dict[str, Tensor]:
        """{"history", "accepted"}: the tensors themselves."""
        return {"history": self.history, "accepted": self.accepted}
