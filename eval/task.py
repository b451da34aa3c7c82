"""Tasks: small YAML files that say how rows of a data file become prompts. Touches YAML and data files, no model.

The keys and their meaning are lm-evaluation-harness' where the prompt is the same (doc_to_text, doc_to_choice,
doc_to_target, description, num_fewshot, fewshot_split, fewshot_config.sampler, target_delimiter, fewshot_delimiter,
generation_kwargs, filter_list, metric_list), so that one of its YAML files needs little more than `data_files`; tasks
in eval/tasks/ carry its names where the prompts are byte-identical. Unknown keys are refused.

A prompt is: description, k times (text, target_delimiter, answer, fewshot_delimiter), text.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import functools
import glob
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import jinja2.sandbox
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..data.files import sha256_file, sha256_json
from .encoding import Mode
from .multiple_choice import Item

BUILT_IN = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234  # the harness' default

Doc = dict[str, Any]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FewshotConfig(Strict):
    sampler: Literal["first_n", "default"] = "default"


class GenerationKwargs(Strict):
    until: list[str] | None = None  # None: the fewshot_delimiter, as in the harness
    max_gen_toks: Annotated[int, Field(ge=1)] = 256
    do_sample: Literal[False] = False
    temperature: Literal[0] = 0


class FilterStep(Strict):
    function: Literal["regex", "take_first"]
    regex_pattern: str = r"#### (\-?[0-9\.\,]+)"
    group_select: int = 0
    fallback: str = "[invalid]"


class Filter(Strict):
    name: str
    filter: list[FilterStep]


class ExactMatch(Strict):
    metric: Literal["exact_match"] = "exact_match"
    ignore_case: bool = False
    ignore_punctuation: bool = False
    regexes_to_ignore: list[str] = []
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True


class Task(Strict):
    """One YAML file.

    Of steep's own: `data_files` {split: path relative to the data folder; .jsonl, .json, .csv, .parquet}, where
    `{subject}` in a path makes one sub-task per matching file, named task_subject, with the field `subject` in its
    rows; `columns`, the names of a csv file without a header row; `doc_id`, a field or template that names a row in
    the results (default: its number). `doc_to_*` hold the name of a field or a Jinja template over the fields.
    """

    task: str
    output_type: Literal["multiple_choice", "loglikelihood_rolling", "generate_until"]
    data_files: dict[str, str]
    columns: list[str] | None = None
    doc_id: str | None = None
    test_split: str = "test"
    fewshot_split: str | None = None
    fewshot_config: FewshotConfig = FewshotConfig()
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    description: str = ""
    doc_to_text: str = ""
    doc_to_choice: list[str] | str | None = None
    doc_to_target: str
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    generation_kwargs: GenerationKwargs = GenerationKwargs()
    filter_list: list[Filter] = []
    metric_list: list[ExactMatch] = [ExactMatch()]

    @model_validator(mode="after")
    def _possible(self) -> Task:
        def refuse_unless(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        choice, generate = self.output_type == "multiple_choice", self.output_type == "generate_until"
        refuse_unless(self.test_split in self.data_files, f"data_files has no entry for test_split {self.test_split!r}")
        refuse_unless(choice == (self.doc_to_choice is not None), "doc_to_choice belongs to multiple_choice, always")
        refuse_unless(
            bool(self.doc_to_text) == (self.output_type != "loglikelihood_rolling"),
            "doc_to_text is needed, except for loglikelihood_rolling, whose text is doc_to_target",
        )
        refuse_unless(generate or not self.filter_list, "filter_list belongs to generate_until")
        refuse_unless(len(self.metric_list) == 1, "metric_list: exactly one entry, exact_match")
        refuse_unless(
            not self.num_fewshot or self.output_type != "loglikelihood_rolling",
            "num_fewshot must be 0 for loglikelihood_rolling",
        )
        refuse_unless(
            not self.num_fewshot or self.fewshot_split in self.data_files,
            f"num_fewshot is {self.num_fewshot}, but data_files has no entry for fewshot_split {self.fewshot_split!r}",
        )
        return self

    @property
    def until(self) -> list[str]:
        given = self.generation_kwargs.until
        return [self.fewshot_delimiter] if given is None else given


@dataclass(frozen=True)
class BoundTask:
    """A task with its data files: what is evaluated. `group` is the task's name if it is one of several subjects."""

    name: str
    group: str | None
    task: Task
    files: dict[str, Path]
    subject: str | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the prompts: the task and the bytes of its files."""
        files = {split: sha256_file(path) for split, path in self.used_files().items()}
        return sha256_json({"task": self.task.model_dump(mode="json"), "subject": self.subject, "files": files})

    def used_files(self) -> dict[str, Path]:
        splits = {self.task.test_split} | ({self.task.fewshot_split} if self.task.num_fewshot else set())
        return {split: self.files[split] for split in sorted(filter(None, splits))}

    def documents(self, split: str) -> list[Doc]:
        extra = {} if self.subject is None else {"subject": self.subject}
        return [{**extra, **doc} for doc in read_documents(self.files[split], self.task.columns)]

    def examples(self, limit: int | None = None, mode: Mode = "clean", seed: int = FEWSHOT_SEED) -> list[Example]:
        """The prompts of the first `limit` documents.

        Few-shot examples: `first_n` takes the first of the split; `default` draws at random - in the clean mode by
        (seed, document id), so that a document's prompt depends on nothing else; in the lmeval mode from one generator
        that advances from document to document, as the harness does on one process.

        Raises:
            ValueError: naming file and row: a template that does not render, a missing gold answer, fewer than two
                choices, an empty or repeated choice, a repeated document id, too few documents for the shots.
        """
        docs = self.documents(self.task.test_split)[:limit]
        if not docs:
            raise ValueError(f"{self.files[self.task.test_split]}: no documents")
        pool = self.documents(self.task.fewshot_split) if self.task.num_fewshot and self.task.fewshot_split else []
        sequential = random.Random(seed)
        examples, seen = [], set()
        for row, doc in enumerate(docs):
            where = f"{self.files[self.task.test_split]}: row {row}"
            id = str(row) if self.task.doc_id is None else render(self.task.doc_id, doc, f"{where}: doc_id")
            if id in seen:
                raise ValueError(f"{where}: document id {id!r} occurs twice")
            seen.add(id)
            generator = sequential if mode == "lmeval" else random.Random(f"{seed}:{id}")
            shots = self._shots(pool, doc, generator)
            examples.append(self._example(id, doc, shots, where))
        return examples

    def _shots(self, pool: list[Doc], doc: Doc, generator: random.Random) -> list[Doc]:
        n = self.task.num_fewshot
        if n == 0:
            return []
        same_split = self.task.fewshot_split == self.task.test_split
        if len(pool) < n + same_split:
            raise ValueError(f"task {self.name}: {len(pool)} documents to draw {n} few-shot examples from, too few")
        if self.task.fewshot_config.sampler == "first_n":
            candidates = pool[: n + 1] if same_split else pool
        else:
            candidates = generator.sample(pool, n + same_split)
        if same_split:
            candidates = [other for other in candidates if other != doc]
            if len(candidates) < n:  # the pool holds copies of this document
                candidates = [other for other in pool if other != doc]
                if self.task.fewshot_config.sampler != "first_n":
                    candidates = generator.sample(candidates, n)
        return candidates[:n]

    def _example(self, id: str, doc: Doc, shots: list[Doc], where: str) -> Example:
        task = self.task
        parts = [render_template(task.description, doc, f"{where}: description")]
        for shot in shots:
            parts += [
                render(task.doc_to_text, shot, f"{where}: doc_to_text of a few-shot example"),
                task.target_delimiter,
                self._answer(shot, f"{where}: few-shot example"),
                task.fewshot_delimiter,
            ]
        if task.doc_to_text:
            parts.append(render(task.doc_to_text, doc, f"{where}: doc_to_text"))
        context = "".join(parts)
        if task.output_type != "multiple_choice":
            return Example(id, context, render(task.doc_to_target, doc, f"{where}: doc_to_target"), None)
        choices, gold = self._choices_and_gold(doc, where)
        continuations = tuple(task.target_delimiter + choice for choice in choices)
        return Example(id, context, choices[gold], Item(id, context, choices, continuations, gold))

    def _answer(self, doc: Doc, where: str) -> str:
        if self.task.output_type == "multiple_choice":
            choices, gold = self._choices_and_gold(doc, where)
            return choices[gold]
        return render(self.task.doc_to_target, doc, f"{where}: doc_to_target")

    def _choices_and_gold(self, doc: Doc, where: str) -> tuple[tuple[str, ...], int]:
        template = self.task.doc_to_choice
        choices: Any = template
        if isinstance(template, str):
            choices = doc[template] if template in doc else self._literal(template, doc, where)
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"{where}: doc_to_choice gives {choices!r}; allowed: two or more non-empty strings")
        gold = self._gold(doc, choices, where)
        if gold is None or not 0 <= gold < len(choices):
            given = render(self.task.doc_to_target, doc, f"{where}: doc_to_target")
            raise ValueError(
                f"{where}: doc_to_target gives {given!r}; allowed: one of {choices}, or its place from 0"
            )
        return tuple(choices), gold

    def _gold(self, doc: Doc, choices: list[str], where: str) -> int | None:
        """A field may hold the choice or its place; a template that gives digits means the place, as in the harness."""
        target = render(self.task.doc_to_target, doc, f"{where}: doc_to_target")
        is_choice = target in choices and isinstance(doc.get(self.task.doc_to_target), str)
        if target.isdigit() and not is_choice:
            return int(target)
        return choices.index(target) if target in choices else None

    def _literal(self, template: str, doc: Doc, where: str) -> Any:
        text = render_template(template, doc, f"{where}: doc_to_choice")
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"{where}: doc_to_choice gives {text!r}, which is not a list of strings") from None


@dataclass(frozen=True)
class Example:
    """One document as a prompt, the right answer (for perplexity: the text to predict), its multiple choice if any."""

    id: str
    context: str
    target: str
    item: Item | None


def load_tasks(names: Sequence[str | Task | BoundTask], num_fewshot: int | None = None) -> list[BoundTask]:
    """Tasks with their data, one per subject.

    Args:
        names: `NAME:PATH` (a task of steep, or one of its subjects such as mmlu_anatomy, with the folder that holds its
            data_files, or the test file alone), `FILE.yaml` (data_files are relative to its folder) or
            `FILE.yaml:PATH`; or tasks made in Python.
        num_fewshot: overrides the tasks' own, where not None.

    Raises:
        ValueError: an unknown task or key, or a task named twice. FileNotFoundError: a missing file.
    """
    bound: list[BoundTask] = []
    for name in names:
        bound += [name] if isinstance(name, BoundTask) else _bind(name, num_fewshot)
    if not bound:
        raise ValueError("no tasks given")
    for task in bound:
        if sum(task.name == other.name for other in bound) > 1:
            raise ValueError(f"task {task.name} is given twice")
    return bound


def _bind(name: str | Task, num_fewshot: int | None) -> list[BoundTask]:
    if isinstance(name, Task):
        task, wanted, place = name, name.task, Path(".")
    else:
        source, _, given = name.partition(":")
        built_in = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
        if source.endswith((".yaml", ".yml")):
            task = read_task(Path(source))
            wanted, place = task.task, Path(given) if given else Path(source).parent
        else:
            known = [stem for stem in built_in if source == stem or source.startswith(stem + "_")]
            if not known:
                raise ValueError(f"task {source!r} is unknown; allowed: a YAML file, or {', '.join(built_in)}")
            if not given:
                raise ValueError(f"task {source!r}: where is its data? Write {source}:PATH")
            task = read_task(BUILT_IN / f"{max(known, key=len)}.yaml")
            wanted, place = source, Path(given)
    if num_fewshot is not None:
        task = _validated({**task.model_dump(), "num_fewshot": num_fewshot}, f"task {task.task}")
    if place.is_file():
        if task.num_fewshot:
            raise ValueError(f"task {task.task}: {place} is one file, but {task.num_fewshot} shots need the folder")
        return [BoundTask(wanted, None, task, {task.test_split: place})]
    tasks = list(_subjects(task, place))
    if wanted != task.task:
        tasks = [dataclasses.replace(one, group=None) for one in tasks if one.name == wanted]
        if not tasks:
            raise ValueError(f"task {task.task}: no subject of {place} is named {wanted!r}")
    return tasks


def _subjects(task: Task, folder: Path) -> Iterator[BoundTask]:
    needed = {task.test_split} | ({task.fewshot_split} if task.num_fewshot and task.fewshot_split else set())
    paths = {split: folder / task.data_files[split] for split in sorted(needed)}
    test = str(paths[task.test_split])
    if "{subject}" not in test:
        for path in paths.values():
            _check_file(path, task)
        yield BoundTask(task.task, None, task, paths)
        return
    before, after = test.split("{subject}", 1)
    matches = sorted(glob.glob(glob.escape(before) + "*" + glob.escape(after)))
    if not matches:
        raise FileNotFoundError(f"{test}: no such files, which task {task.task} needs")
    for match in matches:
        subject = match[len(before) : len(match) - len(after)]
        files = {split: Path(str(path).replace("{subject}", subject)) for split, path in paths.items()}
        for path in files.values():
            _check_file(path, task)
        yield BoundTask(f"{task.task}_{subject}", task.task, task, files, subject)


def _check_file(path: Path, task: Task) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, which task {task.task} needs")


def read_task(path: Path) -> Task:
    """A task from its YAML file. ValueError names the file and the key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such task file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(content).__name__}")
    return _validated(content, str(path))


