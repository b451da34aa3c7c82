"""What planning a merge finds: errors, warnings and notes, all of them, and names of tensors told briefly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PlanError(ValueError):
    """A merge that cannot be done. `problems` has every reason found, the message one in each line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("this merge cannot be done:\n  " + "\n  ".join(problems))
        self.problems = tuple(problems)


class Findings:
    """Collects what is found. Nothing is said twice; tensors with the same problem share a line."""

    def __init__(self) -> None:
        self._errors: dict[str, list[str]] = {}  # text -> the tensors it is about, none if it is about no tensor
        self._warnings: Counter[str] = Counter()
        self._notes: dict[str, None] = {}

    def error(self, text: str, tensor: str | None = None) -> None:
        tensors = self._errors.setdefault(text, [])
        if tensor is not None and tensor not in tensors:
            tensors.append(tensor)

    def warn(self, text: str) -> None:
        self._warnings[text] += 1

    def note(self, text: str) -> None:
        self._notes[text] = None

    @property
    def errors(self) -> list[str]:
        return [
            f"{', '.join(abbreviate(tensors))}: {text}" if tensors else text for text, tensors in self._errors.items()
        ]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(text + (f" ({count} times)" if count > 1 else "") for text, count in self._warnings.items())

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def raise_errors(self) -> None:
        """
        Raises:
            PlanError: if there were errors.
        """
        if self._errors:
            raise PlanError(self.errors)


def abbreviate(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers become one, without loss: model.layers.{0-3,5}.mlp.experts.{0-7}.w1.weight."""
    found = [name.split(".") for name in dict.fromkeys(names)]
    while any(part.isdigit() for parts in found for part in parts):
        groups: dict[tuple[int, tuple[str, ...]], list[str]] = {}
        for parts in found:
            place = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
            rest = tuple(part for index, part in enumerate(parts) if index != place)
            groups.setdefault((place, rest), []).append(parts[place] if place >= 0 else "")
        found = [
            [*rest[:place], _ranges(numbers), *rest[place:]] if place >= 0 else list(rest)
            for (place, rest), numbers in groups.items()
        ]
    return [".".join(parts).replace("{=", "").replace("=}", "") for parts in found]


def _ranges(numbers: Sequence[str]) -> str:
    """{0-3,5}; of a single number the number, marked so that it counts as done: {=7=}."""
    ordered = sorted(map(int, numbers))
    if len(ordered) == 1:
        return f"{{={ordered[0]}=}}"
    spans: list[tuple[int, int]] = []
    for number in ordered:
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return "{" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans) + "}"
