"""`steep merge report`: figures against plain torch, whatever the pieces; alarms; a page that stands alone."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steep.cli.app import app
from steep.merge import MergePlan, merge, parse_config, plan_merge, slerp, trim, trim_outliers
from steep.merge.analysis import analyse, is_straight, strengths
from steep.merge.report import blend, ink_on
from tests.merge.models import random_tensors, read_model, sibling, write_model, write_yaml

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    base = random_tensors(0)
    models = {"base": base, "a": sibling(base, 1), "b": sibling(base, 2), "<far>": sibling(base, 3, 0.015)}
    for name, tensors in (models | {"stranger": random_tensors(9)}).items():
        write_model(folder / name, tensors, dtype=torch.bfloat16)
    mixed = read_model(folder / "a") | {UP_PROJ: random_tensors(9)[UP_PROJ].bfloat16()}
    write_model(folder / "mixed", mixed, dtype=torch.bfloat16)
    return folder


def ties(a: str = "a", b: str = "b", **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": a, "parameters": {"weight": 0.6, "density": 0.3}},
            {"model": b, "parameters": {"weight": 0.2, "density": 0.5}},
        ],
    } | changes


def plan(folder: Path, config: dict[str, Any]) -> MergePlan:
    return plan_merge(parse_config(config), folder)


def vectors(folder: Path, name: str | list[str], *models: str) -> list[torch.Tensor]:
    names = [name] if isinstance(name, str) else name
    return [torch.cat([read_model(folder / m)[n].double().flatten() for n in names]) for m in models]


def by_name(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in found["tensors"] if entry["name"] == name)


def test_figures_are_those_of_plain_torch(folder: Path) -> None:
    found = analyse(plan(folder, ties()))
    names = list(read_model(folder / "base"))
    cell = next(c for c in found["cells"] if (c["layer"], c["role"]) == ("1", "mlp.up_proj"))
    layer = next(entry for entry in found["layers"] if entry["layer"] == "1")
    role = next(entry for entry in found["roles"] if entry["role"] == "mlp.up_proj")
    sets = [
        (found["all"], names),
        (layer, [name for name in names if ".layers.1." in name]),
        (role, [name for name in names if "up_proj" in name]),
        (cell, [UP_PROJ]),
        (by_name(found, UP_PROJ), [UP_PROJ]),
    ]
    for figures, group in sets:
        base, a, b = vectors(folder, group, "base", "a", "b")
        for number, model in (("0", a), ("1", b)):
            own = figures["models"][number]
            assert own["relative_norm"] == pytest.approx(float((model - base).norm() / base.norm()), rel=1e-6)
            cosine = float(model @ base / model.norm() / base.norm())
            assert own["base_cosine"] == pytest.approx(cosine, abs=1e-6)
            assert own["zeros"] == float((model == base).double().mean())
        cosine = float((a - base) @ (b - base) / (a - base).norm() / (b - base).norm())
        assert figures["cosines"]["0-1"] == pytest.approx(cosine, abs=1e-6)
        both = ((a - base) * (b - base)).sign()
        assert figures["sign_conflict"] == pytest.approx(float((both < 0).sum() / (both != 0).sum()))


def test_what_is_lost_by_rounding(folder: Path) -> None:
    base, a = vectors(folder, UP_PROJ, "base", "a")
    change = 0.6 / 0.8 * (a - base)
    rounded = (base + change).bfloat16().double()
    own = by_name(analyse(plan(folder, ties())), UP_PROJ)["models"]["0"]
    assert own["lost"] == pytest.approx(float((rounded - base - change).norm() / change.norm()), rel=1e-5)
    assert own["vanished"] == float(((rounded == base) & (change != 0)).sum() / (change != 0).sum())
    wide = by_name(analyse(plan(folder, ties(dtype="float32"))), UP_PROJ)["models"]["0"]
    assert wide["lost"] < 1e-4 < own["lost"]
    assert wide["vanished"] == 0


def test_what_trimming_keeps(folder: Path) -> None:
    base, a, b = vectors(folder, UP_PROJ, "base", "a", "b")
    models = by_name(analyse(plan(folder, ties())), UP_PROJ)["models"]
    for number, model, density in (("0", a, 0.3), ("1", b, 0.5)):
        delta = (model - base).float()
        kept = trim(delta, density)
        assert models[number]["kept"] == float((kept != 0).double().mean())
        assert models[number]["kept_norm"] == pytest.approx(float(kept.norm() / delta.norm()), rel=0.01)
    config = ties(merge_method="breadcrumbs", parameters={"gamma": 0.05})
    own = by_name(analyse(plan(folder, config)), UP_PROJ)["models"]["0"]
    kept = trim_outliers((a - base).float(), 0.3, 0.05)
    assert own["kept_norm"] == pytest.approx(float(kept.norm() / (a - base).norm()), rel=0.02)
    assert "kept" not in by_name(analyse(plan(folder, ties(merge_method="dare_ties"))), UP_PROJ)["models"]["0"]


def test_pieces_leave_no_trace(folder: Path, tmp_path: Path) -> None:
    planned = plan(folder, ties())
    assert analyse(planned, piece=4096) == analyse(planned, piece=1 << 20)


def test_the_result(folder: Path, tmp_path: Path) -> None:
    path = write_yaml(folder / "result.yml", ties())
    merge(path, tmp_path / "out", workers=1)
    own = by_name(analyse(plan(folder, ties()), tmp_path / "out"), UP_PROJ)["result"]
    base, a = vectors(folder, UP_PROJ, "base", "a")
    result = read_model(tmp_path / "out")[UP_PROJ].double().flatten()
    assert own["relative_norm"] == pytest.approx(float((result - base).norm() / base.norm()), rel=1e-6)
    assert own["unchanged"] == float((result == base).double().mean())
    cosine = float((result - base) @ (a - base) / (result - base).norm() / (a - base).norm())
    assert own["cosines"]["0"] == pytest.approx(cosine, abs=1e-6)
    with pytest.raises(ValueError, match="no tensor extra"):
        write_model(tmp_path / "more", read_model(folder / "base") | {"extra": torch.ones(2)})
        more = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "more")}]}
        analyse(plan(folder, more), tmp_path / "out")


def test_the_angle_of_slerp_and_where_it_is_a_straight_line(folder: Path) -> None:
    def config(model: str) -> dict[str, Any]:
        return {"merge_method": "slerp", "base_model": "base", "models": [{"model": model}], "parameters": {"t": 0.5}}

    far = analyse(plan(folder, config("<far>")))
    base, other = vectors(folder, UP_PROJ, "base", "<far>")
    angle = by_name(far, UP_PROJ)["slerp"]["angle"]
    assert math.cos(math.radians(angle)) == pytest.approx(float(base @ other / base.norm() / other.norm()), rel=1e-6)
    assert by_name(far, UP_PROJ)["slerp"]["straight"] == 0
    curve = slerp(base.float(), other.float(), 0.5)
    assert not torch.allclose(curve, (0.5 * base + 0.5 * other).float(), rtol=1e-3, atol=0)
    near = analyse(plan(folder, config("a")))
    straight = [entry for entry in near["tensors"] if entry["slerp"]["straight"]]
    assert near["all"]["slerp"]["straight"] == len(straight) > 0
    assert is_straight(1.8) and not is_straight(1.82)  # noqa: PT018  cos = 0.9995 lies between


def test_alarm_when_models_are_no_siblings(folder: Path) -> None:
    assert analyse(plan(folder, ties()))["alarms"] == []
    found = analyse(plan(folder, ties(b="stranger")))
    (alarm,) = found["alarms"]
    assert (alarm["model"], alarm["whole"]) == ("1", True)
    assert alarm["label"] == str(folder / "stranger")
    assert alarm["relative_norm"] > 1.3
    assert abs(alarm["base_cosine"]) < 0.05
    (part,) = analyse(plan(folder, ties(b="mixed")))["alarms"]
    assert (part["whole"], part["tensors"]) == (False, [UP_PROJ])


def test_without_a_base_the_first_model_stands_for_it(folder: Path) -> None:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", 0.4))]
    found = analyse(plan(folder, {"merge_method": "linear", "models": models}))
    a, b = vectors(folder, UP_PROJ, "a", "b")
    assert not found["based"]
    assert list(found["all"]["models"]) == ["1"]
    figures = by_name(found, UP_PROJ)["models"]["1"]
    assert figures["relative_norm"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)


def test_strengths(folder: Path) -> None:
    def of(config: dict[str, Any]) -> list[float]:
        return strengths(plan(folder, config).tensors[0])

    assert of(ties(parameters={"lambda": 0.5})) == pytest.approx([0.375, 0.125])
    assert of(ties(parameters={"normalize": False})) == [0.6, 0.2]
    chat = ties(merge_method="chat_vector", models=[{"model": "a"}, {"model": "b"}], parameters={"scale": 0.3})
    assert of(chat) == [1.0, 0.3]
    assert of(ties(merge_method="model_stock", models=[{"model": "a"}, {"model": "b"}])) == [0.5, 0.5]


def test_slices_of_different_models(folder: Path) -> None:
    slices = [
        {"sources": [{"model": "base", "layer_range": [0, 2]}, {"model": "a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "base", "layer_range": [1, 3]}, {"model": "b", "layer_range": [1, 3]}]},
    ]
    found = analyse(plan(folder, {"merge_method": "slerp", "base_model": "base", "slices": slices,
                                  "parameters": {"t": 0.5}}))  # fmt: skip
    assert list(found["all"]["models"]) == ["1", "2"]
    assert [entry["layer"] for entry in found["layers"]] == ["outside", "0", "1", "2", "3"]
    assert list(found["layers"][1]["models"]) == ["1"]
    assert list(found["layers"][4]["models"]) == ["2"]


def test_not_finite_inputs_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = read_model(folder / "a")
    broken[UP_PROJ][0, 0] = float("nan")
    write_model(tmp_path / "broken", broken, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"broken/model.safetensors: {re.escape(UP_PROJ)} holds NaN"):
        analyse(plan(folder, ties(a=str(tmp_path / "broken"))))


class Page(html.parser.HTMLParser):
    """Tags that are opened and closed in order, what could load something, and the texts on hover."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "srcset") or key.startswith("on")]
        self.titles += [value or "" for key, value in attrs if key == "title"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("kind", ["ties with a result", "slerp", "linear", "passthrough"])
def test_the_page_stands_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    models = [{"model": m, "parameters": {"weight": 0.5}} for m in ("a", "b")]
    configs: dict[str, dict[str, Any]] = {
        "ties with a result": ties(b="stranger"),
        "slerp": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "<far>"}],
                  "parameters": {"t": [0, 0.5, 1]}},
        "linear": {"merge_method": "linear", "models": models},
        "passthrough": {"merge_method": "passthrough", "models": [{"model": "a"}]},
    }  # fmt: skip
    config = write_yaml(folder / "page.yml", configs[kind])
    arguments = ["merge", "report", str(config), "--out", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json")]
    if kind == "ties with a result":
        merge(config, tmp_path / "out", workers=1)
        arguments += ["--result", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in text
    assert "@import" not in text
    assert "<far>" not in text
    figures = json.loads((tmp_path / "r.json").read_text())
    if kind == "ties with a result":
        assert "alarm: model 1" in result.output
        assert "Not a sibling" in text
        assert "Cosine of the task vectors 0: a and 1: stranger" in text
        cell = next(c for c in figures["cells"] if (c["layer"], c["role"]) == ("1", "mlp.up_proj"))
        shown = f"{cell['models']['0']['relative_norm']:.3g}"
        assert f"mlp.up_proj, layer 1: {shown}" in page.titles
        assert text.count(f">{shown}</td>") >= 1  # in a table of numbers too
        assert 'title="mlp.up_proj, layer 1: 1.4">!</td>' in re.sub(r": 1\.[34]\d*\"", ': 1.4"', text)
    if kind == "slerp":
        assert "Slerp: angle in degrees" in text
        assert "&lt;far&gt;" in text


def test_colours_can_be_told_apart_by_lightness() -> None:
    from steep.merge.report import CIVIDIS

    def grey(colour: str) -> float:
        r, g, b = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        return 0.299 * r + 0.587 * g + 0.114 * b

    steps = [grey(blend(CIVIDIS, position / 20)) for position in range(21)]
    assert all(later > earlier + 3 for earlier, later in zip(steps, steps[1:]))
    assert (blend(CIVIDIS, 0), blend(CIVIDIS, 1)) == (CIVIDIS[0], CIVIDIS[-1])
    assert (ink_on("#00204c"), ink_on("#ffe945")) == ("#ffffff", "#000000")
