"""Searches whose optimum is known: found, written, confirmed or not, gone on with after a kill, never mixed up."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from steep.engine.model import Decoder
from steep.merge.search import pareto_front, search
from tests.merge.models import random_tensors, read_model, sibling, write_model

pytestmark = pytest.mark.usefixtures("one_thread")
NORM, QUERY, GATE = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
HERE = "tests.merge.test_search"


# Objectives that read a merge's strengths from weights that are 0 (the norm 1) in the base and 1 (2) in the model `a`.


def strength(decoder: Decoder) -> float:
    return decoder.norm.weight[0].item() - 1


def far_from_0_7(decoder: Decoder) -> float:
    return (strength(decoder) - 0.7) ** 2


def far_from_0_6(decoder: Decoder) -> float:
    return (strength(decoder) - 0.6) ** 2


def near_0_3(decoder: Decoder) -> float:
    return -((strength(decoder) - 0.3) ** 2)


def bowl(decoder: Decoder) -> float:
    """Of two strengths, least at (0.7, 0.2), and drawing from the generator that others use too."""
    np.random.rand()  # noqa: NPY002
    layer: Any = decoder.layers[0]
    attention, mlp = layer.qkv.weight[0, 0].item(), layer.gate_up.weight[0, 0].item()
    return (attention - 0.7) ** 2 + 2 * (mlp - 0.2) ** 2 + (attention - 0.7) * (mlp - 0.2)


def nan_beyond_one(decoder: Decoder) -> float:
    return far_from_0_7(decoder) if strength(decoder) <= 1 else float("nan")


def always_nan(decoder: Decoder) -> float:
    return float("nan") if strength(decoder) else 0.0


def broken(decoder: Decoder) -> float:
    raise RuntimeError("no such question")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    base = random_tensors(0)
    a, b = sibling(base, 1), sibling(base, 2)
    for tensors, value in ((base, 0.0), (a, 1.0), (b, 0.0)):
        tensors[NORM] = torch.full_like(base[NORM], 1 + value)
        for name in (QUERY, GATE):
            tensors[name] = tensors[name].clone()
            tensors[name][0, 0] = value
    for name, tensors in {"base": base, "a": a, "b": b}.items():
        write_model(folder / name, tensors)
    return folder


def entry(name: str, direction: str = "min", held_out: str = "far_from_0_6") -> dict[str, str]:
    return {"callable": f"{HERE}:{name}", "direction": direction, "held_out": f"{HERE}:{held_out}"}


def write_search(models: Path, name: str = "search.yml", **changes: Any) -> Path:
    models_of_merge = [{"model": "a", "parameters": {"weight": 1.0}}]
    config: dict[str, Any] = {
        "merge": {"merge_method": "task_arithmetic", "base_model": "base", "models": models_of_merge},
        "space": {"lambda": {"range": [0, 1.5], "points": 16}},
        "strategy": "grid",
        "objectives": {"domain": entry("far_from_0_7"), "general": entry("strength", "min", "far_from_0_7")},
        "choose": {"general_weight": 0},
    }
    path = models / name
    path.write_text(yaml.safe_dump(config | changes, sort_keys=False))
    return path


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def chosen(record: dict[str, Any]) -> dict[str, Any]:
    return next(line for line in record["evaluations"] if line["number"] == record["chosen"])


def test_a_grid_finds_the_optimum_and_writes_it(models: Path, tmp_path: Path) -> None:
    told: list[str] = []
    record = search(write_search(models), tmp_path / "out", log=told.append)
    best = chosen(record)
    assert best["point"] == {"lambda": 0.7}
    assert best["domain"] == pytest.approx(0, abs=1e-12)
    assert best["gain"] == pytest.approx(0.49)
    assert best["loss"] == pytest.approx(0.7)
    assert [line["point"]["lambda"] for line in record["evaluations"]] == pytest.approx(np.arange(16) / 10)
    assert record["figures"] == {"evaluations": 16, "failed": 0}
    assert record["front"] == list(range(1, 9))  # from 0 to 0.7 more gain costs more, beyond it gain falls
    merged = read_model(tmp_path / "out" / "model")
    assert merged[NORM][0].item() == pytest.approx(1.7)
    assert record["confirmation"]["reference"] == pytest.approx({"domain": 0.36, "general": 0.49})
    assert record["confirmation"]["gain"] == pytest.approx(0.35)
    assert record["confirmation"]["confirmed"] is True
    assert record["verdict"].startswith("confirmed: domain gain 0.49 on the search's data, 0.35 on held-out data")
    assert json.loads((tmp_path / "out" / "search.json").read_text()) == record
    page = (tmp_path / "out" / "search.html").read_text()
    drawing = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert Counter(circle.get("class") for circle in drawing.iter("circle")) == {
        "front": 8, "point": 8, "chosen-mark": 1,
    }  # fmt: skip
    assert "lambda = 0.7: gain 0.49, loss 0.7" in page
    assert "16/16 lambda = 1.5: domain 0.64 (gain -0.15), general 1.5 (loss +1.5)" in told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluations.jsonl", "model", "search.html", "search.json",
    ]  # fmt: skip


def test_golden_section_finds_the_optimum(models: Path, tmp_path: Path) -> None:
    path = write_search(models, space={"parameters.lambda": [0, 1.5]}, strategy="golden", budget=14)
    record = search(path, tmp_path / "out")
    assert record["figures"]["evaluations"] == 14
    assert abs(chosen(record)["point"]["parameters.lambda"] - 0.7) < 1.5 * 0.618**12


def test_golden_section_for_every_method(models: Path, tmp_path: Path) -> None:
    space = {"merge_method": ["task_arithmetic", "ties"], "lambda": [0, 1.5]}
    record = search(write_search(models, space=space, strategy="golden", budget=9), tmp_path / "out")
    methods = [line["point"]["merge_method"] for line in record["evaluations"]]
    assert methods == ["task_arithmetic"] * 5 + ["ties"] * 4


def test_cmaes_finds_the_optimum_in_two_dimensions(models: Path, tmp_path: Path) -> None:
    space = {"weight[self_attn]": [0, 1], "weight[mlp]": [0, 1]}
    merge = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "a"}]}
    merge["parameters"] = {"weight": 1.0}
    objectives = {"domain": entry("bowl"), "general": entry("strength", "min", "far_from_0_7")}
    path = write_search(models, merge=merge, space=space, strategy="cmaes", budget=90, objectives=objectives, seed=3)
    record = search(path, tmp_path / "out")
    point = chosen(record)["point"]
    assert abs(point["weight[self_attn]"] - 0.7) < 0.03
    assert abs(point["weight[mlp]"] - 0.2) < 0.03
    np.random.seed(5)  # noqa: NPY002
    again = search(path, tmp_path / "again")
    assert [line["point"] for line in again["evaluations"]] == [line["point"] for line in record["evaluations"]]


def test_a_bound_on_the_general_loss(models: Path, tmp_path: Path) -> None:
    """Golden section walks up to the bound, and no further."""
    path = write_search(
        models, space={"lambda": [0, 1.5]}, strategy="golden", budget=14, choose={"max_general_loss": 0.4}
    )
    record = search(path, tmp_path / "out")
    best = chosen(record)
    assert best["loss"] <= 0.4
    assert best["point"]["lambda"] == pytest.approx(0.4, abs=0.01)
    assert record["allowed_loss"] == 0.4


def test_a_bound_in_percent_of_the_reference(models: Path, tmp_path: Path) -> None:
    objectives = {"domain": entry("far_from_0_7"), "general": entry("near_0_3", "max", "far_from_0_7")}
    path = write_search(models, objectives=objectives, choose={"max_general_loss": "70%"})
    record = search(path, tmp_path / "out")
    assert record["allowed_loss"] == pytest.approx(0.7 * 0.09)
    assert record["reference"]["general"] == pytest.approx(-0.09)
    assert chosen(record)["point"] == {"lambda": 0.6}  # which loses nothing, 0.7 loses 0.07


def test_no_point_within_the_bound(models: Path, tmp_path: Path) -> None:
    path = write_search(models, choose={"max_general_loss": -0.5})
    record = search(path, tmp_path / "out")
    assert record["chosen"] is None
    assert record["verdict"].startswith("no point loses at most -0.5 on the general set; the least loss is 0;")
    assert not (tmp_path / "out" / "model").exists()


def test_a_search_that_has_fitted_its_own_data_is_called_so(models: Path, tmp_path: Path) -> None:
    objectives = {"domain": entry("far_from_0_7", held_out="strength"), "general": entry("near_0_3", "max")}
    objectives["general"]["held_out"] = f"{HERE}:far_from_0_7"
    record = search(write_search(models, objectives=objectives), tmp_path / "out")
    assert record["confirmation"]["confirmed"] is False
    assert record["confirmation"]["gain"] == pytest.approx(-0.7)
    assert record["verdict"].startswith("not confirmed: domain gain 0.49 on the search's data, -0.7 on held-out data")
    assert record["verdict"].endswith("the search has fitted its own data")


def test_filters_go_before_what_the_configuration_says(models: Path, tmp_path: Path) -> None:
    space = {"models.0.parameters.weight[self_attn]": [0.25], "models.0.parameters.weight[mlp]": {"choices": [0.5]}}
    search(write_search(models, space=space), tmp_path / "out")
    merged = read_model(tmp_path / "out" / "model")
    assert merged[QUERY][0, 0].item() == 0.25
    assert merged[GATE][0, 0].item() == 0.5
    assert merged[NORM][0].item() == 2
    config = json.loads((tmp_path / "out" / "model" / "merge.json").read_text())["config"]
    assert config["models"][0]["parameters"]["weight"] == [
        {"filter": "self_attn", "value": 0.25}, {"filter": "mlp", "value": 0.5}, {"value": 1.0},
    ]  # fmt: skip


def test_points_without_a_number_are_counted_and_shown(models: Path, tmp_path: Path) -> None:
    objectives = {"domain": entry("nan_beyond_one"), "general": entry("strength", "min", "far_from_0_7")}
    told: list[str] = []
    record = search(write_search(models, objectives=objectives), tmp_path / "out", log=told.append)
    assert record["figures"] == {"evaluations": 16, "failed": 5}
    assert "5 of 16 points failed, as the record says of each" in told
    assert record["evaluations"][15]["error"] == "domain is nan"
    assert record["evaluations"][15]["domain"] is None
    assert record["evaluations"][15]["general"] == pytest.approx(1.5)
    assert chosen(record)["point"] == {"lambda": 0.7}
    assert "domain is nan" in (tmp_path / "out" / "search.html").read_text()


def test_points_that_cannot_be_merged_are_counted(models: Path, tmp_path: Path) -> None:
    merge = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]}
    space = {"models.0.parameters.weight": {"range": [-0.5, 0.5], "points": 3}}
    record = search(write_search(models, merge=merge, space=space, reference="base"), tmp_path / "out")
    assert record["figures"] == {"evaluations": 3, "failed": 1}
    assert "sum to 0 under normalize" in record["evaluations"][0]["error"]


def test_nothing_but_failures(models: Path, tmp_path: Path) -> None:
    objectives = {"domain": entry("always_nan"), "general": entry("strength", "min", "far_from_0_7")}
    space = {"lambda": [0.5, 0.6, 0.7]}
    with pytest.raises(ValueError, match="none of 3 points could be evaluated; the first: domain is nan"):
        search(write_search(models, objectives=objectives, space=space), tmp_path / "out")


def test_an_error_of_an_objective_names_it(models: Path, tmp_path: Path) -> None:
    objectives = {"domain": entry("broken"), "general": entry("strength", "min", "far_from_0_7")}
    with pytest.raises(RuntimeError, match="no such question") as caught:
        search(write_search(models, objectives=objectives), tmp_path / "out")
    assert caught.value.__notes__ == ["raised by objectives.domain (search data)"]


KILLED = """
import os, signal, sys
from steep.merge.search import search
from steep.merge.search_journal import SearchJournal
add, calls = SearchJournal.add, []
def killing(self, *arguments):
    line = add(self, *arguments)
    calls.append(line)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return line
