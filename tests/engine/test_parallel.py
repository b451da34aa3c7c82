"""Training on several ranks over gloo: the same run as in one process, whatever the ranks, copies and options."""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.engine import SafetensorsFolder, parse_recipe, read_metrics, train
from steep.engine.__main__ import main
from steep.engine.checkpoint import list_checkpoints
from steep.engine.parallel import ParallelConfig, check_world, world_from_environment
from tests.engine.tiny_run import make_mixtral, make_recipe, write_recipe
from tests.processes import forkserver, run_ranks

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
    loads = [read_metrics(run / "metrics.jsonl", "train")[0]["expert_load"] for run in (out, tmp_path / "out")]
    assert loads[0] == loads[1]
    assert torch.tensor(loads[0]).shape == (2, 4)
    torch.testing.assert_close(torch.tensor(loads[0]).sum(1), torch.ones(2), rtol=0, atol=1e-3)


# --- resume and faults: real processes, as torchrun starts them ---


def main_rank(rank: int, world_size: int, port: int, recipe: Path, log: Path) -> None:
    """`python -m steep.engine RECIPE` of one rank, in a process that has imported everything already."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["steep.engine", str(recipe)]
    main()


class Rank:
    """A process of a run. log: what it wrote to stderr."""

    def __init__(self, *args: Any) -> None:
        self.log: Path = args[-1]
        self.process = forkserver().Process(target=main_rank, args=args)
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def finish(self, timeout: float = 90) -> tuple[int | None, str]:
        """(status, stderr)."""
        self.process.join(timeout)
        return self.process.exitcode, self.log.read_text()


def start_ranks(world_size: int, recipe: Path) -> list[Rank]:
    port = free_port()
    return [Rank(rank, world_size, port, recipe, recipe.parent / f"stderr-{rank}") for rank in range(world_size)]


def wait_for_steps(out: Path, steps: int, ranks: list[Rank]) -> None:
    deadline = time.monotonic() + 90
    while not ((out / "metrics.jsonl").is_file() and len(read_metrics(out / "metrics.jsonl", "train")) >= steps):
        assert all(rank.process.is_alive() for rank in ranks), [rank.finish()[1] for rank in ranks]
        assert time.monotonic() < deadline
        time.sleep(0.01)


SHORT = {"steps": 24, "batch": {"sequences": 1, "micro_batches": 6}, "validation": {"every": 100}}
ENDLESS = {**SHORT, "steps": 5000, "parallel": {"timeout_seconds": 4}}


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_another_world_goes_on(tmp_path):
    recipe = write_recipe(tmp_path, **SHORT)
    ranks = start_ranks(2, recipe)
    wait_for_steps(tmp_path / "out", 3, ranks)
    ranks[1].send(signal.SIGUSR1)
    assert [rank.finish()[0] for rank in ranks] == [0, 0]
    stopped_at = len(read_metrics(tmp_path / "out" / "metrics.jsonl", "train"))
    assert list_checkpoints(tmp_path / "out" / "checkpoints")[0].name == f"step-{stopped_at:08d}"
    assert 3 <= stopped_at < 24

    values = make_recipe(tmp_path, **SHORT)
    train_ranks(3, values)
    train(parse_recipe({**values, "out": str(tmp_path / "straight")}))
    assert_close_runs(tmp_path / "out", tmp_path / "straight", tolerance=2e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_others_by_name(tmp_path, victim):
    recipe = write_recipe(tmp_path, **ENDLESS)
    ranks = start_ranks(2, recipe)
    wait_for_steps(tmp_path / "out", 2, ranks)
    ranks[victim].send(signal.SIGKILL)
    killed_at = time.monotonic()
    status, message = ranks[1 - victim].finish(timeout=40)
    assert time.monotonic() - killed_at < 20
    assert status == 4, message
    assert f"rank {victim}" in message


def test_a_stuck_rank_ends_all_by_name(tmp_path):
    """Alive, with its threads running, but it does not get on: a file system that hangs, say."""
    recipe = write_recipe(tmp_path, **ENDLESS)
    ranks = start_ranks(2, recipe)
    wait_for_steps(tmp_path / "out", 2, ranks)
    ranks[1].send(signal.SIGSTOP)
    status, message = ranks[0].finish(timeout=40)
    ranks[1].send(signal.SIGKILL)
    assert status == 4, message
    assert "rank 1" in message


def test_killed_and_resumed_on_the_same_ranks_bit_for_bit(tmp_path):
    recipe = write_recipe(tmp_path, **SHORT)
    for steps in (3, 10):
        ranks = start_ranks(2, recipe)
        wait_for_steps(tmp_path / "out", steps, ranks)
        for rank in ranks:
            rank.send(signal.SIGKILL)
        for rank in ranks:
            rank.finish()
    assert [rank.finish()[0] for rank in start_ranks(2, recipe)] == [0, 0]
    straight = make_recipe(tmp_path, **SHORT, out=str(tmp_path / "straight"))
    train_ranks(2, straight)
    for name in ("model", "checkpoints/step-00000024"):
        ours, theirs = SafetensorsFolder(tmp_path / "out" / name), SafetensorsFolder(tmp_path / "straight" / name)
        assert all(torch.equal(ours.get(each), theirs.get(each)) for each in theirs.names)


def test_mistakes_are_said_once(tmp_path):
    recipe = write_recipe(tmp_path, **SHORT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    results = [rank.finish() for rank in start_ranks(2, recipe)]
    assert [status for status, _ in results] == [2, 2]
    assert "is not empty and holds no training run" in results[0][1]
    assert "not empty" not in results[1][1]


def test_what_does_not_fit_the_world_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"batch\.micro_batches: 12 .* over 8 processes; allowed: a multiple of 8"):
        check_world(ParallelConfig(), 8, 12)
    with pytest.raises(ValueError, match=r"parallel\.replicas: 3 copies over 8 processes; allowed: a divisor of 8"):
        check_world(ParallelConfig(replicas=3), 8, 8)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="environment: WORLD_SIZE is 'two'"):
        world_from_environment()
