"""How a method merges one tensor that it sees in pieces: what the executor asks of every method.

The executor reads a tensor `looks` times, calling `look` with every piece and `end_look` after the last, and then once
more, calling `merge` with every piece. Vectors are float32, flat and of one length: with `deltas` the base B and the
task vectors delta_i = M_i - B, else the models themselves, a base first where there is one. Touches no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

ROW = 4096  # elements; sums over a tensor are made of sums over rows of at least that length
Sums = dict[tuple[int, int], float]  # dot products of a tensor's vectors, by their positions


@dataclass(frozen=True)
class Subject:
    """One output tensor, as far as a method may know it.

    parameters: resolved values: of the merge as a whole, and as lists, one entry per model that is not the base.
    models: what tells the models apart in random bits, in the order of the vectors without the base: their names as
        the configuration writes them.
    seed: `random_seed`; random bits depend on (seed, name, model, element) and on nothing else.
    based: whether one of the vectors is a base; only methods that can do without ask for it.
    """

    name: str
    shape: tuple[int, ...]
    parameters: dict[str, Any]
    models: tuple[str, ...]
    seed: int
    device: torch.device
    based: bool = True

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def columns(self) -> int:
        """Elements of a row: the last dimension; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def whole_rows(self) -> int:
        """The least number of elements that are whole rows and at least ROW."""
        return whole_rows(self.columns)


def whole_rows(columns: int) -> int:
    """The least multiple of a row's length that is at least ROW."""
    return -(-ROW // columns) * columns if columns else ROW


class TensorMerge:
    """One tensor under one method. Subclasses say what they want to see and what they make of it.

    Between pieces a method holds counts and sums: at most 2 MB for each model, and 40 bytes for each run of ROW
    elements. Dare and della hold one bit for each element and model from look to merge under `rescale: l1` on a CPU.
    Only those that see one whole piece hold a tensor: nuslerp under `nuslerp_row_wise`, tsv_m and iso_c.

    vectors: "models": the models, a required base B first; "deltas": B and the task vectors delta_i = M_i - B; "both":
        B, the other models, and then the task vectors. Where there is no base, always the models.
    looks: how often the whole tensor is read before it is merged.
    pieces: "any": pieces begin at multiples of ROW elements; "rows": they hold whole rows of the last dimension (a
        vector is one row) and begin at multiples of `subject.whole_rows`; "whole": there is one piece. They come in
        order; those of a later reading may be of other sizes.
    unit: pieces begin at multiples of so many elements, and dot products are added up over runs of that length
        (`methods.partial_sums`), so that nothing depends on where pieces begin.
    """

    vectors: ClassVar[Literal["models", "deltas", "both"]] = "models"
    pieces: Literal["any", "rows", "whole"] = "any"
    looks = 0

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @property
    def unit(self) -> int:
        return self.subject.whole_rows if self.pieces == "rows" else ROW

    @classmethod
    def check(cls, parameters: Mapping[str, Any]) -> list[str]:
        """What is wrong with resolved parameters that are each in their range, where one depends on another."""
        return []

    def pairs(self, models: int) -> list[tuple[int, int]]:
        """Which dot products are gathered in the first reading, for figures and for `end_look`: positions of vectors.

        Those of every vector with itself, of the task vectors with each other, and with "both" of B with the models.

        Args:
            models: how many there are, the base included.
        """
        if self.vectors == "models" or not self.subject.based:
            return [(i, i) for i in range(models)]
        first = 1 if self.vectors == "deltas" else models
        last = first + models - 1
        between = [(0, i) for i in range(1, first)]
        return [(i, i) for i in range(last)] + between + list(combinations(range(first, last), 2))

    def look(self, number: int, lo: int, vectors: Sequence[Tensor]) -> None:
        """A piece that begins at flat element `lo`, in reading `number`."""

    def end_look(self, number: int, sums: Sums) -> None:
        """Reading `number` is over; `sums` are the dot products of `pairs`, each rounded once."""

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        """The merged piece, float32, of the vectors' length."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """What the method itself has to tell about the tensor, for the manifest; after the last piece."""
        return {}
