"""The data section of a recipe: what does not make sense is refused with its place."""

from typing import Any

import pytest
from pydantic import ValidationError

from steep.data.config import DataConfig


def config(**changes: Any) -> dict[str, Any]:
    return {"sources": [{"name": "a", "store": "stores/a"}], "seq_len": 512, **changes}


def source(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "store": f"stores/{name}", **changes}


def test_defaults() -> None:
    data = DataConfig.model_validate(config())
    assert (data.packing, data.seed, data.phases, data.validation) == ("best_fit", 0, [], [])
    assert (data.sources[0].weight, data.sources[0].max_epochs) == (1.0, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(sequence_length=5), "sequence_length\n.*Extra inputs are not permitted"),
        (config(sources=[source("a", wieght=2)]), "sources.0.wieght\n.*Extra inputs are not permitted"),
        (config(sources=[]), "sources\n.*at least 1 item"),
        (config(seq_len=1), "seq_len\n.*greater than or equal to 2"),
        (config(seq_len="long"), "seq_len\n.*valid integer"),
        (config(packing="tight"), "packing\n.*'best_fit' or 'concat'"),
        (config(sources=[source("a", weight=-1)]), "sources.0.weight\n.*greater than or equal to 0"),
        (config(sources=[source("a", weight=float("nan"))]), "sources.0.weight\n.*finite"),
        (config(sources=[source("a", max_epochs=0)]), "sources.0.max_epochs\n.*greater than 0"),
        (config(sources=[source("a"), source("a")]), "sources: the name 'a' is given twice"),
        (config(validation=[source("v"), source("v")]), "validation: the name 'v' is given twice"),
        (config(sources=[source("a", weight=0)]), "every weight is 0"),
        (config(phases=[{"start": 0, "weights": {"a": 1}}]), "phases.0.start\n.*greater than or equal to 1"),
        (config(phases=[{"start": 9, "weights": {"b": 1}}]), "no source is named 'b'; sources are a"),
        (config(phases=[{"start": 9, "weights": {"a": 0}}]), "at 9 every weight is 0"),
        (config(phases=[{"start": 9, "weights": {"a": 1}}] * 2), "must start later and later"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(given)
