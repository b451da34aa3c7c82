"""Work counted against brute force, the metrics file, late figures."""

import json
import math

import numpy as np
import pytest
import torch

from steep.engine.config import ModelConfig
from steep.engine.metrics import LateFigures, MetricsFile, peak_flops, peak_memory_bytes, read_metrics, training_flops
from steep.engine.model import Decoder


@pytest.mark.parametrize(("window", "active"), [(None, None), (5, None), (None, 2)])
def test_training_flops_count_every_product(window, active):
    """Of a mixture of 3 experts, the products of the 2 that a token goes to."""
    mixture = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": active} if active else {}
    config = ModelConfig.from_dict(
        {
            "model_type": "mistral",
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": window,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
        | mixture
    )
    lengths = np.array([1, 4, 9, 20])
    with torch.device("meta"):
        decoder = Decoder(config)
    matrices = {name: p for name, p in decoder.named_parameters() if p.dim() == 2 and "embed" not in name}
    weights = sum(m.numel() // 3 * active if ".experts." in name else m.numel() for name, m in matrices.items())
    pairs = sum(
        1
        for length in lengths
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    )
    # a weight: one multiplication and addition forward, two backward; a pair: q k and p v, both likewise
    expected = 6 * weights * lengths.sum() + 3 * 3 * pairs * 2 * 2 * 4 * 8
    assert training_flops(config, lengths) == expected


def test_no_peak_on_a_cpu():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert peak_memory_bytes(torch.device("cpu")) > 50e6


def test_late_figures():
    assert LateFigures(torch.tensor([1.5, 2.0])).get() == [1.5, 2.0]


def test_metrics_file_resumes_where_the_weights_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, -1)
    metrics.write("validation", 0, losses={"a": 3.0})
    for step in (1, 2, 3):
        metrics.write("train", step, loss=float(step), losses={"a": math.nan}, grad_norm=math.inf)
    metrics.close()
    with open(path, "a") as file:
        file.write('{"event": "train", "step": 4, "los')  # killed while writing

    metrics = MetricsFile(path, 2)
    assert metrics.dropped == 2
    metrics.write("train", 3, loss=30.0)
    metrics.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["event"], record["step"]) for record in records] == [
        *[("validation", 0), ("train", 1), ("train", 2), ("train", 3)]
    ]
    assert records[1] == {"event": "train", "step": 1, "loss": 1.0, "losses": {"a": None}, "grad_norm": None}
    assert [record["loss"] for record in read_metrics(path, "train")] == [1.0, 2.0, 30.0]

    MetricsFile(path, -1).close()
    assert path.read_text() == ""


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", -1, tensorboard=True)
    metrics.write("train", 1, loss=2.0, losses={"a": 2.0})
    metrics.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
