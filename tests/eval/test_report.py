"""The report shows the figures it was given, says honestly what they mean, and refuses figures that it cannot trust."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from steep.eval.report import (
    ReportFigures,
    best_merge,
    number,
    p_value,
    read_figures,
    render,
    render_report,
    signed,
    summary,
    verdict,
    write_figures,
)


def estimate(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def text(perplexity: float, bits: float, change: float | None = None, half: float = 0.01) -> dict[str, Any]:
    figures: dict[str, Any] = {"perplexity": estimate(perplexity, 1.5), "bits_per_byte": estimate(bits, 0.02)}
    if change is not None:
        figures["change"] = {**estimate(change, half), "p_value": 0.0002 if abs(change) > half else 0.4}
    return figures


def questions(accuracy: float, change: float | None = None, p: float = 0.5) -> dict[str, Any]:
    figures: dict[str, Any] = {"accuracy": estimate(accuracy, 0.09)}
    if change is not None:
        figures |= {"change": {**estimate(change, 0.08), "p_value": p}, "gained": 14, "lost": 5}
    return figures


def model(
    name: str, method: str, strength: float | None, domain: dict, general: dict, seen: dict, unseen: dict
) -> dict[str, Any]:
    return {
        "name": name,
        "label": {"base": "SmolLM2", "trained": "steeped"}.get(name, name.replace("-", " ")),
        "method": method,
        "strength": strength,
        "domain": domain,
        "general": general,
        "questions": {"seen": seen, "unseen": unseen},
    }


def merge(method: str, strength: float, domain: float, general: float) -> dict:
    return model(
        f"{method}-{strength}", method, strength,
        text(43.3 + 20 * domain, 1.167 + domain, domain), text(21.4 + 9 * general, 1.089 + general, general),
        questions(0.38, 0.06, 0.21), questions(0.35, 0.01, 1.0),
    )  # fmt: skip


@pytest.fixture
def figures() -> dict[str, Any]:
    return {
        "kind": "adaptation report",
        "title": "SmolLM2-135M steeped in medical definitions",
        "subtitle": "A small run",
        "domain": {"label": "definitions of held-out terms", "documents": 125, "tokens": 5174},
        "general": {"label": "documentation", "documents": 39, "tokens": 5940},
        "question_sets": {
            "seen": {"label": "trained terms", "count": 100, "chance": 0.25},
            "unseen": {"label": "held-out terms", "count": 100, "chance": 0.25},
        },
        "models": [
            model("base", "base", None, text(43.31, 1.167), text(21.37, 1.089), questions(0.32), questions(0.34)),
            model("trained", "trained", 1.0, text(24.86, 0.995, -0.172), text(22.41, 1.109, 0.02),
                  questions(0.47, 0.15, 0.004), questions(0.36, 0.02, 0.75)),
            merge("slerp", 0.25, -0.06, 0.001),
            merge("slerp", 0.5, -0.115, 0.003),
            merge("slerp", 0.75, -0.15, 0.011),
            merge("task_arithmetic", 0.5, -0.114, 0.0031),
            merge("task_arithmetic", 0.75, -0.149, 0.012),
            merge("task_arithmetic", 1.25, -0.181, 0.041),
        ],
        "training": {
            "tokens": 141_234,
            "curves": [
                {"name": "domain", "kind": "training", "steps": [10, 20, 30], "losses": [3.6, 3.2, 3.0]},
                {"name": "general", "kind": "training", "steps": [10, 20, 30], "losses": [2.9, 2.85, 2.8]},
                {"name": "domain", "kind": "validation", "steps": [0, 30], "losses": [3.7, 3.2]},
            ],
            "settings": {"precision": "bfloat16", "learning rate": "3e-4"},
        },
        "samples": [
            {"kind": "medical", "prompt": "What is <b>polydactyly</b>?",
             "answers": {"base": "A hand.", "trained": "Extra digits."}},
        ],
        "method": ["Every tenth term is held out."],
        "durations": [{"step": "fetch", "seconds": 3.21}, {"step": "train", "seconds": 312.4}],
        "provenance": {"Model": {"licence": "Apache-2.0", "SHA-256": "b179c952"}},
    }  # fmt: skip


def page(figures: dict[str, Any]) -> str:
    return render(ReportFigures.model_validate(figures))


def test_page_contains_the_figures_given(figures: dict[str, Any]) -> None:
    html = page(figures)
    shown = ["43.31", "24.86", "\u22120.172", "+0.020", "47.0", "+15.0", "0.004", "141,234", "5 min 12 s", "b179c952"]
    assert [figure for figure in shown if figure not in html] == []
    assert html.count('<svg class="plot') == 3


def test_page_is_self_contained_and_escapes_text(figures: dict[str, Any]) -> None:
    html = page(figures)
    assert "What is &lt;b&gt;polydactyly&lt;/b&gt;?" in html
    assert not re.search(r"""(?:src|href)=["'](?!#)""", re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL))
    assert "url(http" not in html
    assert not re.search(r"#0[1-8]0[1-8]0[1-8]", html), "a stand-in colour is left in a plot"


