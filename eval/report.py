"""The report of one adaptation: `figures.json` in, one self-contained HTML file out.

The figures are read strictly, so that a number is never shown under the wrong name; every sentence of the summary is
derived from them, also when nothing was gained. Plots are drawn by matplotlib as SVG whose colours and fonts are those
of the page, so that they follow light, dark and print. Reads one JSON file and the template; writes one HTML file.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..data.files import atomic_write

FIGURES = "figures.json"


# --- What figures.json holds ------------------------------------------------------------------------------------------


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Estimate(_Figures):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Change(Estimate):
    """A difference to the base model on the same documents or questions; `p_value` is two-sided."""

    p_value: float


class TextFigures(_Figures):
    """How well a model predicts a held-out text. `change` is that of bits per byte; None for the base model."""

    perplexity: Estimate
    bits_per_byte: Estimate
    change: Change | None = None


class QuestionFigures(_Figures):
    """Accuracy in [0, 1]. `gained`: wrong with the base model, right now; `lost`: the reverse."""

    accuracy: Estimate
    change: Change | None = None
    gained: int = 0
    lost: int = 0


class ModelFigures(_Figures):
    """One model. `strength`: how much of the training a merge keeps, 0 the base and 1 the trained model."""

    name: str
    label: str
    method: Literal["base", "trained", "slerp", "task_arithmetic", "linear", "ties"]
    strength: float | None = None
    domain: TextFigures
    general: TextFigures
    questions: dict[str, QuestionFigures]


class Curve(_Figures):
    """A loss in nats per token over training steps. `kind`: of the batches trained on, or of held-out text."""

    name: str
    kind: Literal["training", "validation"]
    steps: list[int]
    losses: list[float]


class Training(_Figures):
    """`tokens`: valid labels trained on; `settings`: shown as they are."""

    tokens: int
    curves: list[Curve]
    settings: dict[str, str]


class QuestionSet(_Figures):
    """`label` completes "questions on ..."; `chance`: accuracy of guessing."""

    label: str
    count: int
    chance: float


class TextSet(_Figures):
    """`label` names the held-out text in a sentence."""

    label: str
    documents: int
    tokens: int


class Sample(_Figures):
    """A prompt and the answers to it by name of model."""

    kind: str
    prompt: str
    answers: dict[str, str]


class Duration(_Figures):
    """Seconds that a step of the run took when it was carried out."""

    step: str
    seconds: float


class ReportFigures(_Figures):
    """Everything that a report shows. The first model is the base, the second the trained one, merges follow."""

    kind: Literal["adaptation report"]
    title: str
    subtitle: str
    domain: TextSet
    general: TextSet
    question_sets: dict[str, QuestionSet]
    models: list[ModelFigures] = Field(min_length=2)
    training: Training
    samples: list[Sample]
    method: list[str]
    durations: list[Duration]
    provenance: dict[str, dict[str, str]]

    @model_validator(mode="after")
    def _consistent(self) -> ReportFigures:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models: names are not unique: {names}")
        if [model.method for model in self.models[:2]] != ["base", "trained"]:
            raise ValueError("models: the first must have method 'base', the second 'trained'")
        for model in self.models:
            if model.questions.keys() != self.question_sets.keys():
                raise ValueError(
                    f"models: {model.name}: questions are {sorted(model.questions)}, "
                    f"question_sets are {sorted(self.question_sets)}"
                )
            changes = [model.domain.change, model.general.change, *(q.change for q in model.questions.values())]
            if model.method != "base" and None in changes:
                raise ValueError(f"models: {model.name}: lacks a change against the base model")
        unknown = {name for sample in self.samples for name in sample.answers} - set(names)
        if unknown:
            raise ValueError(f"samples: answers of unknown models: {sorted(unknown)}")
        return self


def read_figures(folder: str | Path) -> ReportFigures:
    """The checked figures of a folder.

    Raises:
        FileNotFoundError: no figures.json.
        ValueError: not JSON, or a figure missing, unknown, or of a wrong type: every one is named.
    """
    path = Path(folder) / FIGURES
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a report is made from the {FIGURES} that `steep demo` writes")
    try:
        return ReportFigures.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors()]
        raise ValueError(f"{path}: " + "; ".join(faults)) from None


def render_report(folder: str | Path, out: str | Path) -> Path:
    """Render the report of `folder`'s figures.json at `out`; returns `out`.

    Raises:
        FileNotFoundError, ValueError: as read_figures.
        ImportError: jinja2 or matplotlib is not installed.
    """
    figures = read_figures(folder)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, render(figures))
    return out


def render(figures: ReportFigures) -> str:
    """The HTML page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "signed": signed,
        "percent": percent,
        "points": points,
        "p_value": p_value,
        "duration": duration,
    }
    base, trained, *merges = figures.models
    return environment.get_template("report.html").render(
        f=figures,
        base=base,
        trained=trained,
        merges=merges,
        verdict=verdict(figures),
        summary=summary(figures),
        loss_svg=loss_plot(figures.training.curves),
        trade_svg=trade_plot(figures.models) if merges else "",
        questions_svg=questions_plot(figures),
        sample_models=[model for model in figures.models if any(model.name in s.answers for s in figures.samples)],
    )


