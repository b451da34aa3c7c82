"""`steep bench train --model NAME`: the code of real shapes on tiny ones, beside transformers, without a GPU."""

import pytest
import torch

from steep.bench import train_gpu
from steep.bench.models import MODELS
from steep.bench.train_gpu import CHECKS, Case
from steep.engine.config import ModelConfig
from steep.engine.plan import Parameters

PARAMETERS = {"qwen2.5-7b": 7.62e9, "mistral-7b": 7.24e9, "mistral-small-24b": 23.57e9, "mixtral-8x7b": 46.70e9}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_released_models(name):
    assert Parameters.of(ModelConfig.from_dict(MODELS[name])).total == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.fixture
def in_this_process(monkeypatch):
    def measure(loop, case, timeout):
        return train_gpu._measure(loop, case)

    monkeypatch.setattr(train_gpu, "_in_own_process", measure)


def test_both_loops_see_the_same_tokens(in_this_process):
    case = Case("qwen2.5-7b", seq_len=256, sequences=1, steps=2, dtype="float32")
    figures = train_gpu.run(case, scale="tiny")
    ours, theirs = figures["steep"], figures["transformers"]
    for each in (ours, theirs):
        assert set(each["phases_seconds"]) == {"forward", "backward", "optimizer"}
        assert len(each["losses"]) == 5
        assert each["losses"] == pytest.approx([6.24] * 5, abs=0.2)  # log 512: random weights, random tokens
        assert each["tokens_per_second"] * each["seconds"] <= 256
    assert figures["planned"]["memory_bytes"] > 0


@pytest.mark.parametrize("model", ["mistral-7b", "mixtral-8x7b"])
def test_options_reach_the_engine(in_this_process, model):
    optimizer = train_gpu.optimizer_options(["in_backward=true", "moments=8bit", "master=none"])
    assert optimizer["max_grad_norm"] is None
    case = Case(model, seq_len=128, steps=1, recompute="selective", float8="rowwise", optimizer=optimizer)
    figures = train_gpu.run(case, scale="tiny", loops=["steep"])
    assert figures["steep"]["seconds"] > 0


def test_the_check_of_all_targets(in_this_process):
    import dataclasses

    cases = {name: dataclasses.replace(case, seq_len=128, steps=1) for name, case in CHECKS.items()}
    figures = train_gpu.check(scale="tiny", cases=cases)
    assert figures["reached"]["mistral-small-24b runs"] is True
    assert figures["reached"]["float8 against bf16, at least 1.2"] > 0
    assert all("error" not in result for result in figures["checks"].values())
    over = train_gpu.check(scale="tiny", minutes=0.1)
    assert all("minutes are over" in result["error"] for result in over["checks"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="mixtral-8x7b: needs a GPU, and torch sees none; --scale tiny"):
        train_gpu.run(Case("mixtral-8x7b"))
    with pytest.raises(ValueError, match="needs a GPU"):
        train_gpu.check()
    with pytest.raises(ValueError, match="--recompute: 'some'; allowed: none, selective, full"):
        train_gpu.run(Case("mistral-7b", recompute="some"), scale="tiny")
    with pytest.raises(ValueError, match="--optimizer: in_backward updates before|--optimizer:.*allowed: null"):
        train_gpu.run(Case("mistral-7b", optimizer={"in_backward": True}), scale="tiny")
    with pytest.raises(ValueError, match="expected key=value"):
        train_gpu.optimizer_options(["moments"])


def test_a_loop_that_fails_is_one_line():
    result = train_gpu._in_own_process("nothing", Case("mistral-7b", scale="tiny"), 100)
    assert result == {"error": "KeyError: 'nothing'"}
