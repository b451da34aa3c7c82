"""`evaluate`: a model and tasks in, one published JSON file out. Glue: loads, calls the modules beside it, sums up.

The file holds the figures, every row they were made from, and the identity of what they belong to - the hash of the
weights, of each task with its data, and the settings - so that a result can never be taken for another model's.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..data.files import atomic_write, make_manifest, sha256_file
from ..data.tokenizer import Tokenizer
from ..engine.model import Decoder
from .encoding import Encoder, Mode
from .generation import exact_match, extract, generate_until
from .model import fingerprint_of_decoder, fingerprint_of_folder, load_model
from .multiple_choice import accuracy, multiple_choice
from .perplexity import perplexity
from .scorer import Scorer
from .stats import normal_interval, pooled_stderr
from .task import FEWSHOT_SEED, BoundTask, Example, Task, load_tasks

Progress = Callable[[str, int, int], None]


def evaluate(
    model: str | Path | tuple[Decoder, Tokenizer],
    tasks: Sequence[str | Task | BoundTask],
    limit: int | None = None,
    out: str | Path | None = None,
    mode: Mode = "clean",
    *,
    num_fewshot: int | None = None,
    add_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = FEWSHOT_SEED,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Args:
        model: a Hugging Face folder, or a decoder with its tokenizer (dtype and device are then the decoder's).
        tasks: see `load_tasks`, e.g. "mmlu:DATA", "mmlu_anatomy:DATA", "perplexity:FILE.jsonl", "mine.yaml".
        limit: only the first documents of each task.
        out: where to publish the result as JSON.
        mode: "clean", or "lmeval" for lm-evaluation-harness' numbers with its faults; see encoding.py.
        num_fewshot: instead of the tasks' own. add_bos: None for the tokenizer's default.
        max_length: longest model input (default: the model's max_position_embeddings).
        progress: called with (task, done, total) in tokens of model input; for generated answers once, at the end.

    Returns: a manifest (kind "eval") with
        figures {task or group: {metric: value}}, for reading;
        model {path, weights, tokenizer, dtype, device, parameters};
        config: the settings;
        tasks {name: {group, fingerprint, output_type, num_fewshot, n, metrics {name: {value, stderr, low, high}},
            counts, letters (multiple choice), items: one row per document}};
        groups {name: {n, metrics}}: size-weighted means over the sub-tasks with pooled standard errors (accuracies;
            perplexities are not averaged).

    Raises:
        ValueError, FileNotFoundError: tasks, data or settings that do not fit, before the model is loaded.
    """
    bound = load_tasks(tasks, num_fewshot)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit}; allowed: 1 and more")
    examples = [task.examples(limit, mode, seed) for task in bound]
    folder = Path(model) if isinstance(model, str | Path) else None
    stop_ids: tuple[int, ...] | None = None
    if isinstance(model, tuple):
        decoder, tokenizer = model
    else:
        decoder, tokenizer, stop_ids = load_model(model, dtype, device)
    decoder.eval()
    scorer = Scorer(decoder, tokenizer, max_length, batch_tokens)
    encoder = Encoder(tokenizer, scorer.max_length, mode, add_bos)

    results: dict[str, dict[str, Any]] = {}
    for task, own in zip(bound, examples):
        result = run_task(task, own, scorer, encoder, stop_ids, progress)
        results[task.name] = {
            "group": task.group,
            "fingerprint": task.fingerprint,
            "output_type": task.task.output_type,
            "num_fewshot": task.task.num_fewshot,
            **result,
        }
    groups = _groups(results)
    manifest = make_manifest(
        "eval",
        inputs={str(path): {"sha256": sha256_file(path)} for task in bound for path in task.used_files().values()},
        config={
            "mode": mode,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "add_bos": encoder.add_bos,
            "max_length": scorer.max_length,
            "batch_tokens": batch_tokens,
            "seed": seed,
        },
        figures={
            name: {metric: figure["value"] for metric, figure in result["metrics"].items()}
            for name, result in {**groups, **results}.items()
        },
        model={
            "path": None if folder is None else str(folder),
            "weights": fingerprint_of_decoder(decoder) if folder is None else fingerprint_of_folder(folder),
            "tokenizer": tokenizer.fingerprint,
            "dtype": str(decoder.head_weight.dtype).removeprefix("torch."),
            "device": str(decoder.head_weight.device),
            "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
        },
        tasks=results,
        groups=groups,
    )
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, json.dumps(_json_safe(manifest), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return manifest


def run_task(
    task: BoundTask,
    examples: list[Example],
    scorer: Scorer,
    encoder: Encoder,
    stop_ids: tuple[int, ...] | None,
    progress: Progress | None,
) -> dict[str, Any]:
    report = None if progress is None else lambda done, total: progress(task.name, done, total)
    if task.task.output_type == "multiple_choice":
        return multiple_choice(scorer, encoder, [example.item for example in examples if example.item], report)
    if task.task.output_type == "loglikelihood_rolling":
        return perplexity(scorer, encoder, [(example.id, example.target) for example in examples], report)
    result = _generate(task.task, examples, scorer, encoder, stop_ids)
    if report is not None:
        report(len(examples), len(examples))
    return result


def _generate(
    task: Task, examples: list[Example], scorer: Scorer, encoder: Encoder, stop_ids: tuple[int, ...] | None
) -> dict[str, Any]:
    answers = generate_until(
        scorer.decoder,
        encoder,
        [example.context for example in examples],
        task.until,
        task.generation_kwargs.max_gen_toks,
        stop_ids=stop_ids,
    )
    metric = task.metric_list[0]
    rows: list[dict[str, Any]] = []
    correct: dict[str, list[bool]] = {}  # the answer as it is, or what each filter extracts from it
    for example, answer in zip(examples, answers):
        row = {"id": example.id, "target": example.target, **asdict(answer)}
        readings: dict[str, str] = {metric.metric: answer.text}
        if task.filter_list:
            readings = {f"{metric.metric},{one.name}": extract(answer.text, one) for one in task.filter_list}
        for name, reading in readings.items():
            correct.setdefault(name, []).append(exact_match(reading, example.target, metric))
            row[name] = {"correct": correct[name][-1], "extracted": reading}
        rows.append(row)
    return {
        "metrics": {name: accuracy(values) for name, values in correct.items()},
        "n": len(rows),
        "counts": {
            **{f"stop_{reason}": count for reason, count in Counter(row["stop_reason"] for row in rows).items()},
            "truncated_prompts": sum(row["truncated"] > 0 for row in rows),
            "empty_answers": sum(not row["text"].strip() for row in rows),
        },
        "items": rows,
    }


def _groups(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    members: dict[str, list[dict[str, Any]]] = {}
    for result in results.values():
        if result["group"] is not None and result["output_type"] != "loglikelihood_rolling":
            members.setdefault(result["group"], []).append(result)
    return {name: _pooled(group) for name, group in members.items()}


def _pooled(results: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = [result["n"] for result in results]
    metrics = {}
    for name in results[0]["metrics"]:
        figures = [result["metrics"][name] for result in results]
        value = sum(n * figure["value"] for n, figure in zip(sizes, figures)) / sum(sizes)
        stderr = pooled_stderr([figure["stderr"] for figure in figures], sizes)
        low, high = normal_interval(value, stderr)
        metrics[name] = {"value": value, "stderr": stderr, "low": low, "high": high}
    return {"n": sum(sizes), "metrics": metrics}


def _json_safe(value: Any) -> Any:
    """JSON has no infinity and no nan: both become null."""
    if isinstance(value, dict):
        return {key: _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
