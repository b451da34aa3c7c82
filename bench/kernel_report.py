"""A record of `steep bench kernels` as the README's table and as a picture. May touch: matplotlib, the README."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.files import atomic_write

BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
Rows = dict[tuple[str, str, str], dict[str, dict[str, Any]]]


def rows_of(results: Iterable[dict[str, Any]]) -> Rows:
    """{(kernel, shape, mode): {who: result}} of what was measured, in the order of the run."""
    rows: Rows = {}
    for result in results:
        if "ms" in result:
            rows.setdefault((result["kernel"], result["shape"], result["mode"]), {})[result["who"]] = result
    return {key: row for key, row in rows.items() if "steep" in row}


def table(record: dict[str, Any]) -> str:
    """Markdown: ours, what share of the measured machine that is, and by what factor each peer is slower."""
    figures = record["figures"]
    rows = rows_of(figures["results"])
    peers = sorted({who for row in rows.values() for who in row} - {"steep"}, key=lambda who: (who != "eager", who))
    device = record["device"].get("gpus", [f"{record['device']['cores']} cores of an {record['device']['cpu']}"])[0]
    lines = [
        f"Measured {record['created'][:10]} on {device}, {figures['dtype']}: copy {figures['copy_gb_s']:,.0f} GB/s, "
        f"matmul {figures['matmul_tflops']:,.3g} TFLOP/s in the same run; factors are a peer's time over ours.",
        "",
        "| kernel | shape | pass | steep, ms | of floor | " + " | ".join(peers) + " |",
        "|---|---|---|" + "---|" * (2 + len(peers)),
    ]
    for (kernel, shape, mode), row in rows.items():
        ours = row["steep"]
        factors = [f"{row[peer]['ms'] / ours['ms']:.2f} x" if peer in row else "" for peer in peers]
        share = f"{100 * ours['of_floor']:.0f} %"
        if "target" in ours and "gpus" in record["device"]:
            share += f" (target {100 * ours['target']:.0f})"
        lines.append(f"| {kernel} | {shape} | {mode} | {ours['ms']:.3g} | {share} | " + " | ".join(factors) + " |")
    return "\n".join(lines)


def update_readme(record: dict[str, Any], readme: str | Path) -> None:
    """Replace what stands between the two marks in the README by the record's table.

    Raises:
        ValueError: the marks are not there.
    """
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"{path}: needs the lines {BEGIN} and {END}, between which the table is put")
    head, _, rest = text.partition(BEGIN)
    atomic_write(path, f"{head}{BEGIN}\n{table(record)}\n{END}{rest.partition(END)[2]}")


def plot(record: dict[str, Any], out: str | Path) -> None:
    """A PNG: one bar per kernel, pass and who, its length the share of the floor that is reached; targets as ticks.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "steep[demo]"') from error
    rows = rows_of(record["figures"]["results"])
    everyone = list(dict.fromkeys(who for row in rows.values() for who in row))
    palette = ("#1f6f6b", "#b9b4a7", "#d08c3f", "#6b7fb3", "#a0526b", "#7a9a4b", "#444444", "#c7a3c7")
    colours = dict(zip(everyone, palette))
    figure = Figure(figsize=(9, 0.6 + 0.22 * sum(len(row) + 1 for row in rows.values())), layout="constrained")
    axes = figure.subplots()
    y, ticks, labels = 0.0, [], []
    for (kernel, shape, mode), row in rows.items():
        ticks.append(y + (len(row) - 1) / 2)
        labels.append(f"{kernel} {mode}\n{shape}")
        for who, result in row.items():
            axes.barh(y, 100 * result["of_floor"], color=colours.get(who, "#888888"), height=0.9)
            axes.text(100 * result["of_floor"] + 1, y, f"{who} {result['ms']:.3g} ms", va="center", fontsize=7)
            if who == "steep" and "target" in result and "gpus" in record["device"]:
                axes.plot([100 * result["target"]] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.5)
            y += 1
        y += 0.8
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("per cent of the copy bandwidth or matmul rate measured in the same run")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110, format="png")
