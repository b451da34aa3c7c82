"""Schedules: closed forms, agreement with transformers, refusals."""

import math

import pytest
import torch
from pydantic import ValidationError

from steep.engine.schedule import ScheduleConfig, learning_rate, warmup_length


def run(total_steps: int, **config) -> list[float]:
    schedule = ScheduleConfig(**config)
    return [learning_rate(schedule, step, total_steps) for step in range(1, total_steps + 1)]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_equals_transformers(kind):
    from transformers import get_scheduler

    warmup, total = 7, 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = run(total, kind=kind, lr=3e-4, warmup_steps=warmup)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    # transformers spends its first step at zero; ours is its warm-up one step earlier
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], rel=1e-12)


def test_nonzero_end_is_an_affine_image_of_the_decay_to_zero():
    to_zero = run(50, kind="cosine", lr=1.0)
    to_end = run(50, kind="cosine", lr=1.0, end_lr=0.2)
    assert to_end == pytest.approx([0.2 + 0.8 * value for value in to_zero])
    assert min(to_end) > 0.2


def test_constant_and_wsd():
    assert run(5, kind="constant", lr=2.0, warmup_steps=2) == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert run(10, kind="wsd", lr=1.0, end_lr=0.5, warmup_steps=2, decay_steps=4) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625]
    )
    assert run(10, kind="wsd", lr=1.0, warmup_ratio=0.2, decay_ratio=0.4) == pytest.approx(
        run(10, kind="wsd", lr=1.0, warmup_steps=2, decay_steps=4)
    )


def test_warmup_ratio_rounds_up():
    assert warmup_length(ScheduleConfig(lr=1.0, warmup_ratio=0.03), 101) == math.ceil(3.03)
    assert warmup_length(ScheduleConfig(lr=1.0), 101) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "not both"),
        ({"kind": "wsd"}, "exactly one of decay_steps and decay_ratio"),
        ({"kind": "linear", "decay_steps": 3}, "belong to kind wsd"),
        ({"kind": "constant", "end_lr": 0.1}, "no end"),
        ({"end_lr": 2.0}, "above lr"),
        ({"warmup_ratio": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_combinations_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(lr=1.0, **config)


def test_schedule_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="8 warm-up steps and 4 decay steps do not fit into a run of 10 steps"):
        run(10, kind="wsd", lr=1.0, warmup_steps=8, decay_steps=4)
    with pytest.raises(ValueError, match="11 warm-up steps do not fit"):
        run(10, kind="linear", lr=1.0, warmup_steps=11)
