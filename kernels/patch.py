"""steep's kernels in a model of transformers: `patch(model)` before training, `unpatch(model)` to have it back.

Only that instance changes: the `forward` of its modules is replaced (hf_forwards.py), nothing of transformers is, and
parameters, their names, `state_dict`, `save_pretrained` and hooks stay what they were. Families: Llama, Mistral,
Qwen2, Qwen3 and Mixtral, recognised by the names of their classes, so that transformers is not imported here.
May touch: torch, the model it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import hf_forwards as hf

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral")


@dataclass
class PatchReport:
    """What `patch` did; prints as a table. `calls` goes on counting: forwards of the model by who computed their
    attention, "steep" or the reason why the model's own function did (not counted inside torch.compile)."""

    model: str
    # (kernel, modules, None or why they were not replaced) -> number of modules
    rows: dict[tuple[str, str, str | None], int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("kernel", "modules", "count", "")]
        for (kernel, modules, reason), count in self.rows.items():
            rows.append((kernel, modules, str(count), f"not replaced: {reason}" if reason else ""))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [f"{self.model} with steep.kernels"]
        for kernel, modules, number, note in rows:
            lines.append(f"  {kernel:<{widths[0]}}  {modules:<{widths[1]}}  {number:>{widths[2]}}  {note}".rstrip())
        if self.calls:
            lines.append("forwards of the model, by who computed the attention")
            lines += [
                f"  {count:>6}  {by if by == 'steep' else f'transformers: {by}'}" for by, count in self.calls.items()
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Replacement:
    option: str  # the argument of `patch` that switches it
    kernel: str | None  # as the report names it; None where a module only prepares what another one's kernel takes
    forward: Callable
    obstacle: str | None = None  # why this module keeps its own forward


def patch(
    model: Any,
    *,
    rms_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
    attention: bool = True,
    loss: bool = True,
    moe: bool = True,
) -> PatchReport:
    """Put steep's kernels into `model`, an instance of transformers (or of peft around one), in place.

    Results are those of the model's own code up to rounding, in training and in generation; each argument switches one
    kernel off. Two things differ, both in training mode only: with `labels` the output holds the loss but no logits
    (`loss`), and packed batches never build a mask (`attention`: batches without padding or a key-value cache; on a
    GPU, packed ones need the arguments cu_seq_lens_q and max_length_q, which DataCollatorWithFlattening makes with
    return_flash_attn_kwargs=True; all else goes through the model's attention function and is counted in the report).
    Patch after peft has put its adapters in and before Accelerator.prepare and torch.compile; before or after FSDP2's
    fully_shard.

    Raises:
        ValueError: the model's family is not supported, it is tensor parallel, or forwards of its modules have been
            replaced already, by `patch` or by others.
    """
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = _family(root)
    modules = root.named_modules()
    plan = [(name, module, todo) for name, module in modules for todo in _replacements(module, family, root)]
    _check_untouched(root, plan)
    wanted = {"rms_norm": rms_norm, "rope": rope, "swiglu": swiglu, "attention": attention, "loss": loss, "moe": moe}
    report = PatchReport(type(root).__name__)
    for name, module, todo in plan:
        reason = todo.obstacle if wanted[todo.option] else f"{todo.option}=False"
        if reason is None and not hf.is_patched(module):  # rope and attention share a forward
            module.forward = forward = hf.Forward(todo.forward, module, report.calls)
            setattr(module, hf.RECORD, forward)
        if todo.kernel is not None:
            row = (todo.kernel, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), reason)
            report.rows[row] = report.rows.get(row, 0) + 1
    return report


def unpatch(model: nn.Module) -> None:
    """Give every module of `model` back the forward that it had before `patch`; nothing is left behind, nor is what
    was wrapped around a replaced forward since (Accelerator.prepare's autocast). A model that is not patched stays as
    it is."""
    for module in model.modules():
        if hf.is_patched(module):
            del module.__dict__["forward"], module.__dict__[hf.RECORD]