# --- Numbers in words -------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 2) -> str:
    """1234.5 -> "1,234.50", with a true minus sign."""
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def signed(value: float, digits: int = 2) -> str:
    """A difference: always with its sign, and none where it rounds to zero."""
    text = f"{value:+,.{digits}f}"
    return text.lstrip("+-") if float(text.replace(",", "")) == 0 else text.replace("-", "\u2212")


def percent(share: float, digits: int = 1) -> str:
    """0.123 -> "12.3 %"."""
    return f"{number(100 * share, digits)}\u00a0%"


def points(share: float) -> str:
    """A difference of accuracies in percentage points: 0.123 -> "+12.3"."""
    return signed(100 * share, 1)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _direction(change: Change) -> int:
    """+1 or -1 where the 95 % interval lies on one side of zero, else 0."""
    return 1 if change.low > 0 else -1 if change.high < 0 else 0


def _change(model: ModelFigures, text: Literal["domain", "general"]) -> Change:
    change = getattr(model, text).change
    assert change is not None, "checked by ReportFigures"
    return change


def verdict(figures: ReportFigures) -> str:
    """The result in half a sentence."""
    trained = figures.models[1]
    domain = {-1: "Domain text is predicted better", 0: "No gain on domain text", 1: "Domain text is predicted worse"}
    general = {-1: "so is general text", 0: "general text kept its level", 1: "general text worse"}
    gain, loss = _direction(_change(trained, "domain")), _direction(_change(trained, "general"))
    if gain == 1:
        general = {-1: "general text better", 0: "general text kept its level", 1: "so is general text"}
    if gain == 0:
        general = {-1: "a gain on general text", 0: "and none on general text", 1: "and a loss on general text"}
    return f"{domain[gain]}, {general[loss]}."


def summary(figures: ReportFigures) -> list[str]:
    """The result in plain sentences, one paragraph per string."""
    base, trained, *merges = figures.models
    sentences = [
        f"{base.label} was trained further on {number(figures.training.tokens, 0)} tokens.",
        _text_sentence(f"On {figures.domain.label}", base.domain, trained.domain),
        _text_sentence(f"On {figures.general.label}", base.general, trained.general),
    ]
    questions = [_question_sentence(figures.question_sets[name], base, trained, name) for name in figures.question_sets]
    paragraphs = [" ".join(sentences), " ".join(questions)]
    if merges:
        paragraphs.append(_merge_sentence(base, trained, merges))
    return [paragraph for paragraph in paragraphs if paragraph]


def _text_sentence(where: str, before: TextFigures, after: TextFigures) -> str:
    change = after.change
    assert change is not None, "checked by ReportFigures"
    ratio = after.perplexity.value / before.perplexity.value - 1
    went = {-1: "fell", 0: "went", 1: "rose"}[_direction(change)]
    doubt = "" if _direction(change) else ": the interval includes zero, so this may be chance"
    return (
        f"{where}, perplexity {went} from {number(before.perplexity.value)} to {number(after.perplexity.value)} "
        f"({signed(100 * ratio, 1)}\u00a0%; bits per byte {signed(change.value, 3)}, 95\u00a0% interval "
        f"{signed(change.low, 3)} to {signed(change.high, 3)}{doubt})."
    )


def _question_sentence(questions: QuestionSet, base: ModelFigures, trained: ModelFigures, name: str) -> str:
    before, after = base.questions[name], trained.questions[name]
    change = after.change
    assert change is not None, "checked by ReportFigures"
    direction = "a gain" if change.value > 0 else "a loss"
    reading = direction if change.p_value < 0.05 else "too little to tell from chance"
    chance = " Neither is clearly above guessing." if _at_chance(questions, before, after) else ""
    return (
        f"Of {questions.count} questions on {questions.label} it answered {percent(before.accuracy.value)} before and "
        f"{percent(after.accuracy.value)} after training ({points(change.value)} points, 95\u00a0% interval "
        f"{points(change.low)} to {points(change.high)}, p\u00a0{_equals(change.p_value)}: {reading}).{chance}"
    )


