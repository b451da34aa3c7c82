"""What `steep demo` reports: the figures of its steps gathered into the form that eval/report.py renders.

Reads the files below the run's folder; computes changes against the base model, paired by document and by question.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import read_manifest, sha256_file, versions
from ..engine.metrics import read_metrics
from ..eval.stats import mcnemar, paired_bootstrap
from .demo_corpus import MODEL, ONTOLOGY

if TYPE_CHECKING:
    from .demo import Settings

MODEL_NAME = "SmolLM2-135M-Instruct"
LABELS = {"base": MODEL_NAME, "trained": "trained"}
METHODS = {"slerp": "SLERP", "task_arithmetic": "task arithmetic"}
TEXTS = {"domain": "definitions of held-out HPO terms", "general": "held-out documentation of Python modules"}
QUESTIONS = {"seen": "trained terms", "unseen": "held-out terms"}


def make_figures(
    out: Path,
    settings: Settings,
    names: Sequence[str],
    steps: Sequence[Mapping[str, Any]],
    downloads: Sequence[Path],
) -> dict[str, Any]:
    """The figures of a finished run. `names`: base, trained, then merges; `steps`: records of demo_steps."""
    results = {name: json.loads((out / "eval" / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    merges = {f"{method}-{strength:g}": (method, strength) for method, strength in settings.merges}
    base = results["base"]["tasks"]
    corpora, training = read_manifest(out / "corpora"), read_manifest(out / "train")
    return {
        "kind": "adaptation report",
        "title": f"{MODEL_NAME}, steeped in medical definitions",
        "subtitle": f"steep demo, {training['created'][:10]}: continued pre-training in {settings.precision} on "
        f"{_processor(settings.device)}, merged back, measured.",
        **{
            name: {"label": label, "documents": base[name]["n"], "tokens": base[name]["counts"]["tokens"]}
            for name, label in TEXTS.items()
        },
        "question_sets": {
            name: {"label": label, "count": base[name]["n"], "chance": 0.25} for name, label in QUESTIONS.items()
        },
        "models": [
            {
                "name": name,
                "label": LABELS.get(name) or f"{METHODS[merges[name][0]]} {merges[name][1]:g}",
                "method": name if name in LABELS else merges[name][0],
                "strength": {"base": 0.0, "trained": 1.0}.get(name, merges.get(name, (None, None))[1]),
                **{text: text_figures(results[name]["tasks"][text], _if_other(name, base[text])) for text in TEXTS},
                "questions": {
                    asked: question_figures(results[name]["tasks"][asked], _if_other(name, base[asked]))
                    for asked in QUESTIONS
                },
            }
            for name in names
        ],
        "training": {
            "tokens": training["figures"]["tokens"],
            "curves": curves(out / "train" / "metrics.jsonl"),
            "settings": _training_settings(settings, training, corpora, out),
        },
        "samples": json.loads((out / "answers.json").read_text(encoding="utf-8")),
        "method": _method(settings, corpora),
        "durations": [{"step": record["step"], "seconds": record["seconds"]} for record in steps],
        "provenance": _provenance(out, results, corpora, steps, downloads),
    }


def _if_other(name: str, task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a model is compared with: nothing for the base model itself."""
    return None if name == "base" else task


