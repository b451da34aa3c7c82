"""The plan of a run: memory against real steps, arithmetic against counting by hand, what it refuses and advises."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from steep.bench import plan as bench
from steep.bench.models import MODELS
from steep.bench.train import SHAPE
from steep.engine import Decoder, parse_recipe
from steep.engine.config import ModelConfig
from steep.engine.gpus import GPUS, find_gpu
from steep.engine.metrics import full_attention_flops, training_flops
from steep.engine.optimizer import AdamWConfig
from steep.engine.parallel import ParallelConfig
from steep.engine.plan import Job, Parameters, check_fits, expected_time, memory, traffic, work
from steep.engine.plan_report import bytes_text, make_plan, refuse_what_cannot_fit
from tests.engine.tiny_run import make_recipe, write_recipe

QWEN = ModelConfig.from_dict(MODELS["qwen2.5-7b"])
MISTRAL = ModelConfig.from_dict(MODELS["mistral-small-24b"])
H100, H200 = find_gpu("h100"), find_gpu("h200")
SMALLEST = AdamWConfig(master="none", moments="8bit", in_backward=True, max_grad_norm=None)


def shape(layers: int, hidden: int, vocab: int, **changes) -> dict:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 11 * hidden // 4}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    return SHAPE | sizes | heads | {"vocab_size": vocab} | changes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_real_steps_take():
    """Three sizes, each under other options; larger ones are in bench/records."""
    cases = [
        {"shape": shape(6, 256, 8192), "dtype": "float32", "tokens": 1024},
        {"shape": shape(4, 384, 8192, tie_word_embeddings=False), "dtype": "float32", "tokens": 512,
         "micro_batches": 2, "recompute": "selective"},
        {"shape": shape(6, 512, 4096), "dtype": "float32", "tokens": 512, "recompute": "full"},
        {"shape": shape(4, 384, 8192), "dtype": "bfloat16", "tokens": 128},
    ]  # fmt: skip
    for result in bench.run(cases)["results"]:
        assert result["ratio"] == pytest.approx(1, abs=0.1), result


# --- arithmetic ---


def test_weights_and_state_are_counted_exactly():
    total = Parameters.of(QWEN).total
    kinds = memory(QWEN, Job(tokens=8192), H200).kinds
    assert kinds["weights"] == 2 * total
    assert kinds["optimizer state"] == 6 * total  # two moments and the remainder in 16 bits each
    sharded = memory(QWEN, Job(tokens=8192, gpus=8), H100).kinds
    assert 8 * sharded["weights"] == pytest.approx(2 * total, rel=1e-3)
    assert sharded["gathered weights"] > 0 < sharded["communication"]
    copies = Job(tokens=8192, gpus=8, parallel=ParallelConfig(replicas=2))
    assert memory(QWEN, copies, H100).kinds["weights"] == pytest.approx(2 * sharded["weights"], rel=1e-3)
    offloaded = memory(QWEN, Job(tokens=8192, optimizer=AdamWConfig(offload=True)), H200)
    assert offloaded.kinds["optimizer state"] == 0
    assert offloaded.host["optimizer state"] == 6 * total


def test_uneven_shards_count_the_largest():
    """A tensor with fewer rows than ranks is whole on some of them."""
    config = ModelConfig.from_dict(shape(1, 128, 64))
    parameters = Parameters.of(config)
    with torch.device("meta"):
        decoder = Decoder(config)
    expected = sum(-(-p.shape[0] // 3) * p.shape[1:].numel() for p in decoder.parameters())
    assert sum(parameters.size(unit, 3) for unit in parameters.units) == expected
    assert parameters.total == sum(p.numel() for p in decoder.parameters())


def test_each_option_saves_what_it_is_for():
    base = Job(tokens=16384)
    size = memory(QWEN, base, H200).total
    for changed in (
        dataclasses.replace(base, recompute="selective"),
        dataclasses.replace(base, recompute="full"),
        dataclasses.replace(base, optimizer=AdamWConfig(moments="8bit")),
        dataclasses.replace(base, optimizer=AdamWConfig(master="none")),
        dataclasses.replace(base, optimizer=AdamWConfig(offload=True)),
        dataclasses.replace(base, gpus=2),
        dataclasses.replace(base, tokens=8192),
    ):
        assert memory(QWEN, changed, H200).total < size
    full = dataclasses.replace(base, recompute="full")
    in_backward = dataclasses.replace(full, optimizer=AdamWConfig(in_backward=True, max_grad_norm=None))
    assert memory(QWEN, in_backward, H200).total < memory(QWEN, full, H200).total  # no gradients
    summed = Job(tokens=8192, gpus=8, micro_batches=4)
    once = dataclasses.replace(summed, parallel=ParallelConfig(reduce_every="step"))
    assert memory(QWEN, once, H100).total > memory(QWEN, summed, H100).total + 3 * Parameters.of(QWEN).total


def test_flops_and_traffic():
    lengths = np.array([8192, 1000, 7192])
    job = Job(tokens=16384, recompute="full")
    done = work(QWEN, job, lengths, 8192)
    assert done.document_true == training_flops(QWEN, lengths)
    assert done.full == full_attention_flops(QWEN, 16384, 8192)
    assert done.full / 16384 == pytest.approx(52.3e9, rel=0.01)  # 6 N + 12 L H S, as published rows count it
    assert 0.2 < done.again / done.document_true < 1 / 3

    total = Parameters.of(QWEN).total
    assert traffic(QWEN, Job(tokens=1)).network == 0
    moved = traffic(QWEN, Job(tokens=1, gpus=4, micro_batches=3))
    assert moved.reduce_scatter == 0.75 * 4 * total * 3
    ends = 2 * QWEN.vocab_size * QWEN.hidden_size + QWEN.hidden_size
    assert moved.all_gather == 0.75 * 2 * 3 * (2 * (total - ends) + ends)
    once = traffic(QWEN, Job(tokens=1, gpus=4, micro_batches=3, parallel=ParallelConfig(reduce_every="step")))
    assert once.reduce_scatter == 0.75 * 4 * total
    copies = traffic(QWEN, Job(tokens=1, gpus=4, parallel=ParallelConfig(replicas=2)))
    assert copies.all_reduce == 2 * 0.5 * 4 * total / 2
    state = traffic(QWEN, Job(tokens=1, optimizer=AdamWConfig(offload=True))).device_to_host
    assert state == 6 * total


def test_time_is_above_its_floor_and_hides_communication():
    lengths = np.full(16, 1024)

    def seconds(job, gpu=H200):
        done = work(QWEN, job, lengths, 8192)
        return expected_time(QWEN, job, gpu, done, traffic(QWEN, job)).parts

    alone = seconds(Job(tokens=16384))
    assert sum(alone.values()) > 6 * 7.07e9 * 16384 / H200.bf16_flops
    assert seconds(Job(tokens=16384, float8="rowwise"))["products"] < 0.8 * alone["products"]
    assert seconds(Job(tokens=16384, gpus=8))["communication"] == 0
    assert seconds(Job(tokens=512, gpus=64))["communication"] > 0


def test_a_target_of_one_gpu_fits():
    exact = Job(tokens=16384)
    assert check_fits(QWEN, exact, H200).total < 0.8 * H200.memory
    large = Job(tokens=8192, recompute="selective", optimizer=SMALLEST)
    assert check_fits(MISTRAL, large, H200).total < 0.8 * H200.memory


# --- refusals ---


def test_what_cannot_fit_is_refused_with_what_would_help():
    with pytest.raises(ValueError, match="does not fit: a step takes .* of the 150.1 GB of one h200") as refused:
        check_fits(MISTRAL, Job(tokens=8192), H200)
    advice = str(refused.value).split("What would help: ")[1]
    assert "GPUs" in advice
    assert "in_backward" in advice
    for sentence in advice.split("; "):
        assert float(sentence.rsplit(": ", 1)[1].removesuffix(" GB")) <= 150.1
    with pytest.raises(ValueError, match="optimizer.moments=8bit"):
        check_fits(QWEN, Job(tokens=8192, gpus=1), H100)
    with pytest.raises(ValueError, match="What would help: .*GPUs"):
        check_fits(ModelConfig.from_dict(MODELS["mixtral-8x7b"]), Job(tokens=8192, gpus=2), H100)


def test_training_asks_before_it_loads(tmp_path, monkeypatch):
    recipe = parse_recipe(make_recipe(tmp_path) | {"precision": "bfloat16"})
    config = ModelConfig.from_folder(recipe.model)
    refuse_what_cannot_fit(recipe, config, torch.device("cpu"), 1)
    tiny = dataclasses.replace(H100, memory=1e6)
    monkeypatch.setattr("steep.engine.plan_report.gpu_of", lambda device: tiny)
    with pytest.raises(ValueError, match="does not fit"):
        refuse_what_cannot_fit(recipe, config, torch.device("cuda"), 1)


def test_the_command(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "base" / "model-00001-of-00001.safetensors").unlink(missing_ok=True)
    for weights in (tmp_path / "base").glob("*.safetensors"):
        weights.unlink()  # nothing is loaded

    def run(*options):
        command = [sys.executable, "-m", "steep.cli", "train", str(recipe), *options]
        return subprocess.run(command, capture_output=True, text=True)

    shown = run("--plan", "--gpu", "h100", "--gpus", "2", "precision=bfloat16")
    assert shown.returncode == 0, shown.stderr
    for expected in ("optimizer state", "gathered weights", "tokens trained on", "MFU", "all gather", "per h100, 2"):
        assert expected in shown.stdout
    assert not (tmp_path / "out").exists()
    refused = run("--plan", "--gpu", "h1")
    assert (refused.returncode, "gpu: 'h1' is not known; allowed: a100" in refused.stderr) == (2, True)


def test_plan_of_a_recipe(tmp_path):
    values = make_recipe(tmp_path)
    plan = make_plan(parse_recipe(values))
    assert (plan.gpu, plan.time, plan.steps) == (None, None, 12)
    assert 0 < plan.targets < 4 * 64
    assert make_plan(parse_recipe(values | {"recompute": "full"})).memory.total < plan.memory.total
    with pytest.raises(ValueError, match="micro batches over 3 processes"):
        make_plan(parse_recipe(values), "h100", 3)
    with pytest.raises(ValueError, match="optimizer.offload: works in one process only"):
        make_plan(parse_recipe(values | {"optimizer": {"offload": True}}), "h100", 2)
    with pytest.raises(ValueError, match="float8: a a100 has none"):
        make_plan(parse_recipe(values | {"float8": "rowwise"}), "a100")


def test_tables_and_units():
    assert len({gpu.name for gpu in GPUS.values()}) == len(GPUS)
    assert [bytes_text(size) for size in (12, 1234, 5.6e6, 7.89e10)] == ["12 B", "1.23 kB", "5.60 MB", "78.90 GB"]
