"""`steep merge report`: the figures of a merge (analysis.py) in one HTML file: heat maps, layers across, roles down.

The page needs no scripts and no network. Colours differ in lightness first, so that they are told apart without colour
vision and in print: cividis (Nunez et al. 2018, https://doi.org/10.1371/journal.pone.0199239) for sizes, blue to orange
for what has a sign; every number is also written, on hover and in a table. Writes one file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.files import atomic_write
from ..engine.safetensors_io import dtype_name
from .analysis import analyse, is_out_of_bounds
from .plan_view import plan_file

CIVIDIS = ("#00204c", "#213d6b", "#555b6c", "#7b7a77", "#a59c74", "#d3c064", "#ffe945")
BLUE_ORANGE = ("#2166ac", "#92c5de", "#f7f7f7", "#fdb863", "#b35806")

Get = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class Cell:
    """One square. `mark` is written in it, so that what it says does not hang on colour; None: there is no value."""

    where: str
    text: str
    colour: str
    ink: str
    mark: str


@dataclass(frozen=True)
class HeatMap:
    """rows: (role, a cell for each column or None). gradient: colours from `low` to `high`, by `scale`."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    gradient: str
    low: str
    high: str
    scale: str


def report_file(
    config: str | Path, out: str | Path, result: str | Path | None = None, figures: str | Path | None = None
) -> dict[str, Any]:
    """Analyse the merge that a YAML file describes, and publish the page at `out` and the figures as JSON.

    Returns and raises as `analysis.analyse`; a configuration that cannot be planned as `plan_file`.
    """
    plan = plan_file(config)
    found = analyse(plan, result)
    dtypes = dict.fromkeys(dtype_name(tensor.dtype) for tensor in plan.tensors)
    values = sum(tensor.numel for tensor in plan.tensors)
    about = {
        "configuration": str(config),
        "result": "not made yet, or not given" if result is None else str(result),
        "size": f"{len(plan.tensors)} tensors, {values:,} values, written as {', '.join(dtypes)}",
    }
    about |= {f"note {number}": text for number, text in enumerate((*plan.warnings, *plan.notes), 1)}
    write_report(found, about | {"configuration as written": Path(config).read_text(encoding="utf-8")}, out)
    if figures is not None:
        atomic_write(figures, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return found


def write_report(found: Mapping[str, Any], about: Mapping[str, str], out: str | Path) -> Path:
    """Render the figures of `analysis.analyse` and publish the page at `out`.

    Args:
        about: what else stands at the head of the page, by name: configuration, numbers, dtype.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, render(found, about))
    return out


def render(found: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """The HTML page; a pure function of its arguments."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    return environment.get_template("merge_report.html").render(
        found=found, about=about, names=short_names(found["models"]), maps=heat_maps(found)
    )


def short_names(models: Mapping[str, str]) -> dict[str, str]:
    """{number: "number: last part of the folder's path"}."""
    return {key: f"{key}: {'+'.join(Path(part).name for part in label.split('+'))}" for key, label in models.items()}


