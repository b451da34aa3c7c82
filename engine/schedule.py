"""Learning-rate schedules: pure functions from the number of an optimizer step to its learning rate.

Nothing here has state, so a resumed run needs only its step number. No torch, no files.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScheduleConfig(BaseModel):
    """The `schedule` section of a training recipe.

    kind: what happens after warm-up. `linear` and `cosine` fall from `lr` to `end_lr` over all remaining steps;
        `constant` stays at `lr`; `wsd` (warm-up, stable, decay) stays at `lr` and falls linearly to `end_lr` over the
        last part of the run.
    lr: peak learning rate.
    end_lr: learning rate approached at the end of a decay.
    warmup_steps / warmup_ratio: length of the linear warm-up, in steps or as a fraction of the run; at most one.
    decay_steps / decay_ratio: length of the final decay of `wsd`, likewise; exactly one, and for `wsd` only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    lr: float = Field(gt=0)
    end_lr: float = Field(default=0.0, ge=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    decay_steps: int | None = Field(default=None, ge=1)
    decay_ratio: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _check_combination(self) -> ScheduleConfig:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        decays = (self.decay_steps is not None) + (self.decay_ratio is not None)
        if self.kind == "wsd" and decays != 1:
            raise ValueError("kind wsd needs exactly one of decay_steps and decay_ratio")
        if self.kind != "wsd" and decays:
            raise ValueError(f"decay_steps and decay_ratio belong to kind wsd, not to {self.kind}")
        if self.kind == "constant" and self.end_lr:
            raise ValueError("kind constant has no end: remove end_lr or choose linear, cosine or wsd")
        if self.end_lr > self.lr:
            raise ValueError(f"end_lr {self.end_lr:g} is above lr {self.lr:g}")
        return self


def warmup_length(config: ScheduleConfig, total_steps: int) -> int:
    """Number of warm-up steps in a run of `total_steps`."""
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * total_steps)
    return config.warmup_steps or 0


def learning_rate(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1 to `total_steps`.

    Warm-up: step k of w uses lr * k / w, so no step is spent at zero and step w uses the full rate. Decay: progress
    (step - 1 - w) / (total - w) goes from 0 to just below 1, as in transformers' `get_scheduler`; a decay to zero
    therefore wastes no step either.

    Raises:
        ValueError: the warm-up and the decay together are longer than the run.
    """
    warmup = warmup_length(config, total_steps)
    decay_start = warmup
    if config.kind == "wsd":
        decay = config.decay_steps or math.ceil((config.decay_ratio or 0) * total_steps)
        decay_start = total_steps - decay
    if warmup > total_steps or decay_start < warmup:
        raise ValueError(
            f"schedule: {warmup} warm-up steps" + (f" and {decay} decay steps" if config.kind == "wsd" else "")
            + f" do not fit into a run of {total_steps} steps"
        )
    assert 1 <= step <= total_steps, (step, total_steps)

    if step <= warmup:
        return config.lr * step / warmup
    if config.kind == "constant" or step <= decay_start:
        return config.lr
    progress = (step - 1 - decay_start) / (total_steps - decay_start)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.end_lr + (config.lr - config.end_lr) * remaining
