"""Which methods there are: what a YAML may say to each, and the class that carries it out. No tensors, no files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .methods import Linear, Slerp, TaskArithmetic, Ties
from .tensor_merge import TensorMerge

Scalar = bool | int | float


@dataclass(frozen=True)
class Method:
    """One value of `merge_method`.

    shared: parameters of the merge as a whole and their defaults; None: required.
    per_model: parameters of each model that is not the base.
    base: "required", or "ignored": a base_model is then a model like the others, if it is listed.
    models: how many there must be besides a required base, at least and at most.
    """

    carry_out: type[TensorMerge]
    shared: dict[str, Scalar | None] = field(default_factory=dict)
    per_model: dict[str, Scalar | None] = field(default_factory=dict)
    base: Literal["required", "ignored"] = "required"
    models: tuple[int, int | None] = (1, None)


METHODS: dict[str, Method] = {
    "linear": Method(Linear, {"normalize": True}, {"weight": None}, base="ignored"),
    "slerp": Method(Slerp, {"t": None}, models=(1, 1)),
    "task_arithmetic": Method(
        TaskArithmetic, {"normalize": False, "lambda": 1.0, "int8_mask": False}, {"weight": None}
    ),
    "ties": Method(
        Ties,
        {"normalize": True, "lambda": 1.0, "int8_mask": False, "rescale": False},
        {"weight": None, "density": 1.0},
    ),
}
BOOLEAN_PARAMETERS = {"normalize", "int8_mask", "rescale"}

# What mergekit has beyond that.
METHODS_NOT_YET = (
    *("nuslerp", "multislerp", "karcher", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della"),
    *("della_linear", "model_stock", "nearswap", "sce", "ram", "ramplus_tl", "arcee_fusion", "passthrough"),
)
PARAMETERS_OF_OTHER_METHODS = (
    *("gamma", "epsilon", "select_topk", "eps", "max_iter", "tol", "filter_wise", "nuslerp_flatten"),
    *("nuslerp_row_wise", "normalize_weights", "scale", "r", "alpha"),
)
KNOWN_PARAMETERS = sorted(
    {name for method in METHODS.values() for name in (*method.shared, *method.per_model)}
    | set(PARAMETERS_OF_OTHER_METHODS)
)