def heat_maps(found: Mapping[str, Any]) -> list[HeatMap]:
    """All the maps that the figures have something for."""
    names = short_names(found["models"])
    involved = list(found["all"]["models"])
    base = "the base" if found["based"] else "the first model listed, as the method has no base"
    maps = []
    for model in involved:
        what = f"Model {names[model]}"
        norm = _of_model(model, "relative_norm")
        maps += [
            _map(found, f"{what}: length of the task vector", f"|delta| / |B|, B being {base}. "
                 "!: out of the bounds of siblings.", norm, "log", mark=_alarm(model)),
            _map(found, f"{what}: lost by rounding", "Error of rounding B + w delta once to the dtype of the result, "
                 "as a share of |w delta|; w is the strength that the configuration gives the model, before signs are "
                 "elected or elements dropped.", _of_model(model, "lost"), "log"),
            _map(found, f"{what}: changes that vanish", "Share of the changed elements that are the base again after "
                 "that rounding.", _of_model(model, "vanished"), "share"),
            _map(found, f"{what}: kept after trimming", "Norm of the elements that the configured density (and gamma) "
                 "keeps, as a share of |delta|; to within a hundredth.", _of_model(model, "kept_norm"), "share"),
        ]  # fmt: skip
    for pair in found["all"].get("cosines", ()):
        title = f"Cosine of the task vectors {' and '.join(names[model] for model in pair.split('-'))}"
        maps.append(_map(found, title, "1: one direction, 0: at right angles, -1: opposite.",
                         _pair(pair), "signed"))  # fmt: skip
    if len(involved) > 1:
        maps.append(_map(found, "Sign conflict", "Share of elements that models change in opposite directions, among "
                         "those that two or more of them change; half for independent changes of two.",
                         lambda cell: cell.get("sign_conflict"), "share"))  # fmt: skip
    if "slerp" in found["all"]:
        maps.append(_map(found, "Slerp: angle in degrees", "Of several tensors the largest. L: the angle is so small "
                         "(|cosine| over 0.9995) that some or all of them are interpolated on the straight line.",
                         lambda cell: cell.get("slerp", {}).get("angle"), "linear",
                         mark=lambda cell: "L" if cell["slerp"]["straight"] else ""))  # fmt: skip
    if "result" in found["all"]:
        maps.append(_map(found, "Result: length of its task vector", "|R - B| / |B|.",
                         lambda cell: cell["result"]["relative_norm"], "log"))  # fmt: skip
        for model in involved:
            maps.append(_map(found, f"Result: cosine of its task vector and that of {names[model]}", "",
                             _with_result(model), "signed"))  # fmt: skip
    return [each for each in maps if each is not None]


def _of_model(model: str, figure: str) -> Get:
    return lambda cell: cell["models"].get(model, {}).get(figure)


def _alarm(model: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda cell: "!" if is_out_of_bounds(cell["models"][model]) else ""


def _pair(models: str) -> Get:
    return lambda cell: cell.get("cosines", {}).get(models)


def _with_result(model: str) -> Get:
    return lambda cell: cell["result"]["cosines"].get(model)


def _map(
    found: Mapping[str, Any],
    title: str,
    about: str,
    get: Get,
    scale: str,
    mark: Callable[[Mapping[str, Any]], str] = lambda cell: "",
) -> HeatMap | None:
    """A heat map of one figure; None if no cell has it.

    Args:
        scale: "linear" from 0 to the largest; "share" from 0 to 1; "signed" from -1 to 1; "log" from the smallest to
            the largest that are not 0.
    """
    values = {(cell["role"], cell["layer"]): (get(cell), cell) for cell in found["cells"]}
    present = [value for value, _ in values.values() if value is not None]
    if not present:
        return None
    columns = tuple(dict.fromkeys(cell["layer"] for cell in found["cells"]))
    roles = dict.fromkeys(cell["role"] for cell in found["cells"])
    colours = BLUE_ORANGE if scale == "signed" else CIVIDIS
    low, high = _range(present, scale)
    show = percent if scale == "share" else number
    rows = []
    for role in roles:
        cells: list[Cell | None] = []
        for layer in columns:
            value, figures = values.get((role, layer), (None, {}))
            if value is None:
                cells.append(None)
                continue
            colour = blend(colours, _position(value, low, high, scale))
            where = f"{role}, {'layer ' if layer != 'outside' else ''}{layer}"
            cells.append(Cell(where, show(value), colour, ink_on(colour), mark(figures)))
        if any(cells):
            rows.append((role, tuple(cells)))
    return HeatMap(title, about, columns, tuple(rows), ", ".join(colours), show(low), show(high), scale)


def _range(present: Sequence[float], scale: str) -> tuple[float, float]:
    if scale == "signed":
        return -1.0, 1.0
    if scale == "share":
        return 0.0, 1.0
    positive = [value for value in present if value > 0]
    return (min(positive, default=0.0) if scale == "log" else 0.0), max(present)


def _position(value: float, low: float, high: float, scale: str) -> float:
    """In [0, 1] along the colours; a log scale's 0 lies at its beginning."""
    if scale == "log":
        if value <= low or low <= 0:
            return 0.0
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def blend(colours: Sequence[str], position: float) -> str:
    """The colour at a position in [0, 1] between colours at equal distances; #rrggbb."""
    place = position * (len(colours) - 1)
    left = min(int(place), len(colours) - 2)
    share = place - left
    pairs = zip(_channels(colours[left]), _channels(colours[left + 1]))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in _channels(colour))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _channels(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def number(value: float | None) -> str:
    """Three digits; a dash for what there is not."""
    return "–" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"
