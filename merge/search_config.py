"""What a search is asked for: the YAML, and the points of its space put into the merge's configuration. No weights.

    merge: MERGE.yaml                           # or the configuration itself
    space:
      parameters.lambda: [0.2, 1.5]             # two numbers: a range
      merge_method: [ties, dare_ties]           # else a list of choices
      models.0.parameters.density[mlp]: {range: [0.2, 1], points: 4}
    strategy: grid                              # golden, cmaes
    objectives:
      domain: {task: "perplexity:domain.jsonl", held_out: "perplexity:domain-held-out.jsonl"}
      general: {callable: "mine:accuracy", direction: max, held_out: "mine:other_accuracy"}
    choose: {max_general_loss: 0.02}
    budget: 20

A key of `space` is a place in the configuration, with dots; or the name of a parameter, which then is the whole
merge's; either may have a filter behind it, which is part of tensors' names: a role, as `[self_attn]`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .config import MergeConfig, nearest, read_yaml
from .executor import with_value
from .method_table import KNOWN_PARAMETERS

Point = dict[str, Any]  # {key of the space: value}
POINTS = 5  # of a range in a grid
DIGITS = 6  # of the values of a range, so that the configuration found is one to read
_KEY = re.compile(r"(?P<place>[^\[\]]+)(?:\[(?P<filter>[^\[\]]+)\])?")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Strict):
    """All numbers from low to high; `points` of them in a grid, both ends among them."""

    range: tuple[float, float]
    points: Annotated[int, Field(ge=2)] = POINTS

    @model_validator(mode="after")
    def _rising(self) -> Range:
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"expected [low, high] with low < high, found {list(self.range)}")
        return self

    def at(self, share: float) -> float:
        """The value at a share of the way, rounded to a few digits, never outside."""
        low, high = self.range
        value = low if share <= 0 else high if share >= 1 else float(f"{low + share * (high - low):.{DIGITS}g}")
        return min(max(value, low), high)


class Choices(_Strict):
    """One value of these."""

    choices: list[Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _different(self) -> Choices:
        for number, value in enumerate(self.choices):
            if any(value == other and type(value) is type(other) for other in self.choices[:number]):
                raise ValueError(f"choice {value!r} is given twice")
        return self


def _dimension(written: Any) -> Any:
    """A list of two numbers is a range, any other list one of choices."""
    if isinstance(written, list):
        written = {"range" if len(written) == 2 and all(map(_is_number, written)) else "choices": written}
    if not isinstance(written, Mapping) or not written.keys() & {"range", "choices"}:
        raise ValueError(f"expected [low, high], a list of choices, {{range: ...}} or {{choices: ...}}; {written!r}")
    try:
        return (Range if "range" in written else Choices).model_validate(written)
    except ValidationError as error:
        raise ValueError("; ".join(_problems(error))) from None


def _is_number(value: Any) -> bool:
    """Text may be one too: YAML 1.1 reads 1e-3 so."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


Dimension = Annotated[Range | Choices, BeforeValidator(_dimension)]


class ObjectiveConfig(_Strict):
    """An evaluation set: a task of `steep eval` or a text (`task`), or `callable`, MODULE:FUNCTION in Python that takes
    a Decoder and returns a float. `held_out`: the same of data that the search does not see."""

    task: str | None = None
    callable: str | None = None
    held_out: str
    direction: Literal["min", "max"] | None = None
    metric: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ObjectiveConfig:
        if (self.task is None) == (self.callable is None):
            raise ValueError("exactly one of 'task' and 'callable' must be given")
        if self.callable is not None:
            if self.direction is None:
                raise ValueError("direction: min or max is needed for a callable")
            for key in ("metric", "limit", "num_fewshot"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: belongs to a task, not to a callable")
        elif self.direction is not None:
            raise ValueError("direction: follows from the metric of a task; leave it out")
        if self.held_out == self.source:
            raise ValueError(f"held_out: {self.held_out!r} is what the search sees; other data is needed")
        return self

    @property
    def source(self) -> str:
        return self.task or self.callable or ""


class Objectives(_Strict):
    domain: ObjectiveConfig
    general: ObjectiveConfig


class Choose(_Strict):
    """Which point wins: the greatest domain gain with a general loss of at most `max_general_loss` (a number in the
    unit of the objective, or 'N%' of the reference's value), or the greatest gain - general_weight * loss."""

    max_general_loss: float | str | None = None
    general_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Choose:
        if (self.max_general_loss is None) == (self.general_weight is None):
            raise ValueError("exactly one of 'max_general_loss' and 'general_weight' must be given")
        self.allowed_loss(0.0)
        return self

    def allowed_loss(self, reference: float) -> float:
        """The greatest general loss; infinite under `general_weight`."""
        written = self.max_general_loss
        if written is None:
            return math.inf
        text = str(written).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"max_general_loss: expected a number or 'N%', found {written!r}")
        return number / 100 * abs(reference) if text.endswith("%") else number


