"""`steep bench data` runs and reports figures that belong together; how large they are is no test's business."""

import json
from pathlib import Path

import pytest

from steep.bench import data
from tests.data.samples import many_texts, write_jsonl


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PACKED_DOCS", 2000)
    file = write_jsonl(tmp_path / "a.jsonl", many_texts(300))
    figures = data.run(files=[file], cores=1, repeats=2)
    json.dumps(figures)
    tokenizing, packing = figures["tokenizing"], figures["packing"]
    assert tokenizing["documents"] == 302
    assert tokenizing["library"].startswith("tokenizers ")
    assert len(tokenizing["steep_over_raw_pairs"]) == 2
    assert tokenizing["steep_mb_per_s"]["min"] <= tokenizing["steep_mb_per_s"]["median"]
    assert packing["documents"] == 2000
    assert packing["best_fit_4096"]["padding_percent"] < 5