SearchJournal.add = killing
search(sys.argv[1], sys.argv[2])
"""
MEASURES = """
import os
def strength(decoder):
    with open(os.path.join(os.path.dirname(__file__), "calls.txt"), "a") as file:
        file.write("x")
    return decoder.norm.weight[0].item() - 1
def domain(decoder): return (strength(decoder) - 0.7) ** 2
def held_out(decoder): return (strength(decoder) - 0.6) ** 2
def general(decoder): return decoder.norm.weight[0].item()
def general_held_out(decoder): return decoder.norm.weight[1].item()
"""


@pytest.fixture
def killable(models: Path) -> Iterator[Path]:
    """A search whose objectives lie beside it and write down that they were called."""
    (models / "measures_of_kill.py").write_text(MEASURES)
    objectives = {
        name: {"callable": f"measures_of_kill:{seen}", "direction": "min", "held_out": f"measures_of_kill:{other}"}
        for name, seen, other in (("domain", "domain", "held_out"), ("general", "general", "general_held_out"))
    }
    yield write_search(
        models, "killed.yml", objectives=objectives, space={"lambda": [0, 1.5]}, strategy="golden", budget=8
    )
    (models / "calls.txt").unlink(missing_ok=True)


def interrupt(path: Path, out: Path, evaluations: int) -> None:
    """A search that ends after so many points."""

    def log(line: str) -> None:
        if line.startswith(f"{evaluations}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(path, out, log=log)


def calls(models: Path) -> int:
    return len((models / "calls.txt").read_text())


def comparable(record: dict[str, Any]) -> Any:
    evaluations = [{key: v for key, v in line.items() if key != "seconds"} for line in record["evaluations"]]
    return evaluations, record["front"], record["chosen"], record["confirmation"], record["verdict"]


def test_a_killed_search_is_gone_on_with(models: Path, tmp_path: Path, killable: Path) -> None:
    expected = search(killable, tmp_path / "expected")
    assert calls(models) == 1 + 8 + 2
    (models / "calls.txt").unlink()
    out, done = tmp_path / "out", 0
    for more in (5, 5):  # the reference and points; then up to the first of two evaluations of held-out data
        run = subprocess.run([sys.executable, "-c", KILLED, killable, out, str(more)], env=os.environ, check=False)
        assert run.returncode == -signal.SIGKILL
        done += more
        assert len(lines(out)) == 1 + done
    with open(out / "evaluations.jsonl", "a") as file:
        file.write('{"set": "sea')
    record = search(killable, out)
    assert calls(models) == 1 + 8 + 2
    assert record["taken_over"] == 10
    assert comparable(record) == comparable(expected)
    assert len(lines(out)) == 12


def test_another_budget_goes_on(models: Path, tmp_path: Path, killable: Path) -> None:
    out = tmp_path / "out"
    interrupt(killable, out, 5)
    record = search(killable, out, budget=10)
    assert record["taken_over"] == 6
    assert record["figures"]["evaluations"] == 10


def test_a_model_that_is_not_the_winner_any_more_is_made_again(
    models: Path, tmp_path: Path, killable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the model was written; then gone on with for longer, which finds a better point."""
    out = tmp_path / "out"

    def interrupted(*arguments: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sys.modules["steep.merge.search"], "verdict", interrupted)
        search(killable, out)
    first = read_model(out / "model")[NORM][0].item() - 1
    told: list[str] = []
    record = search(killable, out, budget=12, log=told.append)
    best = chosen(record)["point"]["lambda"]
    assert abs(best - 0.7) < abs(first - 0.7)
    assert read_model(out / "model")[NORM][0].item() - 1 == pytest.approx(best, abs=1e-6)
    assert record["taken_over"] == 1 + 8 + 2


