"""The mode `compat: mergekit-0.1.5`: a merge as mergekit 0.1.5 does it on a CPU, down to the last bit.

For migration and tests; the default, `exact`, has smaller errors, a fraction of the time and memory, and results that
depend on nothing but the inputs. Here tensors are merged whole, one after another in the order of mergekit's, inputs
and weights are cast to `dtype` first, and masks come from one torch generator, so a result depends on torch's version,
on the number of its threads (leave it as it was for mergekit; `merge.json` has it) and on the order of the models.
compat_methods.py has the formulas.

Not mergekit's even so:
- arcee_fusion and ramplus_tl are rounded to the dtype of the result, where mergekit writes float32 whatever `dtype` is;
- experts stay in the layout on disk, where mergekit merges and writes all of a layer as one tensor: it thins, ranks
  and measures them together, and its masks are others (it orders such tensors by a hash table);
- what mergekit leaves to chance is settled: donors, numbers of new tokens, masks without a seed; under slices that take
  one layer of a model twice, the order of masks;
- adapters are applied in float32, not by PEFT, which may differ by a rounding; integer buffers are never cast; and all
  models of uneven slices take part in the final norm and head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .compat_methods import DRAWING, FORMULAS, Operands
from .tensor_merge import Subject, TensorMerge

MERGEKIT = "mergekit-0.1.5"
EXACT = "exact"
# what parameters of steep's own must say
_KNOWN = {"rescale": ("l1", "none"), "ties_sign": ("weighted",), "topk_scope": ("tensor",)}


class MergekitMerge(TensorMerge):
    """One tensor, whole.

    Args:
        compute: the dtype of the arithmetic: `dtype`, or what the inputs' dtypes promote to.
        generator: of the whole merge; shared by tensors that come in `draw_order`.
    """

    vectors = "both"
    pieces = "whole"

    def __init__(self, subject: Subject, method: str, compute: torch.dtype, generator: torch.Generator) -> None:
        super().__init__(subject)
        self._formula, self._compute, self._generator = FORMULAS[method], compute, generator

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        subject, based = self.subject, self.subject.based
        models = [vector.view(subject.shape).to(self._compute) for vector in vectors[: len(subject.models) + based]]
        base = models.pop(0) if based else None
        try:
            return self._formula(Operands(base, models, subject.parameters, self._generator)).reshape(-1)
        except ValueError as error:
            raise ValueError(f"{subject.name}: {error}") from None


def draws(method: str) -> bool:
    """Whether a tensor's result depends on how much was drawn for those before it."""
    return method in DRAWING


def draw_order(names: Sequence[str], name: str) -> tuple[str, str]:
    """What tensors are ordered by: the last of their names in the models (a tied head has the embedding's there)."""
    return max(names), name


def promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that values of all these dtypes promote to."""
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found


def method_problems(method: str) -> list[str]:
    """Why mergekit has nothing to be compared with."""
    known = ", ".join(FORMULAS)
    return [] if method in FORMULAS else [f"{MERGEKIT} has no method {method!r}; allowed with compat: {known}"]


def parameter_problems(parameters: Mapping[str, Any]) -> list[str]:
    """Values of resolved parameters that mergekit does not know."""
    return [
        f"{name}: {parameters[name]!r} is not in {MERGEKIT}; allowed with compat: {', '.join(allowed)}"
        for name, allowed in _KNOWN.items()
        if parameters.get(name, allowed[0]) not in allowed
    ]