def _at_chance(questions: QuestionSet, *results: QuestionFigures) -> bool:
    return all(result.accuracy.low <= questions.chance for result in results)


def _equals(p: float) -> str:
    return p_value(p) if p < 0.001 else f"= {p_value(p)}"


def best_merge(trained: ModelFigures, merges: Sequence[ModelFigures]) -> ModelFigures | None:
    """The merge with the best difference of (share of domain gain kept) - (share of general loss kept).

    None where training brought no clear domain gain or no clear general loss, so that there is nothing to trade.
    """
    domain, general = _change(trained, "domain"), _change(trained, "general")
    if _direction(domain) != -1 or _direction(general) != 1:
        return None
    return max(
        merges, key=lambda m: _change(m, "domain").value / domain.value - _change(m, "general").value / general.value
    )


def _merge_sentence(base: ModelFigures, trained: ModelFigures, merges: Sequence[ModelFigures]) -> str:
    domain, general = _change(trained, "domain"), _change(trained, "general")
    if _direction(domain) != -1:
        return f"As nothing clear was gained on domain text, merging with {base.label} has nothing to keep."
    best = best_merge(trained, merges)
    if best is None:
        shares = [_change(merge, "domain").value / domain.value for merge in merges]
        return (
            f"As training cost nothing clear on general text, merging with {base.label} has nothing to win back; "
            f"the {len(merges)} merges keep {percent(min(shares), 0)} to {percent(max(shares), 0)} of the domain gain."
        )
    loss = _change(best, "general").value / general.value
    kept = f"and {percent(loss, 0)} of the loss on general text"
    if loss < 0:
        kept = f"and predicts general text better than {base.label} does"
    return (
        f"Merging back trades between the two. Of {len(merges)} merges, {best.label} has the best balance: it keeps "
        f"{percent(_change(best, 'domain').value / domain.value, 0)} of the gain on domain text {kept}. It was picked "
        "on the same held-out text that is reported here, so its lead is somewhat flattered."
    )


# --- Plots ------------------------------------------------------------------------------------------------------------

# Colours that stand for the page's: each is replaced by the CSS variable after drawing.
_PAGE_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--paper)",
    "#050505": "var(--one)",
    "#060606": "var(--two)",
    "#070707": "var(--three)",
    "#080808": "var(--four)",
}
INK, MUTED, RULE, PAPER, *SERIES = _PAGE_COLOURS
# Above the axes: it covers no data, wherever the data lie.
_LEGEND: dict[str, Any] = {
    "labelcolor": INK, "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "borderaxespad": 0.2,
    "borderpad": 0.2, "columnspacing": 1.6,
}  # fmt: skip


def _draw(name: str, width: float, height: float, draw: Callable[[Any], None]) -> str:
    """One set of axes as an SVG element; `draw` gets the axes. The same figures give the same bytes."""
    import matplotlib

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 8.5,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": RULE,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for sentinel, variable in _PAGE_COLOURS.items():
        svg = svg.replace(sentinel, variable)
    # Text takes the page's font; the drawing scales with its column.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    opening = rf'<svg class="plot {name}" viewBox="\1" role="img">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1)


def loss_plot(curves: Sequence[Curve]) -> str:
    """Training and validation loss of every source over steps."""

    def draw(axes: Any) -> None:
        names = list(dict.fromkeys(curve.name for curve in curves))
        for curve in curves:
            colour = SERIES[names.index(curve.name) % len(SERIES)]
            if curve.kind == "training":
                axes.plot(curve.steps, curve.losses, color=colour, linewidth=1.4, label=f"{curve.name}, training")
            else:
                axes.plot(
                    curve.steps, curve.losses, color=colour, linewidth=1, linestyle=(0, (4, 3)), marker="o",
                    markersize=4, markerfacecolor=PAPER, label=f"{curve.name}, held out",
                )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.legend(**_LEGEND, handlelength=2.4)

    return _draw("loss", 7.2, 3.4, draw)


METHOD_LABELS = {"slerp": "SLERP", "task_arithmetic": "task arithmetic", "linear": "linear", "ties": "TIES"}


