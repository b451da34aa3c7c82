"""`steep bench ranks` on a tiny model: two processes together have the losses of a process alone."""

import pytest

from steep.bench import ranks
from tests.engine.tiny_run import make_model


def test_processes_together_and_alone(tmp_path):
    figures = ranks.run(make_model(tmp_path / "model"), seq_len=64, sequences=2, warmup=1, steps=2, rounds=1)
    assert figures["together_against_alone"] > 0
    together, alone = figures["together"]["losses"], figures["alone"]["losses"]
    for rank in (0, 1):  # the first step begins from the same weights; later ones have learnt from twice the data
        assert together[rank][0] == pytest.approx(alone[rank][0], rel=1e-5)
        assert together[rank][2] != alone[rank][2]
