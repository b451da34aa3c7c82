"""Training on several ranks over gloo: the same run as in one process, whatever the ranks, copies and options."""

import os
import socket
from pathlib import Path

import pytest
import torch

from steep.engine import SafetensorsFolder, parse_recipe, read_metrics, train
from tests.engine.processes import run_ranks
from tests.engine.tiny_run import make_mixtral, make_recipe

STEPS = {"steps": 5, "validation": {"every": 4, "sequences": 5}, "batch": {"sequences": 1, "micro_batches": 12}}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_rank(rank: int, world_size: int, port: int, values: dict) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in {**ranks, "MASTER_PORT": port}.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    train(parse_recipe(values))


def train_ranks(world_size: int, values: dict) -> Path:
    run_ranks(train_rank, world_size, world_size, free_port(), values)
    return Path(values["out"])


def assert_close_runs(out: Path, reference: Path, tolerance: float = 1e-6) -> None:
    """Losses, gradient norms and weights agree to fp32 rounding; the counts are equal."""
    for event, keys in (("train", ("loss", "losses", "grad_norm", "tokens")), ("validation", ("losses", "counts"))):
        ours, theirs = read_metrics(out / "metrics.jsonl", event), read_metrics(reference / "metrics.jsonl", event)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for one, other in zip(ours, theirs):
            for key in keys:
                assert one[key] == pytest.approx(other[key], rel=tolerance), (one["step"], key)
    ours, theirs = SafetensorsFolder(out / "model"), SafetensorsFolder(reference / "model")
    for name in theirs.names:
        torch.testing.assert_close(ours.get(name), theirs.get(name), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    train(parse_recipe(make_recipe(root, **STEPS)))
    return root / "out"


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (3, {"parallel": {"reshard_after_forward": False}}),
        (4, {"parallel": {"reduce_every": "step"}, "recompute": "full"}),
        (4, {"parallel": {"replicas": 2}, "recompute": "selective"}),
    ],
)
def test_the_same_run_at_every_world_size(reference, tmp_path, world_size, changes):
    out = train_ranks(world_size, make_recipe(reference.parent, **STEPS, **changes, out=str(tmp_path / "out")))
    assert_close_runs(out, reference)
    last = read_metrics(out / "metrics.jsonl", "train")[-1]
    assert len(last["rank_seconds"]) == world_size
    assert all(seconds > 0 for seconds in last["rank_seconds"])


def test_a_mixture_of_experts_on_three_ranks(tmp_path):
    make_recipe(tmp_path)  # the stores
    model = make_mixtral(tmp_path / "mixtral", tmp_path / "base")
    values = make_recipe(tmp_path, **STEPS, model=str(model))
    train(parse_recipe(values))
    out = train_ranks(3, {**values, "out": str(tmp_path / "sharded")})
    assert_close_runs(out, tmp_path / "out", tolerance=3e-6)