def trade_plot(models: Sequence[ModelFigures]) -> str:
    """Domain gain against general loss, both in bits per byte, along the strength of every merge method."""

    def point(model: ModelFigures) -> tuple[float, float]:
        if model.method == "base":
            return 0.0, 0.0
        return _change(model, "general").value, -_change(model, "domain").value

    def draw(axes: Any) -> None:
        base, trained, *merges = models
        axes.axhline(0, color=RULE, linewidth=0.8)
        axes.axvline(0, color=RULE, linewidth=0.8)
        methods = list(dict.fromkeys(model.method for model in merges))
        for number_, method in enumerate(methods):
            colour = SERIES[number_ % len(SERIES)]
            own = [model for model in merges if model.method == method]
            ends = {0.0: base, 1.0: trained}
            path = sorted([*ends.items(), *((m.strength or 0.0, m) for m in own)], key=lambda pair: pair[0])
            axes.plot(*zip(*(point(model) for _, model in path)), color=colour, linewidth=1.2, alpha=0.7, zorder=2)
            axes.scatter(*zip(*map(point, own)), color=colour, s=34, zorder=4, label=METHOD_LABELS[method])
            # Two methods often lie on one line: their labels go to opposite sides of it.
            side = -1 if number_ % 2 else 1
            for model in own:
                axes.annotate(
                    f"{model.strength:g}", point(model), xytext=(7 * side, -4 * side), textcoords="offset points",
                    color=colour, fontsize=8, ha="left" if side > 0 else "right", va="top" if side > 0 else "bottom",
                )  # fmt: skip
        for model, offset in ((base, (8, -12)), (trained, (8, 6))):
            x, y = point(model)
            axes.scatter([x], [y], s=60, facecolor=PAPER, edgecolor=INK, linewidth=1.4, zorder=5)
            axes.annotate(
                model.method, (x, y), xytext=offset, textcoords="offset points", color=INK,
                ha="left" if offset[0] > 0 else "right",
            )  # fmt: skip
        axes.set_xlabel("loss on general text, bits per byte  (right is worse)")
        axes.set_ylabel("gain on domain text,\nbits per byte  (up is better)")
        axes.tick_params(length=0)
        axes.margins(0.14)
        axes.legend(**_LEGEND, handletextpad=0.2)

    return _draw("trade", 7.2, 4.2, draw)


def questions_plot(figures: ReportFigures) -> str:
    """Accuracy of every model on every set of questions, with 95 % intervals and the level of guessing."""
    sets = figures.question_sets

    def draw(axes: Any) -> None:
        for number_, (name, questions) in enumerate(sets.items()):
            offset = (number_ - (len(sets) - 1) / 2) * 0.28
            colour = SERIES[number_ % len(SERIES)]
            for row, model in enumerate(figures.models):
                accuracy = model.questions[name].accuracy
                y = row + offset
                axes.plot([100 * accuracy.low, 100 * accuracy.high], [y, y], color=colour, linewidth=1.2, alpha=0.6)
                label = questions.label if row == 0 else None
                axes.scatter([100 * accuracy.value], [y], color=colour, s=26, zorder=3, label=label)
            axes.axvline(100 * questions.chance, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
        chance = next(iter(sets.values())).chance if sets else 0
        axes.annotate(
            "guessing", (100 * chance, -0.75), xytext=(4, 0), textcoords="offset points", color=MUTED, fontsize=8
        )
        axes.set_yticks(range(len(figures.models)), [model.label for model in figures.models])
        axes.set_ylim(len(figures.models) - 0.5, -1)
        axes.set_xlabel("questions answered right, %")
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.legend(**_LEGEND, handletextpad=0.2)

    return _draw("questions", 7.2, 0.9 + 0.42 * len(figures.models), draw)


def write_figures(folder: str | Path, figures: Mapping[str, Any]) -> None:
    """Check figures and publish them as `figures.json` in a folder.

    Raises:
        ValueError: they are not what a report needs, or hold a value that JSON has no word for.
    """
    if not all(math.isfinite(value) for value in _floats(figures)):
        raise ValueError("figures: a value is not finite")
    ReportFigures.model_validate(figures)
    atomic_write(Path(folder) / FIGURES, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def _floats(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [leaf for entry in value.values() for leaf in _floats(entry)]
    if isinstance(value, list | tuple):
        return [leaf for entry in value for leaf in _floats(entry)]
    return [value] if isinstance(value, float) else []