def _validated(content: dict[str, Any], where: str) -> Task:
    try:
        return Task.model_validate(content)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"])) or "task"
            if problem["type"] == "extra_forbidden":
                problems.append(f"{key}: unknown key; allowed: {', '.join(Task.model_fields)}")
            else:
                problems.append(f"{key}: {problem['msg']}, given {str(problem['input'])[:200]!r}")
        raise ValueError(f"{where}: " + "; ".join(problems)) from None


def read_documents(path: Path, columns: Sequence[str] | None = None) -> list[Doc]:
    """Rows of a data file as dicts; a `.json` file holds one list or one object per line. csv values are strings."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if suffix not in (".csv", ".jsonl", ".json"):
        raise ValueError(f"{path}: files of kind {suffix!r} are not read; allowed: .jsonl, .json, .csv, .parquet")
    text = path.read_text(encoding="utf-8-sig")
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), fieldnames=columns, strict=True)
        docs = list(reader)
        for row, doc in enumerate(docs):
            if None in doc or None in doc.values():
                raise ValueError(f"{path}: row {row} does not have the {len(reader.fieldnames or [])} columns")
        return docs
    if suffix == ".json" and text.lstrip().startswith("["):
        docs = json.loads(text)
    else:
        docs = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                docs += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
    for row, doc in enumerate(docs):
        if not isinstance(doc, dict):
            raise ValueError(f"{path}: row {row} is a {type(doc).__name__}, expected an object")
    return docs


# Sandboxed: task files come from other people.
_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)
_ENVIRONMENT.filters["regex_replace"] = lambda text, pattern, replacement: re.sub(pattern, replacement, text)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def render(template: str, doc: Doc, where: str) -> str:
    """The field of that name if there is one, else the rendered template."""
    if template not in doc:
        return render_template(template, doc, where)
    if doc[template] is None:
        raise ValueError(f"{where}: the field {template!r} is empty")
    return str(doc[template])


def render_template(template: str, doc: Doc, where: str) -> str:
    try:
        return _compiled(template).render(**doc)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{where}: the template {template!r} does not render: {error}") from None
