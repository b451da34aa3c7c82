"""Which methods there are: what a YAML may say to each, and the class that carries it out. No tensors, no files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .consensus import (
    Breadcrumbs,
    BreadcrumbsTies,
    ConsensusTa,
    DareLinear,
    DareTies,
    DellaLinear,
    DellaTies,
    Ram,
    RamPlus,
    Sce,
    Ties,
)
from .fusion import ArceeFusion
from .geometry import Karcher, ModelStock, Multislerp, Nuslerp, Slerp
from .methods import ChatVector, Linear, Nearswap, Passthrough, TaskArithmetic
from .spectral import IsoC, TsvM
from .tensor_merge import TensorMerge

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Parameter:
    """What values a parameter may have, in every method that reads it.

    least, most: of a number. whole: without a fraction. choices: the values that there are, and what else means them.
    """

    kind: Literal["number", "boolean", "choice"] = "number"
    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    choices: dict[Scalar, str] = field(default_factory=dict)

    def parse(self, name: str, written: Any) -> Scalar:
        """A value as YAML gives it.

        Raises:
            ValueError: naming the parameter, what was found and what is allowed.
        """
        if self.kind == "boolean":
            if written in (0, 1):  # also False, True, 0.0 and 1.0, which generated configurations contain
                return bool(written)
            raise ValueError(f"{name}: expected true or false, found {written!r}")
        if self.kind == "choice":
            if isinstance(written, Scalar) and written in self.choices:
                return self.choices[written]
            allowed = ", ".join(
                "true" if key is True else "false" if key is False else str(key) for key in self.choices
            )
            raise ValueError(f"{name}: allowed: {allowed}; found {written!r}")
        if isinstance(written, str):  # YAML 1.1 reads 1e-3 as text
            try:
                written = float(written)
            except ValueError:
                raise ValueError(f"{name}: expected a number, found {written!r}") from None
        if isinstance(written, bool) or not isinstance(written, int | float) or not math.isfinite(written):
            raise ValueError(f"{name}: expected a finite number, found {written!r}")
        if not self.least <= written <= self.most:
            most = f" and {self.most:g}" if math.isfinite(self.most) else ""
            limits = f"between {self.least:g}{most}" if most else f"at least {self.least:g}"
            raise ValueError(f"{name}: must be {limits}, found {written!r}")
        if self.whole and written != int(written):
            raise ValueError(f"{name}: must be a whole number, found {written!r}")
        return float(written)


def _choice(*values: str, also: dict[Scalar, str] | None = None) -> Parameter:
    choices: dict[Scalar, str] = {value: value for value in values}
    return Parameter("choice", choices=choices | (also or {}))


_NUMBER, _SWITCH, _SHARE, _POSITIVE = Parameter(), Parameter("boolean"), Parameter(least=0, most=1), Parameter(least=0)

PARAMETERS: dict[str, Parameter] = {
    "weight": _NUMBER,
    "density": _SHARE,
    "gamma": _SHARE,  # share of outliers that breadcrumbs drops
    "epsilon": _POSITIVE,  # of della: half the range of probabilities; of ram: what counts as a change
    "normalize": _SWITCH,
    "lambda": _NUMBER,
    "int8_mask": _SWITCH,  # in mergekit the dtype of a temporary, without effect on the result
    # mergekit's true is the L1 norm
    "rescale": _choice("l1", "inv_density", "elementwise", also={True: "l1", False: "none", "none": "none"}),
    "ties_sign": _choice("weighted", "unweighted"),
    "topk_scope": _choice("tensor", "row"),
    "t": _NUMBER,
    "scale": _NUMBER,
    "filter_wise": _SWITCH,
    "nuslerp_flatten": _SWITCH,
    "nuslerp_row_wise": _SWITCH,
    "normalize_weights": _SWITCH,
    "eps": _POSITIVE,
    "max_iter": Parameter(least=0, whole=True),
    "tol": _POSITIVE,
    "select_topk": _SHARE,
    "r": _NUMBER,
    "alpha": _POSITIVE,
    "tall_lambda": _POSITIVE,
    "consensus_k": Parameter(least=1, whole=True),
}
KNOWN_PARAMETERS = sorted(PARAMETERS)


@dataclass(frozen=True)
class Method:
    """One value of `merge_method`.

    shared: parameters of the merge as a whole and their defaults; None: required.
    per_model: parameters of each model that is not the base.
    base: "required"; "optional": the merge is one of task vectors if a base_model is given, else of the models;
        "ignored": a base_model is a model like the others.
    models: how many there must be besides a base, at least and at most.
    donor: whose configuration and tokenizer the result has: the base's where there is one, or the first model's.
    """

    carry_out: type[TensorMerge]
    shared: dict[str, Scalar | None] = field(default_factory=dict)
    per_model: dict[str, Scalar | None] = field(default_factory=dict)
    base: Literal["required", "optional", "ignored"] = "required"
    models: tuple[int, int | None] = (1, None)
    donor: Literal["base", "first"] = "base"

    def has_base(self, base_given: bool) -> bool:
        """Whether one of the inputs is the base B, in a merge with or without `base_model`."""
        return self.base == "required" or (self.base == "optional" and base_given)


def _on_task_vectors(
    carry_out: type[TensorMerge],
    *,
    normalize: bool = False,
    rescale: str | None = None,
    consensus: bool = False,
    shared: dict[str, Scalar | None] | None = None,
    per_model: dict[str, Scalar | None] | None = None,
) -> Method:
    """task_arithmetic and what thins the task vectors before it; a `rescale` is of those that do."""
    parameters: dict[str, Scalar | None] = {"normalize": normalize, "lambda": 1.0, "int8_mask": False}
    thinned: dict[str, Scalar | None] = {}
    if rescale is not None:
        parameters["rescale"], thinned["density"] = rescale, 1.0
    if consensus:
        parameters["ties_sign"] = "weighted"
    return Method(carry_out, parameters | (shared or {}), {"weight": None} | thinned | (per_model or {}))


METHODS: dict[str, Method] = {
    "linear": Method(Linear, {"normalize": True}, {"weight": None}, base="ignored"),
    "slerp": Method(Slerp, {"t": None}, models=(1, 1)),
    "nuslerp": Method(
        Nuslerp,
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        {"weight": None},
        base="optional",
        models=(2, 2),
    ),
    "multislerp": Method(Multislerp, {"normalize_weights": True, "eps": 1e-8}, {"weight": None}, base="optional"),
    "karcher": Method(Karcher, {"max_iter": 10, "tol": 1e-5}, base="ignored"),
    "model_stock": Method(ModelStock, {"filter_wise": False}, models=(2, None)),
    "task_arithmetic": _on_task_vectors(TaskArithmetic),
    "ties": _on_task_vectors(Ties, normalize=True, rescale="none", consensus=True, shared={"topk_scope": "tensor"}),
    "dare_linear": _on_task_vectors(DareLinear, rescale="l1"),
    "dare_ties": _on_task_vectors(DareTies, rescale="l1", consensus=True),
    "breadcrumbs": _on_task_vectors(Breadcrumbs, rescale="none", per_model={"gamma": 0.01}),
    "breadcrumbs_ties": _on_task_vectors(BreadcrumbsTies, rescale="none", consensus=True, per_model={"gamma": 0.01}),
    "della": _on_task_vectors(DellaTies, normalize=True, rescale="l1", consensus=True, per_model={"epsilon": 0.15}),
    "della_linear": _on_task_vectors(DellaLinear, rescale="l1", per_model={"epsilon": 0.15}),
    "sce": Method(Sce, {"select_topk": 1.0, "int8_mask": False}),
    "ram": Method(Ram, {"epsilon": 1e-5}),
    "ramplus_tl": Method(RamPlus, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    "nearswap": Method(Nearswap, {"t": None}, models=(1, 1)),
    "arcee_fusion": Method(ArceeFusion, models=(1, 1)),
    "passthrough": Method(Passthrough, per_model={"scale": 1.0}, base="ignored", models=(1, 1)),
    # beyond mergekit
    "chat_vector": Method(ChatVector, {"scale": 1.0}, models=(2, 2), donor="first"),
    "consensus_ta": Method(
        ConsensusTa, {"consensus_k": 2, "lambda": 1.0}, {"weight": 1.0, "tall_lambda": 0.4}, models=(2, None)
    ),
    "tsv_m": Method(TsvM, {"lambda": 1.0}),
    "iso_c": Method(IsoC, {"lambda": 1.0}),
}
