"""A merge plan for people: tables of models, tensors, vocabulary and files. Prints nothing itself, writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..engine.safetensors_io import dtype_name
from .config import parse_config, read_yaml
from .findings import Findings, abbreviate
from .inputs import check_output
from .layers import split_layer
from .plan import MergePlan, TensorPlan, plan_merge

MOST_VALUES = 6  # of a gradient that are shown


def plan_file(config: str | Path, out: str | Path | None = None, compat: str | None = None) -> MergePlan:
    """The plan of a YAML file.

    Args:
        out: where the result shall lie, looked at too.
        compat: as in `merge`.

    Raises:
        FileNotFoundError: no such YAML file.
        PlanError: a ValueError with everything that is wrong.
    """
    written = read_yaml(config) | ({} if compat is None else {"compat": compat})
    try:
        parsed = parse_config(written, str(config))
    except ValueError as error:
        findings = Findings()
        findings.error(str(error))
        if out is not None:
            check_output(Path(out), (), 0, findings)
        findings.raise_errors()
        raise
    return plan_merge(parsed, Path(config).resolve().parent, out=out)


def show_plan(plan: MergePlan, *, every_tensor: bool = False) -> Iterator[RenderableType]:
    """Tables and lines for rich.

    Args:
        every_tensor: a line for each, instead of one for those that differ in nothing but their layer.
    """
    yield _models(plan)
    yield _tensors(plan, every_tensor)
    if plan.vocabulary is not None:
        yield _vocabulary(plan)
    yield _donors(plan)
    for note in plan.notes:
        yield Text(f"note: {note}")
    for warning in plan.warnings:
        yield Text(f"warning: {warning}", style="yellow")
    values = sum(tensor.numel for tensor in plan.tensors)
    size = f"{len(plan.tensors)} tensors, {values:,} values, {plan.total_bytes / 1e9:.2f} GB"
    yield Text(f"{plan.config.merge_method}: {size}; nothing stands in its way", style="green")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _models(plan: MergePlan) -> Table:
    table = _table("Models", "", "folder", "tensors", "dtype", "base")
    bases = {tensor.sources[tensor.base].model for tensor in plan.tensors if tensor.base is not None}
    for number, (model, label) in enumerate(zip(plan.models, plan.model_labels)):
        dtypes = sorted({dtype_name(model.dtype(name)) for name in model.names})
        base = "base" if number in bases else ""
        table.add_row(str(number), Text(label), str(len(model.names)), ", ".join(dtypes), base)
    return table


def _tensors(plan: MergePlan, every_tensor: bool) -> Table:
    everywhere = _everywhere(plan.tensors)
    title = ", ".join(f"{key} {value}" for key, value in everywhere.items())
    table = _table(f"Tensors; all with {title}" if title else "Tensors", "name", "shape", "dtype", "from", "parameters")
    groups: dict[Any, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        groups.setdefault(tensor.name if every_tensor else _kind(tensor), []).append(tensor)
    for tensors in groups.values():
        first = tensors[0]
        names = "\n".join(abbreviate(tensor.name for tensor in tensors))
        parameters = "copied if equal" if first.operation == "equal" else _parameters(tensors, everywhere)
        shape = " x ".join(map(str, first.shape)) or "scalar"
        table.add_row(Text(names), shape, dtype_name(first.dtype), _sources(first), Text(parameters))
    return table


def _kind(tensor: TensorPlan) -> Any:
    """What tensors of different layers must share to stand in one line: all but the layer and the parameters."""
    layer = split_layer(tensor.name)
    kind = (layer[0], layer[2]) if layer else tensor.name
    return kind, tensor.shape, tensor.dtype, tensor.base, tensor.operation, _sources(tensor)


def _sources(tensor: TensorPlan) -> str:
    """Numbers of the models; with their layers' distance where slices move them."""
    found = []
    for source in tensor.sources:
        layer = split_layer(source.name)
        moved = layer[1] - tensor.layer if layer and tensor.layer is not None else 0
        arranged = " (rows arranged)" if source.rows is not None else ""
        found.append(f"{source.model}" + (f" (layer {moved:+d})" if moved else "") + arranged)
    return ", ".join(found)


def _everywhere(tensors: Sequence[TensorPlan]) -> dict[str, str]:
    """The parameters that have one value in all tensors."""
    merged = [tensor.parameters for tensor in tensors if tensor.operation != "equal"]
    values = {key: {_value(parameters[key]) for parameters in merged} for key in (merged[0] if merged else ())}
    return {key: next(iter(found)) for key, found in values.items() if len(found) == 1}


def _parameters(tensors: Sequence[TensorPlan], everywhere: Mapping[str, str]) -> str:
    """Of the other parameters the value, or the values along the layers."""
    found = []
    for key in tensors[0].parameters.keys() - everywhere.keys():
        values = [_value(tensor.parameters[key]) for tensor in tensors]
        if len(set(values)) == 1:
            found.append(f"{key} {values[0]}")
            continue
        if len(values) > MOST_VALUES:
            values = [*values[: MOST_VALUES - 2], "...", values[-1]]
        found.append(f"{key} {' → '.join(values)}")
    return ", ".join(sorted(found))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _vocabulary(plan: MergePlan) -> Table:
    """Where the rows of embedding and head come from, model by model."""
    assert plan.vocabulary is not None
    vocabulary = plan.vocabulary
    title = f"Vocabulary: {len(vocabulary.ids)} tokens, {len(vocabulary.added)} of them added, {vocabulary.rows} rows"
    table = _table(title, "tensor", "model", "own", "of others", "means", "zeros", "padding")
    for tensor in plan.tensors:
        for source in tensor.sources:
            if source.rows is not None:
                counts = source.rows.counts(source.model)
                table.add_row(Text(tensor.name), str(source.model), *(str(count) for count in counts.values()))
    return table


def _donors(plan: MergePlan) -> Table:
    table = _table("Beside the weights", "file", "from")
    table.add_row("config.json", Text(str(plan.config_donor)))
    table.add_row("tokenizer", Text(str(plan.tokenizer_donor)))
    table.add_row("chat template", Text(plan.template_donor))
    for donor, file in plan.carried:
        table.add_row(Text(file.relative_to(donor).as_posix()), Text(str(donor)))
    for name in plan.written:
        table.add_row(Text(name), "written anew")
    return table
