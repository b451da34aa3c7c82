"""Values of a method's parameters for each tensor: which scope speaks, what is missing, what is odd. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .compat import parameter_problems
from .config import Parameters, Setting
from .findings import Findings
from .layers import Stack, has_vocabulary
from .method_table import METHODS, Scalar
from .methods import SMALL_WEIGHT_SUM


class Resolver:
    """Parameters of one merge.

    Args:
        method: a key of METHODS.
        compat: values must be ones that mergekit knows.
        labels: of the models, by number, for messages.
    """

    def __init__(self, method: str, labels: Sequence[str], findings: Findings, compat: bool = False) -> None:
        self.method, self.labels, self.findings, self.compat = method, labels, findings, compat
        self._missing: set[tuple[str, str]] = set()

    def values(self, stack: Stack, name: str, names: Sequence[str], depth: float) -> dict[str, Any]:
        """Of one output tensor: scalars, and for parameters of models a list without the base's.

        Args:
            names: of the tensor in each source; filters on a model's parameters look at these.
            depth: t of gradients.
        """
        found: dict[str, Any] = {}
        for key, default in METHODS[self.method].shared.items():
            found[key] = self._resolve(key, default, stack.shared_scopes, name, depth, "the merge")
        for key, default in METHODS[self.method].per_model.items():
            found[key] = [
                self._resolve(key, default, scopes, names[position], depth, self.labels[model])
                for position, (model, scopes) in enumerate(zip(stack.models, stack.model_scopes))
                if position != stack.base
            ]
        lists = [value if isinstance(value, list) else [value] for value in found.values()]
        if all(lists) and not any(None in values for values in lists):
            self._check(found)
        found.pop("int8_mask", None)  # in mergekit the dtype of a temporary, without effect on the result
        return found

    def _resolve(
        self, key: str, default: Scalar | None, scopes: Sequence[Parameters], name: str, depth: float, owner: str
    ) -> Scalar | None:
        """The first scope with a filter that matches wins: model, slice, module, the top; then the default."""
        for scope in scopes:
            if key in scope:
                value = scope[key].at(name, depth)
                if value is not None:
                    return value
        if default is None and (owner, key) not in self._missing:
            self._missing.add((owner, key))
            self.findings.error(f"{owner}: no value for the required parameter {key!r} (first needed for {name})")
        return default

    def _check(self, values: Mapping[str, Any]) -> None:
        method = METHODS[self.method]
        for problem in method.carry_out.check(values) + (parameter_problems(values) if self.compat else []):
            self.findings.error(f"{self.method}: {problem}")
        if self.method == "slerp" and not 0 <= values["t"] <= 1:
            self.findings.warn(f"t = {values['t']:g} is outside [0, 1] and extrapolates")
        if not values.get("normalize"):
            return
        weights = values["weight"]
        total = math.fsum(weights)
        if abs(total) < SMALL_WEIGHT_SUM:
            text = f"weights {weights} sum to {total:g} under normalize: true"
            if self.method == "linear":
                self.findings.error(text)
            else:
                self.findings.warn(f"{text}: they are not divided")
        elif abs(total) < 0.05 * math.fsum(map(abs, weights)):
            self.findings.warn(f"weights {weights} nearly cancel: normalize multiplies by {1 / total:.3g}")
        if "ties_sign" in method.shared and min(weights) < 0 < max(weights):
            self.findings.warn(f"weights {weights} of both signs under normalize: divisors can be near zero")

    def note_unread(self, stacks: Iterable[Stack], names: Sequence[str]) -> None:
        """What is written and has no effect: parameters that nothing reads, filters that no tensor's name contains.

        Args:
            names: of all tensors, in the result and in the models.
        """
        shared, own = METHODS[self.method].shared, METHODS[self.method].per_model
        of_models: dict[int, Parameters] = {}
        elsewhere: dict[int, Parameters] = {}
        for stack in stacks:
            elsewhere |= {id(scope): scope for scope in stack.shared_scopes}
            for position, scopes in enumerate(stack.model_scopes):
                of_models[id(scopes[0])] = scopes[0]
                if position == stack.base and scopes[0]:
                    read = ", ".join(sorted(scopes[0]))
                    self.findings.warn(f"{self.method} reads no parameters of the base model: its {read} has no effect")
        for scope in of_models.values():
            for key in sorted(scope.keys() - own.keys()):
                where = "; it belongs to the merge as a whole" if key in shared else ""
                self.findings.warn(f"{self.method} reads no {key!r} from a model: it has no effect{where}")
        for scope in elsewhere.values():
            for key in sorted(scope.keys() - own.keys() - shared.keys()):
                self.findings.warn(f"{self.method} reads no {key!r}: it has no effect")
        for scope in (*of_models.values(), *elsewhere.values()):
            for key, setting in scope.items():
                self._note_filters(key, setting, names)

    def _note_filters(self, key: str, setting: Setting, names: Sequence[str]) -> None:
        for pattern, values in setting.rules:
            if pattern is not None and pattern != "*" and not any(pattern in name for name in names):
                self.findings.warn(f"{key}: the filter {pattern!r} is in no tensor's name")
            elif len(set(values)) > 1 and any(
                pattern in (None, "*", name) or str(pattern) in name for name in names if has_vocabulary(name)
            ):
                self.findings.note(
                    f"{key}: embeddings, final norm and head lie outside the layers and take the gradient's first value"
                )