def text_figures(task: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Figures of a perplexity task; the change is that of bits per byte, bootstrapped over the paired documents."""
    metrics = task["metrics"]
    figures: dict[str, Any] = {
        "perplexity": _estimate(metrics["token_perplexity"]),
        "bits_per_byte": _estimate(metrics["bits_per_byte"]),
    }
    if base is not None:
        before, after = _paired(base, task)
        change = paired_bootstrap(
            [-row["logprob"] / math.log(2) for row in before],
            [-row["logprob"] / math.log(2) for row in after],
            [row["bytes"] for row in after],
        )
        figures["change"] = _change(change)
    return figures


def question_figures(task: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Figures of a multiple-choice task by acc_norm; the interval of the change is bootstrapped, p is McNemar's."""
    figures: dict[str, Any] = {"accuracy": _estimate(task["metrics"]["acc_norm"])}
    if base is not None:
        before, after = ([row["pred_norm"] == row["gold"] for row in rows] for rows in _paired(base, task))
        test = mcnemar(before, after)
        figures["change"] = _change({**paired_bootstrap(before, after), "p_value": test["p_value"]})
        figures |= {"gained": test["gained"], "lost": test["lost"]}
    return figures


def _paired(base: Mapping[str, Any], task: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    before, after = base["items"], task["items"]
    assert [row["id"] for row in before] == [row["id"] for row in after], "evaluated on other rows"
    return before, after


def _estimate(metric: Mapping[str, float]) -> dict[str, float]:
    return {key: metric[key] for key in ("value", "low", "high")}


def _change(test: Mapping[str, float]) -> dict[str, float]:
    return {"value": test["delta"], **{key: test[key] for key in ("low", "high", "p_value")}}


def curves(metrics: Path, points: int = 25) -> list[dict[str, Any]]:
    """Loss per source over steps. Training losses are means of neighbouring lines, to `points` per curve."""
    found: list[dict[str, Any]] = []
    for event, kind in (("train", "training"), ("validation", "validation")):
        records = read_metrics(metrics, event)
        width = max(1, math.ceil(len(records) / points)) if kind == "training" else 1
        for name in dict.fromkeys(name for record in records for name in record["losses"]):
            own = [(record["step"], record["losses"][name]) for record in records if name in record["losses"]]
            groups = [own[i : i + width] for i in range(0, len(own), width)]
            found.append(
                {
                    "name": name,
                    "kind": kind,
                    "steps": [round(sum(step for step, _ in group) / len(group)) for group in groups],
                    "losses": [sum(loss for _, loss in group) / len(group) for group in groups],
                }
            )
    return found


def _training_settings(
    settings: Settings, training: Mapping[str, Any], corpora: Mapping[str, Any], out: Path
) -> dict[str, str]:
    figures, documents = training["figures"], corpora["figures"]["documents"]
    records = read_metrics(out / "train" / "metrics.jsonl", "train")
    tokens_per_second = sorted(record["tokens_per_second"] for record in records)[len(records) // 2]
    return {
        "tokens trained on": f"{figures['tokens']:,} in {figures['steps']} steps, one pass",
        "domain text": f"{documents['domain.train']:,} documents about {settings.sizes.train_terms:,} terms",
        "general text replayed": f"{documents['general.train']:,} documents, "
        f"{settings.sizes.replay_share:.0%} of the characters",
        "optimizer": f"AdamW, peak learning rate {settings.lr:g}, warm-up and cosine to a tenth, "
        f"{settings.seq_len * settings.step_sequences:,} tokens per step in sequences of {settings.seq_len}",
        "precision": settings.precision + (", exact fp32 master weights" if settings.precision == "bfloat16" else ""),
        "rate": f"{tokens_per_second:,.0f} tokens/s (median)",
    }


def _method(settings: Settings, corpora: Mapping[str, Any]) -> list[str]:
    figures = corpora["figures"]
    return [
        "Terms of the ontology are split by a hash of their id; one in ten is held out and never trained on. Each "
        "trained term gives two short documents: the name first, and the definition first.",
        "Questions give a definition, with every word blanked that occurs in one of the four names, and ask for the "
        "term among its siblings and cousins in the ontology. The wrong answers of a question on a trained term are "
        "trained on as well, those of a question on a held-out term are not.",
        "A question is put as in the training text (“… This is called”) and answered by the likeliest name per "
        "character. Part of a gain may be familiarity with the form: questions on held-out terms share the form, not "
        "the facts.",
        f"The general text is the documentation inside Python {platform.python_version()}’s standard library "
        f"({figures['docstrings']['kept']:,} docstrings), split by module. It stands for what the model should not "
        "lose. Text of the same kind is replayed in training, so it shows what replay protects: it is no broad test of "
        "general ability.",
        "Every choice (sizes, learning rate, strengths) was fixed before the run; nothing is random but the order of "
        "training data, which is seeded.",
    ]


def _provenance(
    out: Path,
    results: Mapping[str, Mapping[str, Any]],
    corpora: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    downloads: Sequence[Path],
) -> dict[str, dict[str, str]]:
    sources = {
        title: {
            "what": file.source,
            "from": f"{file.requirement} on PyPI, {file.member}",
            "licence": file.licence,
            "SHA-256": sha256_file(path),
        }
        for title, file, path in zip(("Model", "Domain text"), (MODEL, ONTOLOGY), downloads)
    }
    sources["Domain text"]["version"] = corpora["figures"]["ontology version"]
    return {
        **sources,
        "General text": {
            "what": f"docstrings of the standard library of Python {platform.python_version()}",
            "licence": "PSF License Agreement",
        },
        "Weights, SHA-256": {name: result["model"]["weights"]["sha256"] for name, result in results.items()},
        "Files, SHA-256": {
            name: sha256_file(out / name) for name in ("train.yaml", "corpora/manifest.json", "stores/manifest.json")
        },
        "Run": {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor('cpu')}",
            "peak memory": f"{max(record['peak_memory_bytes'] for record in steps) / 2**30:.2f} GiB",
            **versions(),
        },
    }


def _processor(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "a CPU")
