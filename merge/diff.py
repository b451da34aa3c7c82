"""`steep merge diff A B`: how two models differ, tensor by tensor, layer by layer, role by role. Reads two or three
folders in small pieces, writes nothing.

A distance in ulps is |b - a| over the spacing of the storage dtype's numbers at the larger of |a| and |b|; of the
coarser dtype where the models' differ; for integers it is |b - a|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..engine.safetensors_io import SafetensorsFolder, dtype_name
from .measure import PIECE, Magnitudes, Place, Products, layer_label, pieces, place_of, ratio, side_by_side

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
MOST_LISTED = 10
_SUMS = ("aa", "bb", "ab", "dd", "cc", "pp", "qq", "pq")  # a, b, d = b - a, the base c, p = a - c, q = b - c


@dataclass
class Compared:
    """What there is to know of a pair of tensors, or of several pairs taken as one."""

    count: int
    equal: int
    not_finite: int  # elements that are NaN or infinite on either side; left out of the rest
    max_abs: float
    sums: dict[str, float]  # dot products
    ulps: Magnitudes

    @classmethod
    def total(cls, parts: Sequence[Compared]) -> Compared:
        ulps = Magnitudes()
        for part in parts:
            ulps.counts += part.ulps.counts
        keys = set.intersection(*(set(part.sums) for part in parts))
        return cls(
            count=sum(part.count for part in parts),
            equal=sum(part.equal for part in parts),
            not_finite=sum(part.not_finite for part in parts),
            max_abs=max(part.max_abs for part in parts),
            sums={key: math.fsum(part.sums[key] for part in parts) for key in keys},
            ulps=ulps,
        )

    def figures(self) -> dict[str, Any]:
        """For JSON. Under a base also the norms of both task vectors relative to it, and their cosine."""
        root = {key: math.sqrt(value) for key, value in self.sums.items() if key[0] == key[1]}
        found: dict[str, Any] = {
            "values": self.count,
            "relative_norm": ratio(root["dd"], root["aa"]),
            "cosine": ratio(self.sums["ab"], root["aa"] * root["bb"]),
            "equal": ratio(self.equal, self.count),
            "max_abs": self.max_abs,
            "ulps": {f"{q:g}": self.ulps.quantile(q) for q in QUANTILES},
        }
        if self.not_finite:
            found["not_finite"] = self.not_finite
        if "cc" in self.sums:
            found |= {
                "relative_deltas": [ratio(root["pp"], root["cc"]), ratio(root["qq"], root["cc"])],
                "delta_cosine": ratio(self.sums["pq"], root["pp"] * root["qq"]),
            }
        return found


def diff(a: str | Path, b: str | Path, base: str | Path | None = None, *, piece: int = PIECE) -> dict[str, Any]:
    """Compare the tensors of two model folders that have the same names and shapes.

    Args:
        base: also compare the task vectors A - base and B - base.
        piece: elements read at once; the figures do not depend on it.

    Returns:
        {"a", "b", "base", "only_in_a", "only_in_b", "shapes_differ", "all", "layers", "roles", "tensors"}; the last
        four hold `Compared.figures`. Quantiles of ulps are rounded down by less than a hundredth, whole ones up to 256
        not at all.

    Raises:
        FileNotFoundError, ValueError: a folder without safetensors, a damaged file, no tensor in common.
    """
    with SafetensorsFolder(a) as first, SafetensorsFolder(b) as second:
        third = SafetensorsFolder(base) if base is not None else None
        try:
            common = [name for name in first.names if name in second]
            shapes = {n: [list(first.shape(n)), list(second.shape(n))] for n in common}
            names = [name for name in common if first.shape(name) == second.shape(name)]
            if not names:
                raise ValueError(f"{a} and {b}: no tensor has the same name and shape in both")
            done = side_by_side(lambda name: _compare(first, second, third, name, piece), names)
            found = dict(zip(names, done, strict=True))
            dtypes = {name: [dtype_name(first.dtype(name)), dtype_name(second.dtype(name))] for name in names}
            only_in_b = [name for name in second.names if name not in first]
            only_in_a = [name for name in first.names if name not in second]
        finally:
            if third is not None:
                third.close()
    places = {name: place_of(name) for name in names}
    stacks = len({place.stack for place in places.values() if place.layer >= 0})
    return {
        "a": str(a),
        "b": str(b),
        "base": None if base is None else str(base),
        "only_in_a": only_in_a,
        "only_in_b": only_in_b,
        "shapes_differ": {name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        "all": Compared.total(done).figures(),
        "layers": _grouped(found, lambda name: layer_label(places[name], stacks), "layer"),
        "roles": _grouped(found, lambda name: places[name].role, "role"),
        "tensors": {name: _of_tensor(places[name], dtypes[name]) | part.figures() for name, part in found.items()},
    }


def _of_tensor(place: Place, dtypes: list[str]) -> dict[str, Any]:
    return {"layer": place.layer if place.layer >= 0 else None, "role": place.role, "dtypes": dtypes}


def _grouped(found: Mapping[str, Compared], key: Callable[[str], str], title: str) -> list[dict[str, Any]]:
    groups: dict[str, list[Compared]] = {}
    for name, part in found.items():
        groups.setdefault(key(name), []).append(part)
    ordered = sorted(groups.items(), key=lambda item: int(item[0]) if item[0].isdigit() else -1)
    return [{title: label} | Compared.total(parts).figures() for label, parts in ordered]


def _compare(
    a: SafetensorsFolder, b: SafetensorsFolder, base: SafetensorsFolder | None, name: str, piece: int
) -> Compared:
    numel = a.numel(name)
    if base is not None and (name not in base or base.shape(name) != a.shape(name)):
        raise ValueError(f"{base.path}: has no tensor {name} of shape {list(a.shape(name))}")
    folders = [a, b] + ([base] if base is not None else [])
    dtype = _coarser(a.dtype(name), b.dtype(name))
    order = "abdcpq"[: 3 if base is None else 6]
    pairs = {key: (order.index(key[0]), order.index(key[1])) for key in _SUMS if set(key) <= set(order)}
    products, ulps = Products(pairs.values()), Magnitudes()
    equal = not_finite = 0
    max_abs = 0.0
    for lo, hi in pieces(numel, piece):
        raw = [each.read_into(name, lo, torch.empty(hi - lo, dtype=each.dtype(name))) for each in folders]
        x, y, *rest = (values.to(torch.float32) for values in raw)
        finite = torch.isfinite(x) & torch.isfinite(y)
        bad = (hi - lo) - int(finite.sum())
        if bad:
            not_finite += bad
            equal -= bad
            x, y, *rest = (torch.where(finite, values, 0.0) for values in (x, y, *rest))
        ulps.add(_ulps(x, y, dtype)[finite])
        difference = y - x
        equal += int((raw[0] == raw[1] if dtype is None else difference == 0).sum())
        max_abs = max(max_abs, float(difference.abs().max()))
        products.add([x, y, difference, *(vector for c in rest for vector in (c, x - c, y - c))])
    sums = {key: products.total(*pair) for key, pair in pairs.items()}
    return Compared(numel, equal, not_finite, max_abs, sums, ulps)


def _coarser(x: torch.dtype, y: torch.dtype) -> torch.dtype | None:
    """Of two float dtypes the one with the wider ulps, float32 at the finest; None for integers."""
    if not (x.is_floating_point and y.is_floating_point):
        return None
    return max((x, y, torch.float32), key=lambda dtype: torch.finfo(dtype).eps)


def _ulps(x: Tensor, y: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Distance of float32 values in ulps of a dtype at the larger one; float32."""
    distance = (y.double() - x.double()).abs()
    if dtype is None:
        return distance.to(torch.float32)
    numbers = torch.finfo(dtype)
    larger = torch.maximum(x.abs(), y.abs()).double().clamp_(min=numbers.smallest_normal)
    _, exponent = torch.frexp(larger)  # larger = m 2^exponent with m in [1/2, 1)
    return torch.ldexp(distance / numbers.eps, 1 - exponent).to(torch.float32)