def _check_untouched(root: Any, plan: list[tuple[str, Any, _Replacement]]) -> None:
    what = f"patch: this {type(root).__name__}"
    if any(hf.is_patched(module) for module in root.modules()):
        raise ValueError(f"{what} is patched already; unpatch(model) comes first")
    if getattr(root, "_tp_size", None):
        raise ValueError(f"{what} is tensor parallel; patch does not support that")
    for name, module, _ in plan:
        forward = vars(module).get("forward")
        # transformers 5.0 leaves the class's own forward on instances whose outputs it has recorded.
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            raise ValueError(
                f"{what} has been given another forward in {name or 'the model itself'} (by Accelerator.prepare, "
                "device_map or another patch), which patch would switch off; patch comes first"
            )


def _family(model: nn.Module) -> str:
    for family in _FAMILIES:
        if any(base.__name__ == f"{family}PreTrainedModel" for base in type(model).__mro__):
            return family
    raise ValueError(
        f"patch: {type(model).__name__} is not supported; transformers' {', '.join(_FAMILIES)} models are "
        "(pip install transformers)"
    )


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # fully_shard puts a class FSDP<Class> over <Class>


def _replacements(module: Any, family: str, root: Any) -> Iterator[_Replacement]:
    """What can be put on one module, in the order of the report."""
    name = _class_name(module)
    if name == f"{family}RMSNorm":
        yield _Replacement("rms_norm", "rms_norm", hf.rms_norm_forward)
    elif name == f"{family}DecoderLayer":
        yield _Replacement("rms_norm", "add_rms_norm", hf.decoder_layer_forward)
    elif name == f"{family}RotaryEmbedding":
        yield _Replacement("rope", None, hf.rotary_forward, _rope_obstacle(root))
    elif name == f"{family}Attention":
        yield _Replacement("rope", "rope", hf.attention_forward, _rope_obstacle(root))
        yield _Replacement("attention", "attention", hf.attention_forward, _attention_obstacle(root))
    elif name == f"{family}Model":
        yield _Replacement("attention", None, hf.model_forward, _attention_obstacle(root))
    elif name == f"{family}MLP":
        yield _Replacement("swiglu", "swiglu", hf.mlp_forward, _mlp_obstacle(module, root))
    elif name == f"{family}Experts":
        yield _Replacement("moe", "moe_experts", hf.experts_forward, _activation_obstacle(root))
    elif module is root and hasattr(root, "lm_head"):
        yield _Replacement("loss", None, hf.causal_lm_forward, _loss_obstacle(root, family))
    elif module is getattr(root, "lm_head", None):
        yield _Replacement("loss", "linear_cross_entropy", hf.lm_head_forward, _loss_obstacle(root, family))


def _rope_obstacle(root: Any) -> str | None:
    rotary, attn = root.base_model.rotary_emb, root.base_model.layers[0].self_attn
    rotated = 2 * rotary.inv_freq.numel()
    return None if rotated == attn.head_dim else f"only {rotated} of {attn.head_dim} dimensions of a head are rotated"


def _attention_obstacle(root: Any) -> str | None:
    return None if getattr(root.config, "is_causal", True) else "the attention is not causal"


def _activation_obstacle(root: Any) -> str | None:
    activation = root.config.hidden_act
    return None if activation in ("silu", "swish") else f"the activation is {activation}, not silu"


def _mlp_obstacle(mlp: Any, root: Any) -> str | None:
    for name in ("gate_proj", "up_proj"):
        if not hf.is_plain(getattr(mlp, name)):
            return f"{name} is {_description(getattr(mlp, name))}"
    return _activation_obstacle(root)


def _loss_obstacle(root: Any, family: str) -> str | None:
    if _class_name(root) != f"{family}ForCausalLM":
        return f"{type(root).__name__} has a forward of its own"
    head = root.lm_head
    if not (type(head) is nn.Linear or type(head).__name__ == "FSDPLinear") or head.bias is not None:
        return f"lm_head is {_description(head)}"
    return None


def _description(linear: nn.Module) -> str:
    if type(linear) is nn.Linear:
        return "an nn.Linear with a bias, hooks or a weight of another class"
    return f"a {type(linear).__module__}.{type(linear).__name__}"
