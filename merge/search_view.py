"""What a search found, for people: tables for the terminal, and one HTML file with the front drawn. Writes nothing.

The plot is SVG made here, so that the file needs nothing beside it: general loss to the right, domain gain upwards,
every point a dot that says its values; the front is a line, what is not allowed lies behind the dashed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .search_config import told

WIDTH, HEIGHT, MARGIN = 760, 460, 64
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color-scheme: light dark }
table { border-collapse: collapse; width: 100% } td, th { padding: .25rem .6rem; text-align: right }
td:first-child, th:first-child, td.text, th.text { text-align: left } tr { border-bottom: 1px solid #8884 }
tr.chosen { font-weight: 600 } tr.failed { color: #888 } svg { width: 100%; height: auto }
.axis { stroke: currentColor; opacity: .35 } .zero { stroke-dasharray: 1 4 } .label { fill: currentColor; font-size: 12px }
.point { fill: #888 } .front { fill: #0a7d6f } .line { stroke: #0a7d6f; fill: none }
.chosen-mark { stroke: #d0541b; fill: none; stroke-width: 2.5 } .limit { stroke: #d0541b; stroke-dasharray: 5 4 }
"""  # noqa: E501


def show_search(record: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The front as a table, and how it ended."""
    reference, figures = record["reference"], record["figures"]
    table = Table(title=f"{figures['evaluations']} evaluations, {figures['failed']} failed; those on the front")
    for column in ("", "point", "domain", "gain", "general", "loss"):
        table.add_column(column, justify="left" if column in ("", "point") else "right")
    table.add_row("reference", reference["model"], _number(reference["domain"]), "", _number(reference["general"]), "")
    for line in _front(record):
        chosen = line["number"] == record["chosen"]
        row = [_number(line[key]) for key in ("domain", "gain", "general", "loss")]
        table.add_row("chosen" if chosen else "", told(line["point"]), *row, style="bold" if chosen else None)
    yield table
    yield Text(record["verdict"])


def html(record: Mapping[str, Any]) -> str:
    """The page."""
    rows = []
    for line in record["evaluations"]:
        kind = "chosen" if line["number"] == record["chosen"] else "failed" if "error" in line else ""
        front = "●" if line["number"] in record["front"] else ""
        cells = [f"<td>{line['number']} {front}</td><td class=text>{escape(told(line['point']))}</td>"]
        if "error" in line:
            cells.append(f"<td class=text colspan=4>{escape(line['error'])}</td>")
        else:
            cells += [f"<td>{_number(line[key])}</td>" for key in ("domain", "gain", "general", "loss")]
        rows.append(f"<tr class='{kind}'>{''.join(cells)}</tr>")
    reference = record["reference"]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Search of a merge</title><style>{STYLE}</style>
<h1>Search of a merge</h1>
<p>{escape(record["verdict"])}</p>
<p>Reference: {escape(reference["model"])}, domain {_number(reference["domain"])}, general {
        _number(reference["general"])
    }. {record["figures"]["evaluations"]} evaluations, {record["figures"]["failed"]} failed.</p>
{plot(record)}
<table><tr><th>● front</th><th class=text>point</th><th>domain</th><th>gain</th><th>general</th><th>loss</th></tr>
{"".join(rows)}</table>
{_confirmation(record)}
</html>
"""


def _confirmation(record: Mapping[str, Any]) -> str:
    """The winner on both sets of data."""
    confirmation = record["confirmation"]
    if confirmation is None:
        return ""
    chosen = next(line for line in record["evaluations"] if line["number"] == record["chosen"])
    rows = "".join(
        f"<tr><td>{name}</td>"
        + "".join(f"<td>{_number(value)}</td>" for value in (base["domain"], line["domain"], line["gain"]))
        + "".join(f"<td>{_number(value)}</td>" for value in (base["general"], line["general"], line["loss"]))
        + "</tr>"
        for name, base, line in (
            ("search", record["reference"], chosen),
            ("held-out", confirmation["reference"], confirmation),
        )
    )
    head = "".join(f"<th>{name}</th>" for name in ("reference", "chosen", "gain", "reference", "chosen", "loss"))
    return f"<h2>Confirmation: domain, then general</h2><table><tr><th>data</th>{head}</tr>{rows}</table>"


def plot(record: Mapping[str, Any]) -> str:
    """Loss and gain of all points as SVG."""
    good = [line for line in record["evaluations"] if "error" not in line]
    left, right, bottom, top = MARGIN, WIDTH - 16, HEIGHT - MARGIN, 16
    x, x_ticks = _scale([0.0, *(line["loss"] for line in good)], left, right)
    y, y_ticks = _scale([0.0, *(line["gain"] for line in good)], bottom, top)
    parts = [_tag("path", class_="axis", fill="none", d=f"M{left} {top} V{bottom} H{right}")]
    for tick in x_ticks:
        parts.append(_line("axis", x(tick), bottom, x(tick), bottom + 5))
        parts.append(_text(f"{tick:.4g}", x(tick), bottom + 19))
    for tick in y_ticks:
        parts.append(_line("axis", left - 5, y(tick), left, y(tick)))
        parts.append(_text(f"{tick:.4g}", left - 9, y(tick) + 4, text_anchor="end"))
    parts += [_line("zero axis", x(0), top, x(0), bottom), _line("zero axis", left, y(0), right, y(0))]
    parts.append(_text("general loss", (left + right) / 2, HEIGHT - 18))
    parts.append(_text("domain gain", 0, 0, transform=f"translate(14 {(top + bottom) / 2}) rotate(-90)"))
    limit = record["allowed_loss"]
    if limit is not None and left <= x(limit) <= right:
        parts.append(_line("limit", x(limit), top, x(limit), bottom))
    corners = " ".join(f"{x(line['loss']):.1f},{y(line['gain']):.1f}" for line in _front(record))
    parts.append(_tag("polyline", class_="line", points=corners))
    for line in good:
        name = "front" if line["number"] in record["front"] else "point"
        said = f"{told(line['point'])}: gain {_number(line['gain'])}, loss {_number(line['loss'])}"
        place = {"cx": x(line["loss"]), "cy": y(line["gain"])}
        parts.append(_tag("circle", _tag("title", escape(said)), class_=name, r=5, **place))
        if line["number"] == record["chosen"]:
            parts.append(_tag("circle", class_="chosen-mark", r=9, **place))
    label = "domain gain over general loss"
    return _tag("svg", "".join(parts), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def _line(class_: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return _tag("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def _text(content: str, x: float, y: float, text_anchor: str = "middle", **attributes: str) -> str:
    return _tag("text", escape(content), class_="label", x=x, y=y, text_anchor=text_anchor, **attributes)


def _tag(name: str, content: str = "", **attributes: str | float) -> str:
    """An element; in names of attributes `_` stands for `-`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{round(value, 1) if isinstance(value, float) else value}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>"


def _front(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    lines = {line["number"]: line for line in record["evaluations"]}
    return [lines[number] for number in record["front"]]


def _scale(values: Sequence[float], begin: float, end: float) -> tuple[Any, list[float]]:
    """From values to places between two, with a little room; and round values to mark."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - room, high + room
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= raw)
    ticks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: begin + (value - low) / (high - low) * (end - begin), ticks


def _number(value: float) -> str:
    return f"{value:.5g}"