def show_diff(found: Mapping[str, Any], *, every_tensor: bool = False) -> Iterator[RenderableType]:
    """Tables for rich: all, by role, by layer, and the tensors that differ most (or all of them)."""
    yield Text(f"A {found['a']}\nB {found['b']}" + (f"\nbase {found['base']}" if found["base"] else ""))
    yield _table("By role", "role", found["roles"])
    yield _table("By layer", "layer", [*found["layers"], {"layer": "all"} | found["all"]])
    tensors = [{"tensor": name} | figures for name, figures in found["tensors"].items()]
    if every_tensor:
        yield _table("Tensors", "tensor", tensors)
    else:
        tensors = [figures for figures in tensors if figures["equal"] != 1]
        tensors.sort(key=lambda figures: figures["relative_norm"] or 0.0, reverse=True)
        if tensors:
            yield _table("Tensors that differ most", "tensor", tensors[:MOST_LISTED])
    for key, text in (("only_in_a", "only in A"), ("only_in_b", "only in B"), ("shapes_differ", "shapes differ")):
        if found[key]:
            listed = ", ".join(list(found[key])[:MOST_LISTED])
            more = f" and {len(found[key]) - MOST_LISTED} more" if len(found[key]) > MOST_LISTED else ""
            yield Text(f"{text}: {listed}{more}", style="yellow")
    if "not_finite" in found["all"]:
        yield Text(f"{found['all']['not_finite']:,} elements are NaN or infinite and left out", style="yellow")
    same = not (found["only_in_a"] or found["only_in_b"] or found["shapes_differ"]) and found["all"]["equal"] == 1
    yield Text("equal" if same else f"{100 * (found['all']['equal'] or 0):.2f} % of the elements are equal")


def _table(title: str, first: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    rows = list(rows)
    based = any("delta_cosine" in row for row in rows)
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column(first, overflow="fold")
    for column in ("|B-A|/|A|", "cosine", "equal %", "max |B-A|", *(f"ulps {100 * q:g} %" for q in QUANTILES)):
        table.add_column(column, justify="right")
    for column in ("|A-C|/|C|", "|B-C|/|C|", "cos(A-C, B-C)") if based else ():
        table.add_column(column, justify="right")
    for row in rows:
        cells = [_number(row["relative_norm"]), _number(row["cosine"], "{:.6f}")]
        cells += [_number(None if row["equal"] is None else 100 * row["equal"], "{:.2f}"), _number(row["max_abs"])]
        cells += [_number(value, "{:g}") for value in row["ulps"].values()]
        if based:
            cells += [_number(value) for value in row["relative_deltas"]] + [_number(row["delta_cosine"], "{:.4f}")]
        table.add_row(Text(str(row[first])), *cells)
    return table


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "-" if value is None else form.format(value)
