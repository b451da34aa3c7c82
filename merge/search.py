"""Search: which strength, density, method is best by evaluation results, without writing a model until it is known.

Every point of the space is merged straight into a Decoder's live weights (live.py) and measured on two evaluation sets:
the domain, where gain is wanted, and the general one, where there shall be little loss; both against a reference. The
point that wins by the rule of the configuration is written by the executor into OUT/model, loaded again, and measured
on held-out data that the search did not see.

OUT holds `evaluations.jsonl`, to which every evaluation is added as it is made and from which the same command goes on;
at the end `model/`, `search.json`, and `search.html` to look at. Reads models and data; `steep.eval` comes in as an
argument, for it stands beside this package.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.files import atomic_write, hash_inputs, make_manifest, read_json, sha256_file, sha256_json, versions
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..engine.config import ModelConfig
from ..engine.generate import stop_ids_of
from ..engine.model import Decoder
from ..engine.weights import load_weights
from .config import parse_config, read_yaml
from .executor import Output, execute, find_device
from .live import live_decoder, live_tokenizer, merge_live
from .manifest import MERGE_JSON
from .plan import MergePlan, plan_merge
from .search_config import ObjectiveConfig, Point, Range, SearchConfig, grid_size, put, read_search, told
from .search_journal import SearchJournal, open_journal
from .search_strategy import import_cma, propose
from .search_view import html

KIND = "merge search"
MODEL, SEARCH_JSON, SEARCH_HTML = "model", "search.json", "search.html"
NAMES = ("domain", "general")
FAR = 1e9  # cost of a point that loses too much; twice that of one that failed: only the order counts


class Objective(Protocol):
    """What measures a model: `eval.TaskObjective`."""

    @property
    def minimised(self) -> bool: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def documents(self) -> frozenset[str]: ...
    def __call__(self, decoder: Decoder, tokenizer: Tokenizer, stop_ids: tuple[int, ...] | None = None) -> float: ...


TaskFactory = Callable[[str, str | None, int | None, int | None, Path | None], Objective]


@dataclass(frozen=True)
class CallableObjective:
    """A Python function of a Decoder."""

    function: Callable[[Decoder], float]
    minimised: bool
    identity: dict[str, Any]


def search(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    budget: int | None = None,
    device: str = "cpu",
    task_objective: TaskFactory | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Search, write the best merge, confirm it. The same call goes on with a search that was interrupted.

    Args:
        config: path of the search's YAML, or its content as a mapping (search_config.py).
        out: folder to create, or that of the interrupted search.
        budget: evaluations at most, instead of the YAML's; a search may go on with another one.
        device: where merges are made and evaluated: cpu, cuda or cuda:N.
        task_objective: `steep.eval.task_objective`; needed where the configuration names tasks.
        log: called with lines for a person.

    Returns:
        The content of `search.json`: every evaluation with gain and loss, the front, the winner or why there is none,
        and the held-out figures with a verdict.

    Raises:
        FileNotFoundError, FileExistsError, ImportError: before any work.
        ValueError: before any work, for everything that configuration and headers tell; if no point can be evaluated.
    """
    log = log or (lambda line: None)
    started = time.monotonic()
    written, folder, files = read_search(config, budget)
    find_device(device)
    if written.strategy == "cmaes":
        import_cma()
    out = Path(out)
    if (out / SEARCH_JSON).exists():
        raise FileExistsError(f"{out}: holds a finished search; choose another output")
    space = _Space(written, folder, files)
    objectives = {
        data: [_objective(getattr(written.objectives, name), data, folder, task_objective, name) for name in NAMES]
        for data in ("search", "held_out")
    }
    for name, seen, held_out in zip(NAMES, objectives["search"], objectives["held_out"]):
        if seen.identity == held_out.identity:
            raise ValueError(f"objectives.{name}.held_out: is the data that the search sees; other data is needed")
    plans = [*space.check(None if (out / MODEL).exists() else out / MODEL), space.reference()]
    live_decoder(plans[0], device="meta")  # is it an architecture that the engine knows?
    warnings = _overlaps(objectives)
    for line in (*plans[0].summary(), *(f"warning: {text}" for text in warnings)):
        log(line)
    models = sorted({file for plan in plans for file in plan.input_files})
    identity = _identity(space, objectives, models)
    with open_journal(out, identity) as journal:
        if journal.taken_over:
            log(f"{out}: {journal.taken_over} evaluations were made by an earlier run")
        meter = _Meter(space, objectives, journal, device, log)
        found = _all_points(meter, log)
        result = _conclude(meter, found, out, log)
        record = make_manifest(
            KIND,
            inputs=hash_inputs([*space.files, *models]),
            config=written.model_dump(mode="json"),
            seconds=round(time.monotonic() - started, 3),
            taken_over=journal.taken_over,
            warnings=warnings,
            searched=identity,
            **result,
        )
        atomic_write(out / SEARCH_HTML, html(record))
        atomic_write(out / SEARCH_JSON, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return record


class _Space:
    """The configuration of the merge at every point, planned."""

    def __init__(self, config: SearchConfig, folder: Path | None, files: tuple[Path, ...]) -> None:
        self.config, self.folder, self.files = config, folder, files
        if isinstance(config.merge, str):
            path = Path(config.merge)
            path = folder / path if folder and (folder / path).is_file() else path
            self.merge, self.folder, self.files = read_yaml(path), path.resolve().parent, (*files, path)
        else:
            self.merge = config.merge
        self.first: Point = {
            key: dimension.at(0.5) if isinstance(dimension, Range) else dimension.choices[0]
            for key, dimension in config.space.items()
        }

    def plan(self, point: Point, out: Path | None = None) -> MergePlan:
        written = put(self.merge, point)
        return plan_merge(parse_config(written, f"merge at {told(point)}"), self.folder, out=out)

    def reference(self) -> MergePlan:
        """The reference model as a merge of one."""
        model = self.config.reference or self.merge.get("base_model")
        if model is None:
            parsed = parse_config(put(self.merge, self.first), "merge")
            models = [entry.model for entry in parsed.models]
            models += [source.model for piece in parsed.slices for source in piece.sources]
            if not models:
                raise ValueError("reference: needed, for the merge has neither base_model, models nor slices")
            model = models[0]
        written = {"merge_method": "passthrough", "models": [{"model": model}]}
        return plan_merge(parse_config(written, "reference"), self.folder)

    def check(self, out: Path | None) -> list[MergePlan]:
        """Plan the middle of all ranges with every choice, look at both ends of all ranges, and whether each dimension
        has an effect; those plans."""
        space = self.config.space
        points = [self.first]
        points += [self.first | {key: value} for key, d in self.config.choices.items() for value in d.choices[1:]]
        plans = []
        for number, point in enumerate(points):
            plans.append(self.plan(point, None if number else out))
            for share in (0, 1):
                ends = point | {key: d.at(share) for key, d in self.config.ranges.items()}
                parse_config(put(self.merge, ends), f"merge at {told(ends)}")
        for key, dimension in space.items():
            others = [dimension.at(0), dimension.at(1)] if isinstance(dimension, Range) else dimension.choices
            if len(others) > 1 and not any(self._has_effect(p, plan, key, others) for p, plan in zip(points, plans)):
                raise ValueError(
                    f"space: {key!r} has no effect on any tensor: the method does not read it, a more specific place "
                    "in the configuration goes before it, or its filter is in no tensor's name"
                )
        return plans

    def _has_effect(self, point: Point, plan: MergePlan, key: str, values: list[Any]) -> bool:
        for value in values:
            try:
                other = self.plan(point | {key: value})
            except ValueError:  # the end of a range may be no possible merge, say if weights sum to zero there
                continue
            if _recipe(other) != _recipe(plan):
                return True
        return False


def _recipe(plan: MergePlan) -> Any:
    return plan.tensors, plan.model_labels, plan.config.random_seed, plan.written, plan.carried


class _Meter:
    """Measures points, each once: what the journal has is not measured again."""

    def __init__(
        self,
        space: _Space,
        objectives: Mapping[str, list[Objective | CallableObjective]],
        journal: SearchJournal,
        device: str,
        log: Callable[[str], None],
    ) -> None:
        self.space, self.objectives, self.journal, self.device, self.log = space, objectives, journal, device, log
        self.config = space.config
        self.decoder: Decoder | None = None
        self._texts: tuple[str, tuple[Tokenizer, tuple[int, ...]]] | None = None

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.config.dtype == "float32" else torch.bfloat16

    def point(self, point: Point) -> dict[str, Any]:
        """A point of the space on the search's data. What cannot be merged there, or gives no number, has an `error`;
        errors of the objectives themselves are raised."""
        if (line := self.journal.get("search", point)) is not None:
            return line
        started = time.monotonic()
        try:
            plan = self.space.plan(point)
            weights = self._merge(plan)
        except ValueError as error:
            seconds = round(time.monotonic() - started, 3)
            return self.journal.add("search", point, {"error": str(error), "seconds": seconds})
        values = self._values("search", lambda: self._text(plan))
        line = values | {"weights": weights, "seconds": round(time.monotonic() - started, 3)}
        return self.journal.add("search", point, line)

    def reference(self, data: str) -> dict[str, Any]:
        if (line := self.journal.get(data, None)) is None:
            plan = self.space.reference()
            weights = self._merge(plan)
            line = self.journal.add(data, None, self._values(data, lambda: self._text(plan)) | {"weights": weights})
        if "error" in line:
            raise ValueError(f"the reference, {self.space.reference().model_labels[0]}: {line['error']}")
        return line

    def written(self, point: Point, folder: Path) -> dict[str, Any]:
        """The model in a folder, which was merged at a point, on the held-out data."""
        if (line := self.journal.get("held_out", point)) is not None:
            return line
        self.decoder = None
        with torch.device("meta"):
            self.decoder = Decoder(ModelConfig.from_folder(folder))
        load_weights(self.decoder, folder, self.dtype, self.device)
        self.decoder.eval()
        values = self._values("held_out", lambda: (load_tokenizer(folder), stop_ids_of(folder)))
        return self.journal.add("held_out", point, values)

    def _merge(self, plan: MergePlan) -> str:
        """Merge into the decoder at hand; the hash of all weights."""
        wanted = ModelConfig.from_dict(plan.config_json, str(plan.config_donor))
        if self.decoder is None or self.decoder.config != wanted:
            self.decoder = None  # its memory first
            self.decoder = live_decoder(plan, self.dtype, self.device)
        return sha256_json(merge_live(plan, self.decoder))

    def _values(self, data: str, texts: Callable[[], tuple[Tokenizer, tuple[int, ...]]]) -> dict[str, Any]:
        """{"domain", "general"}: numbers; of what is no number None, and an `error`."""
        assert self.decoder is not None
        found: dict[str, Any] = {}
        problems = []
        for name, objective in zip(NAMES, self.objectives[data]):
            try:
                if isinstance(objective, CallableObjective):
                    value = float(objective.function(self.decoder))
                else:
                    value = objective(self.decoder, *texts())
            except Exception as error:
                error.add_note(f"raised by objectives.{name} ({data} data)")
                raise
            found[name] = value if math.isfinite(value) else None
            if not math.isfinite(value):
                problems.append(f"{name} is {value}")
        return found | ({"error": ", ".join(problems)} if problems else {})

    def _text(self, plan: MergePlan) -> tuple[Tokenizer, tuple[int, ...]]:
        """Of most merges the same as of the one before."""
        key = sha256_json([plan.config_json, plan.written, [str(file) for _, file in plan.carried]])
        if self._texts is None or self._texts[0] != key:
            self._texts = (key, live_tokenizer(plan))
        return self._texts[1]


def _all_points(meter: _Meter, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """The reference, then one point after the other until strategy or budget ends; lines with gain and loss."""
    config = meter.config
    reference = meter.reference("search")
    log(f"reference: domain {reference['domain']:.6g}, general {reference['general']:.6g}")
    budget = config.budget or grid_size(config)
    found: dict[str, dict[str, Any]] = {}
    proposals = propose(config)
    point = next(proposals)
    while True:
        before = meter.journal.get("search", point) is not None
        line = meter.point(point) | {"number": len(found) + 1}
        if line.get("error") is None:
            line |= _changes(meter, "search", line)
        key = json.dumps(point, sort_keys=True)
        if key not in found:
            found[key] = line
            again = " (from the journal)" if before else ""
            log(f"{len(found)}/{budget} {told(point)}: {_outcome(line)}{again}")
        if len(found) >= budget:
            break
        try:
            point = proposals.send(_cost(meter, line))
        except StopIteration:
            log(f"{config.strategy} ended after {len(found)} of {budget} evaluations")
            break
    if all("error" in line for line in found.values()):
        first = next(iter(found.values()))["error"]
        raise ValueError(f"none of {len(found)} points could be evaluated; the first: {first}")
    return list(found.values())


def _changes(meter: _Meter, data: str, line: Mapping[str, Any]) -> dict[str, float]:
    """{"gain": of the domain, "loss": of the general set} against the reference; positive is better and worse."""
    reference = meter.reference(data)
    better = {}
    for name, objective in zip(NAMES, meter.objectives[data]):
        better[name] = (reference[name] - line[name]) * (1 if objective.minimised else -1)
    return {"gain": better["domain"], "loss": 0.0 - better["general"]}


def _excess(meter: _Meter, data: str, line: Mapping[str, Any]) -> float:
    """How much more than allowed a point loses; 0: nothing."""
    return max(0.0, line["loss"] - meter.config.choose.allowed_loss(meter.reference(data)["general"]))


def _cost(meter: _Meter, line: Mapping[str, Any]) -> float:
    """What strategies minimise. Points that lose too much come behind all others, by how much (Deb 2000)."""
    if "error" in line:
        return 2 * FAR
    if excess := _excess(meter, "search", line):
        return FAR + excess
    return (meter.config.choose.general_weight or 0.0) * line["loss"] - line["gain"]


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the (gain, loss) that no other point equals or betters in both and betters in one; by gain."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0], i))
    front: list[int] = []
    best = -math.inf
    for i in order:
        if points[i][0] > best or (front and points[i] == points[front[-1]]):
            front.append(i)
            best = max(best, points[i][0])
    return front


def _conclude(meter: _Meter, found: list[dict[str, Any]], out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Front, winner, its model, its confirmation."""
    good = [line for line in found if "error" not in line]
    failed = len(found) - len(good)
    front = [good[i]["number"] for i in pareto_front([(line["gain"], line["loss"]) for line in good])]
    best = min(good, key=lambda line: (_cost(meter, line), line["loss"], line["number"]))
    reference = meter.reference("search")
    allowed = meter.config.choose.allowed_loss(reference["general"])
    result: dict[str, Any] = {
        "figures": {"evaluations": len(found), "failed": failed},
        "reference": {"model": meter.space.reference().model_labels[0], **_two(reference)},
        "allowed_loss": allowed if math.isfinite(allowed) else None,
        "evaluations": [{key: value for key, value in line.items() if key != "set"} for line in found],
        "front": front,
        "chosen": None,
        "confirmation": None,
    }
    if failed:
        log(f"{failed} of {len(found)} points failed, as the record says of each")
    if _excess(meter, "search", best):
        result["verdict"] = (
            f"no point loses at most {allowed:.6g} on the general set; the least loss is "
            f"{min(line['loss'] for line in good):.6g}; no model was written"
        )
        log(result["verdict"])
        return result
    result["chosen"] = best["number"]
    log(f"chosen: {told(best['point'])}: {_outcome(best)}")
    _write(meter, best, out / MODEL, log)
    held_out = meter.written(best["point"], out / MODEL)
    if "error" in held_out:
        result["verdict"] = f"not confirmed: on held-out data {held_out['error']}"
    else:
        changes = held_out | _changes(meter, "held_out", held_out)
        confirmed = not _excess(meter, "held_out", changes) and _cost(meter, changes) < 0 < changes["gain"]
        result["confirmation"] = {
            "reference": _two(meter.reference("held_out")),
            **{key: changes[key] for key in (*NAMES, "gain", "loss")},
            "confirmed": confirmed,
        }
        result["verdict"] = verdict(best, changes, confirmed)
    log(result["verdict"])
    return result


def verdict(seen: Mapping[str, float], held_out: Mapping[str, float], confirmed: bool) -> str:
    """What the held-out data say of a point that was chosen on the search's."""
    figures = (
        f"domain gain {seen['gain']:.6g} on the search's data, {held_out['gain']:.6g} on held-out data; "
        f"general loss {seen['loss']:.6g} and {held_out['loss']:.6g}"
    )
    if seen["gain"] <= 0:
        return f"no gain was found: {figures}"
    if not confirmed:
        return f"not confirmed: {figures}: the search has fitted its own data"
    if held_out["gain"] < seen["gain"] / 2:
        return f"confirmed in part: {figures}: less than half of the gain is left, the search has fitted its own data"
    return f"confirmed: {figures}"


def _write(meter: _Meter, best: Mapping[str, Any], out: Path, log: Callable[[str], None]) -> None:
    """The winner through the executor; its tensors must be those that were measured."""
    space, point = meter.space, best["point"]
    written = put(space.merge, point)
    if out.exists() and read_json(out / MERGE_JSON)["config"] != written:
        shutil.rmtree(out)  # an earlier run was interrupted after it had written another winner, with another budget
    if not out.exists():
        meter.decoder = None
        (record,) = execute([Output(space.plan(point, out), out, written, space.files)], meter.device)
    else:
        log(f"{out}: was written by an earlier run")
        record = read_json(out / MERGE_JSON)
    if sha256_json({name: entry["sha256"] for name, entry in record["tensors"].items()}) != best["weights"]:
        raise ValueError(f"{out}: other weights than those that were measured: an input has changed meanwhile")


def _overlaps(objectives: Mapping[str, list[Objective | CallableObjective]]) -> list[str]:
    """A warning for held-out documents that the search sees."""
    found = []
    for name, seen, held_out in zip(NAMES, objectives["search"], objectives["held_out"]):
        if isinstance(seen, CallableObjective) or isinstance(held_out, CallableObjective):
            continue
        if common := seen.documents & held_out.documents:
            found.append(f"{name}: {len(common)} of {len(held_out.documents)} held-out documents are the search's too")
    return found


def _identity(
    space: _Space, objectives: Mapping[str, list[Objective | CallableObjective]], models: list[Path]
) -> dict[str, Any]:
    """All that evaluations depend on. The budget is none of it: a search may go on with another one."""
    config = space.config
    return {
        "merge": space.merge,
        "space": {key: dimension.model_dump(mode="json") for key, dimension in config.space.items()},
        "objectives": {data: [one.identity for one in each] for data, each in objectives.items()},
        **config.model_dump(mode="json", include={"strategy", "choose", "seed", "reference", "dtype"}),
        "inputs": {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in models},
        "versions": versions("cma") if config.strategy == "cmaes" else versions(),
    }


def _objective(
    config: ObjectiveConfig, data: str, folder: Path | None, task_objective: TaskFactory | None, name: str
) -> Objective | CallableObjective:
    where = f"objectives.{name}" + (".held_out" if data == "held_out" else "")
    source = config.held_out if data == "held_out" else config.source
    try:
        if config.callable is not None:
            return _callable(source, config.direction == "min", folder)
        if task_objective is None:
            raise ValueError(f"{source!r} is a task: pass task_objective=steep.eval.task_objective")
        return task_objective(source, config.metric, config.limit, config.num_fewshot, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _callable(source: str, minimised: bool, folder: Path | None) -> CallableObjective:
    """MODULE:FUNCTION, from Python's path or from the folder of the YAML."""
    module_name, colon, name = source.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"expected MODULE:FUNCTION, found {source!r}")
    with _importing_from(folder):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{source!r}: {error}; looked in Python's path and beside the configuration") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{source!r}: {module_name} has no function {name!r}")
    file = inspect.getsourcefile(module)
    identity = {"callable": source, "minimised": minimised, "sha256": sha256_file(Path(file)) if file else None}
    return CallableObjective(function, minimised, identity)


@contextmanager
def _importing_from(folder: Path | None):  # type: ignore[no-untyped-def]
    """The folder comes last: it hides nothing."""
    if folder is not None:
        sys.path.append(str(folder))
    try:
        yield
    finally:
        if folder is not None:
            sys.path.remove(str(folder))


def _outcome(line: Mapping[str, Any]) -> str:
    if "error" in line:
        return f"failed: {' '.join(line['error'].split())}"
    values = f"domain {line['domain']:.6g} (gain {line['gain']:+.4g}), general {line['general']:.6g}"
    return f"{values} (loss {line['loss']:+.4g})"


def _two(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: line[name] for name in NAMES}