class SearchConfig(_Strict):
    """A whole search. `reference`: the model that gains and losses are told against, by default the merge's base_model,
    or its first model. `dtype`: of the weights while they are evaluated; the result has the merge's."""

    merge: str | dict[str, Any]
    space: dict[str, Dimension] = Field(min_length=1)
    strategy: Literal["grid", "golden", "cmaes"]
    objectives: Objectives
    choose: Choose
    budget: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    reference: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def ranges(self) -> dict[str, Range]:
        return {key: value for key, value in self.space.items() if isinstance(value, Range)}

    @property
    def choices(self) -> dict[str, Choices]:
        return {key: value for key, value in self.space.items() if isinstance(value, Choices)}

    def combinations(self) -> list[Point]:
        """Every combination of the choices; one that is empty if there are no choices."""
        values = itertools.product(*(dimension.choices for dimension in self.choices.values()))
        return [dict(zip(self.choices, each)) for each in values]

    def check(self) -> None:
        """What the strategy needs of space and budget.

        Raises:
            ValueError: naming the key, what was found and what is allowed.
        """
        ranges, combinations = len(self.ranges), len(self.combinations())
        if self.strategy == "grid":
            size = grid_size(self)
            if self.budget is not None and self.budget < size:
                parts = " x ".join(f"{_count(dimension)} of {key}" for key, dimension in self.space.items())
                raise ValueError(
                    f"budget: {self.budget}, but the grid has {size} points ({parts}); allowed: {size} and more, or "
                    "fewer points"
                )
            return
        if self.strategy == "golden" and ranges != 1:
            raise ValueError(f"strategy: golden searches along one range, space has {ranges}; allowed: grid, cmaes")
        if self.strategy == "cmaes" and ranges < 2:
            raise ValueError(f"strategy: cmaes needs two ranges or more, space has {ranges}; allowed: grid, golden")
        least = combinations * (2 if self.strategy == "golden" else 4 + int(3 * math.log(ranges)))
        if self.budget is None or self.budget < least:
            of = f" for {combinations} combinations of choices" if combinations > 1 else ""
            raise ValueError(f"budget: {self.strategy} needs at least {least} evaluations{of}, given {self.budget}")


def grid_size(config: SearchConfig) -> int:
    return math.prod(map(_count, config.space.values()))


def grid_values(dimension: Range | Choices) -> list[Any]:
    """What a grid tries of a dimension."""
    if isinstance(dimension, Choices):
        return dimension.choices
    return [dimension.at(number / (dimension.points - 1)) for number in range(dimension.points)]


def _count(dimension: Range | Choices) -> int:
    return len(dimension.choices) if isinstance(dimension, Choices) else dimension.points


def read_search(
    config: str | Path | Mapping[str, Any], budget: int | None = None
) -> tuple[SearchConfig, Path | None, tuple[Path, ...]]:
    """The search that a YAML file or a mapping asks for, the folder that paths count from, the files it is from.

    Args:
        budget: instead of the written one.

    Raises:
        FileNotFoundError, ValueError: naming file and key, what was found and what is allowed.
    """
    where = "search" if isinstance(config, Mapping) else str(config)
    folder = None if isinstance(config, Mapping) else Path(config).resolve().parent
    written = dict(config) if isinstance(config, Mapping) else read_yaml(config)
    if budget is not None:
        written["budget"] = budget
    try:
        search = SearchConfig.model_validate(written)
        search.check()
    except ValidationError as error:
        raise ValueError(f"{where}: " + "; ".join(_problems(error))) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return search, folder, () if isinstance(config, Mapping) else (Path(config),)


