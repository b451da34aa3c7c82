"""One number from one evaluation set, again and again for a Decoder whose weights change: what a search asks for.

The data is read and checked once; scoring touches no file and hashes no weights. Beneath it is what `evaluate` runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import sha256_file
from ..data.tokenizer import Tokenizer
from ..engine.model import Decoder
from .encoding import Encoder
from .evaluate import run_task
from .perplexity import perplexity
from .scorer import Scorer
from .task import BoundTask, Example, load_tasks

METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity", "word_perplexity", "token_perplexity"),
    "generate_until": ("exact_match",),
}
MINIMISED = METRICS["loglikelihood_rolling"]


@dataclass(frozen=True)
class TaskObjective:
    """A task's metric, or that of a text. `identity`: all that the number depends on besides the model."""

    metric: str
    identity: dict[str, Any]
    tasks: list[tuple[BoundTask, list[Example]]] = field(repr=False)
    text: str | None = field(default=None, repr=False)
    batch_tokens: int = 8192

    @property
    def minimised(self) -> bool:
        return self.metric in MINIMISED

    @property
    def documents(self) -> frozenset[str]:
        """What the model sees and what it should say, of every document."""
        found = {f"{example.context}\0{example.target}" for _, examples in self.tasks for example in examples}
        return frozenset(found if self.text is None else {f"\0{self.text}"})

    def __call__(self, decoder: Decoder, tokenizer: Tokenizer, stop_ids: tuple[int, ...] | None = None) -> float:
        """The metric, over all subjects of a task by their numbers of questions.

        stop_ids: where generated answers end; None: where the decoder's configuration says.
        """
        scorer = Scorer(decoder, tokenizer, None, self.batch_tokens)
        encoder = Encoder(tokenizer, scorer.max_length, "clean", None)
        if self.text is not None:
            results = [perplexity(scorer, encoder, [("0", self.text)])]
        else:
            results = [run_task(task, examples, scorer, encoder, stop_ids, None) for task, examples in self.tasks]
        total = sum(result["n"] for result in results)
        return math.fsum(result["n"] * result["metrics"][self.metric]["value"] for result in results) / total


def task_objective(
    source: str,
    metric: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    folder: Path | None = None,
) -> TaskObjective:
    """An objective made of a task or a text.

    Args:
        source: as `load_tasks` takes it, `perplexity:FILE.jsonl` for one; or a text, FILE.txt, which is one document.
        metric: default: bits_per_byte, acc or exact_match, whichever the task has.
        limit: only the first documents, of each subject.
        folder: where relative paths are looked for first; then in the current folder.

    Raises:
        ValueError, FileNotFoundError: naming what was given, and what is allowed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit}; allowed: 1 and more")
    if source.endswith(".txt"):
        path = Path(_found(source, folder))
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text")
        if limit is not None or num_fewshot is not None:
            raise ValueError(f"{source}: a text is one document and has neither limit nor num_fewshot")
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"{path}: the text is empty")
        metric = _metric(source, metric, "loglikelihood_rolling", [])
        return TaskObjective(metric, {"text": sha256_file(path), "metric": metric}, [], text)
    name, colon, place = source.partition(":")
    if name.endswith((".yaml", ".yml")):
        name = _found(name, folder)
    bound = load_tasks([f"{name}:{_found(place, folder)}" if colon else name], num_fewshot)
    kind, filters = bound[0].task.output_type, [one.name for one in bound[0].task.filter_list]
    if kind == "loglikelihood_rolling" and len(bound) > 1:
        raise ValueError(f"{source}: perplexities of {len(bound)} subjects are not averaged; name one of them")
    metric = _metric(source, metric, kind, filters)
    tasks = [(task, task.examples(limit)) for task in bound]
    identity = {"tasks": {task.name: task.fingerprint for task in bound}, "metric": metric, "limit": limit}
    return TaskObjective(metric, identity, tasks)


def _metric(source: str, metric: str | None, kind: str, filters: list[str]) -> str:
    names = [f"{name},{one}" for name in METRICS[kind] for one in filters] or list(METRICS[kind])
    if metric is not None and metric not in names:
        raise ValueError(f"{source}: metric {metric!r}; allowed: {', '.join(names)}")
    return metric or names[0]


def _found(path: str, folder: Path | None) -> str:
    """A relative path in `folder`, if something is there."""
    return str(folder / path) if folder is not None and (folder / path).exists() else path