@pytest.mark.parametrize("change", ["space", "seed", "objectives", "inputs"])
def test_a_changed_search_is_refused(models: Path, tmp_path: Path, killable: Path, change: str) -> None:
    out = tmp_path / "out"
    interrupt(killable, out, 2)
    config = yaml.safe_load(killable.read_text())
    if change == "space":
        config["space"] = {"lambda": [0, 1.4]}
    elif change == "seed":
        config["seed"] = 1
    elif change == "objectives":
        config["objectives"]["domain"]["direction"] = "max"
    else:
        os.utime(models / "a" / "model.safetensors")
    killable.write_text(yaml.safe_dump(config))
    before = (out / "evaluations.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"evaluations.jsonl: is of another search: {change} differ; choose another"):
        search(killable, out)
    assert (out / "evaluations.jsonl").read_bytes() == before


def test_outputs_that_are_not_free(models: Path, tmp_path: Path) -> None:
    path = write_search(models)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(FileExistsError, match="full: already exists and is not empty"):
        search(path, tmp_path / "full")
    with pytest.raises(ValueError, match="lies in the input"):
        search(path, models / "a" / "out")
    search(path, tmp_path / "out")
    with pytest.raises(FileExistsError, match="out: holds a finished search"):
        search(path, tmp_path / "out")


def test_an_input_that_changes_meanwhile_is_noticed(models: Path, tmp_path: Path) -> None:
    """What is written must be what was measured."""
    folder = tmp_path / "models"
    base = random_tensors(0)
    write_model(folder / "base", base)
    write_model(folder / "a", base | {NORM: base[NORM] + 1})

    def change(line: str) -> None:
        if line.startswith("chosen"):
            (folder / "a" / "model.safetensors").unlink()
            (folder / "a" / "config.json").unlink()
            (folder / "a").rmdir()
            write_model(folder / "a", base | {NORM: base[NORM] + 0.5})

    with pytest.raises(ValueError, match="other weights than those that were measured"):
        search(write_search(folder), tmp_path / "out", log=change)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), max_size=12))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(i: int) -> bool:
        return any(g >= points[i][0] and loss <= points[i][1] and (g, loss) != points[i] for g, loss in points)

    expected = [i for i in range(len(points)) if not dominated(i)]
    front = pareto_front([(float(g), float(loss)) for g, loss in points])
    assert sorted(front) == expected
    assert all(points[i] <= points[j] for i, j in itertools.pairwise(front))