def test_same_figures_same_bytes(figures: dict[str, Any]) -> None:
    assert page(figures) == page(copy.deepcopy(figures))


def test_report_of_a_folder(figures: dict[str, Any], tmp_path: Path) -> None:
    write_figures(tmp_path, figures)
    out = render_report(tmp_path, tmp_path / "sub" / "report.html")
    assert out.read_text(encoding="utf-8") == page(figures)


def test_summary_tells_a_gain_from_chance(figures: dict[str, Any]) -> None:
    body = " ".join(summary(ReportFigures.model_validate(figures)))
    assert "perplexity fell from 43.31 to 24.86" in body
    assert "trained terms it answered 32.0\u00a0% before and 47.0\u00a0% after" in body
    assert "p\u00a0= 0.004: a gain" in body
    assert "p\u00a0= 0.750: too little to tell from chance" in body


def test_summary_is_honest_when_nothing_was_gained(figures: dict[str, Any]) -> None:
    trained = figures["models"][1]
    trained["domain"] = text(43.5, 1.168, 0.001)
    trained["general"] = text(25.0, 1.2, 0.11)
    checked = ReportFigures.model_validate(figures)
    assert verdict(checked) == "No gain on domain text, and a loss on general text."
    body = " ".join(summary(checked))
    assert "the interval includes zero, so this may be chance" in body
    assert "nothing clear was gained on domain text, merging with SmolLM2 has nothing to keep" in body
    trained["domain"] = text(50.0, 1.3, 0.133)
    assert verdict(ReportFigures.model_validate(figures)) == "Domain text is predicted worse, so is general text."


def test_best_merge_weighs_gain_against_loss(figures: dict[str, Any]) -> None:
    checked = ReportFigures.model_validate(figures)
    _, trained, *merges = checked.models
    best = best_merge(trained, merges)
    assert best is not None
    assert best.name == "slerp-0.5"  # 0.115/0.172 - 0.003/0.02 = 0.52; slerp 0.75: 0.872 - 0.55 = 0.32
    assert "slerp 0.5 has the best balance: it keeps 67\u00a0%" in " ".join(summary(checked))


def test_without_a_clear_loss_there_is_nothing_to_win_back(figures: dict[str, Any]) -> None:
    figures["models"][1]["general"] = text(21.5, 1.091, 0.002)
    checked = ReportFigures.model_validate(figures)
    assert best_merge(checked.models[1], checked.models[2:]) is None
    body = " ".join(summary(checked))
    assert "training cost nothing clear on general text" in body
    assert "6 merges keep 35\u00a0% to 105\u00a0% of the domain gain" in body


def test_without_merges_there_is_no_merge_section(figures: dict[str, Any]) -> None:
    figures["models"] = figures["models"][:2]
    assert "What merging back keeps" not in page(figures)


@pytest.mark.parametrize(
    ("value", "digits", "shown"), [(0.0004, 3, "0.000"), (-0.0004, 3, "0.000"), (-0.2, 1, "\u22120.2"), (3, 0, "+3")]
)
def test_signed(value: float, digits: int, shown: str) -> None:
    assert signed(value, digits) == shown


def test_number_and_p_value() -> None:
    assert number(-1234.5, 1) == "\u22121,234.5"
    assert (p_value(0.0009), p_value(0.0494)) == ("< 0.001", "0.049")


def test_missing_figures_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"figures\.json: not found"):
        render_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f["models"][0]["domain"].pop("perplexity"), r"models\.0\.domain\.perplexity: Field required"),
        (lambda f: f["models"][1]["questions"].pop("seen"), "trained: questions are"),
        (lambda f: f["models"][1]["domain"].pop("change"), "trained: lacks a change"),
        (lambda f: f["models"].reverse(), "the first must have method 'base'"),
        (lambda f: f["models"].append(f["models"][2]), "names are not unique"),
        (lambda f: f["samples"][0]["answers"].update(ghost="boo"), "unknown models: .*ghost"),
        (lambda f: f.update(surprise=1), "surprise: Extra inputs"),
    ],
)
def test_wrong_figures_are_refused_by_name(figures: dict[str, Any], tmp_path: Path, damage: Any, message: str) -> None:
    damage(figures)
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    with pytest.raises(ValueError, match=message):
        read_figures(tmp_path)


def test_broken_json_and_infinite_figures(figures: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("{")
    with pytest.raises(ValueError, match=r"figures\.json: file: Invalid JSON"):
        read_figures(tmp_path)
    figures["models"][0]["domain"]["perplexity"]["value"] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        write_figures(tmp_path, figures)