_SECTIONS: dict[str, type[BaseModel]] = {
    "objectives": Objectives,
    "domain": ObjectiveConfig,
    "general": ObjectiveConfig,
    "choose": Choose,
}


def _problems(error: ValidationError) -> list[str]:
    """Every mistake with its key's path, and the nearest known name of a key that is unknown."""
    found = []
    for detail in error.errors():
        path, message = list(detail["loc"]), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            *path, key = path
            models: dict[str, type[BaseModel]] = {"range": Range, "choices": Choices}
            within = models.get(error.title.lower()) or (_SECTIONS[str(path[-1])] if path else SearchConfig)
            message = f"unknown key {key!r}{nearest(str(key), within.model_fields)}"
        elif detail["type"] == "literal_error":
            message += f", found {detail['input']!r}"
        where = ".".join(map(str, path))
        found.append(f"{where}: {message}" if where else message)
    return found


def told(point: Point) -> str:
    """A point for a person: lambda = 0.5, merge_method = ties."""
    values = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in point.items()}
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def place_of(key: str) -> tuple[list[str], str | None]:
    """The place in a merge's configuration that a key of the space means, and its filter.

    Raises:
        ValueError: the key is neither a place nor a parameter.
    """
    match = _KEY.fullmatch(key.strip())
    if match is None:
        raise ValueError(f"space: {key!r}: expected PLACE or PLACE[FILTER]")
    path = match["place"].split(".")
    known = [name for name in MergeConfig.model_fields if name != "parameters"]
    if path[0] in KNOWN_PARAMETERS and len(path) == 1:
        path = ["parameters", *path]
    elif path[0] not in MergeConfig.model_fields:
        names = KNOWN_PARAMETERS + known if len(path) == 1 else list(MergeConfig.model_fields)
        raise ValueError(f"space: unknown place {key!r}{nearest(path[0], names)}")
    if "parameters" in path[:-1] and path[-1] not in KNOWN_PARAMETERS:
        raise ValueError(f"space: {key!r}: unknown parameter {path[-1]!r}{nearest(path[-1], KNOWN_PARAMETERS)}")
    if match["filter"] and "parameters" not in path[:-1]:
        raise ValueError(f"space: {key!r}: only a parameter has filters")
    return path, match["filter"]


def put(merge: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """The configuration at a point. Of several filters on one parameter the first in the space comes first.

    Raises:
        ValueError: naming a key of the space that means no place in the configuration.
    """
    changed = dict(merge)
    places = {key: place_of(key) for key in point}
    plain = [key for key in point if places[key][1] is None]
    filtered = [key for key in reversed(point) if places[key][1] is not None]
    for key in [*plain, *filtered]:
        path, role = places[key]
        value = point[key]
        if role is not None:
            value = [{"filter": role, "value": value}, *_rules(_at(changed, path), role)]
        try:
            changed = with_value(changed, path, value)
        except ValueError as error:
            raise ValueError(f"space: {key!r}: {error}") from None
    return changed


def _at(written: Any, path: Sequence[str]) -> Any:
    """What stands at a place; None: nothing."""
    for step in path:
        if isinstance(written, list) and step.isdigit() and int(step) < len(written):
            written = written[int(step)]
        else:
            written = written.get(step) if isinstance(written, Mapping) else None
    return written


def _rules(written: Any, role: str) -> Iterator[Any]:
    """A parameter as written, as rules behind another that has the filter `role`."""
    if written is None:
        return
    rules = written if isinstance(written, list) else [written]
    if not any(isinstance(rule, Mapping) for rule in rules):
        rules = [{"value": written}]
    yield from (rule for rule in rules if not isinstance(rule, Mapping) or rule.get("filter") != role)
