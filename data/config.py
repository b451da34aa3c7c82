"""The `data` section of a training recipe, as pydantic models. Touches no files: `BatchLoader` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(_Strict):
    """A token store and its share of the training sequences.

    weight: relative to the other sources' weights; 0 keeps the source for a later phase.
    max_epochs: an error if the run would go through the store more often; null is no limit.
    """

    name: Name
    store: Path
    weight: Weight = 1.0
    max_epochs: Positive | None = None


class ValidationConfig(_Strict):
    """A token store whose loss is measured during training."""

    name: Name
    store: Path


class PhaseConfig(_Strict):
    """From sample (sequence) number `start` on, these weights by source name; a source that is not named gets 0."""

    start: Annotated[int, Field(ge=1)]
    weights: dict[str, Weight]


class DataConfig(_Strict):
    """What a run trains on.

    seq_len: tokens per packed sequence.
    packing: "best_fit" (cuts no document that fits) or "concat" (no padding).
    seed: of the order in which sequences come.
    phases: changes of the mixture during the run.
    skip_samples: [first, last] numbers of samples (packed sequences, as the metrics name them) that are left out: their
        places are padding, and every other sample stays where it is.
    """

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    seq_len: Annotated[int, Field(ge=2)]
    packing: Literal["best_fit", "concat"] = "best_fit"
    seed: int = 0
    phases: list[PhaseConfig] = []
    skip_samples: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]] = []
    validation: list[ValidationConfig] = []

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        names = [source.name for source in self.sources]
        for what, given in (("sources", names), ("validation", [entry.name for entry in self.validation])):
            twice = sorted({name for name in given if given.count(name) > 1})
            if twice:
                raise ValueError(f"{what}: the name {twice[0]!r} is given twice")
        if not any(source.weight for source in self.sources):
            raise ValueError("sources: every weight is 0, at least one must be positive")
        for first, last in self.skip_samples:
            if last < first:
                raise ValueError(f"skip_samples: [{first}, {last}] ends before it begins; allowed: [first, last]")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases: must start later and later, found {starts}")
        for phase in self.phases:
            unknown = sorted(set(phase.weights) - set(names))
            if unknown:
                raise ValueError(f"phases: no source is named {unknown[0]!r}; sources are {', '.join(names)}")
            if not any(phase.weights.values()):
                raise ValueError(f"phases: at {phase.start} every weight is 0, at least one must be positive")
        return self
