"""The forwards that `patch` puts on the modules of a transformers model: the same results through steep's kernels.

Each is a function (module, ...) with the arguments of the forward it stands in for. A kernel that needs more than
that forward is given gets it through the module's own call, so that hooks (FSDP2's unsharding, transformers' recording
of outputs) fire as before: a norm takes `residual`, the output head takes `labels`. What these functions need not know
is passed on unread, so that they fit every transformers 5. Parameters, their names and the structure of the model stay
as they are. What a kernel cannot do (padding, a key-value cache, LoRA inside an MLP, ...) goes to the model's own code.
May touch: torch, and modules of transformers that the model itself has already imported.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attention
from .fused_linear import swiglu_linear
from .gate_up import gate_up_linear
from .linear_cross_entropy import linear_cross_entropy
from .moe import moe_experts
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .swiglu import swiglu

_CACHE_NAMES = ("cache", "past_key_values")  # transformers' argument for a key-value cache, since 5.24 and before
Module = Any  # an nn.Module of transformers, whose attributes no type checker knows
RECORD = "_steep_forward"  # the one attribute that a patched module carries beside `forward`


class Forward:
    """A replaced forward: a bound method that knows what it stands in for, and that survives pickling (Python pickles
    methods by name, and would find the class's own `forward` again)."""

    def __init__(self, function: Callable, module: Module, calls: dict[str, int]):
        self.__func__, self.__self__ = function, module
        self.calls = calls  # one dict per model, shown by its PatchReport: forwards by who computed the attention

    def __call__(self, *args, **kwargs):
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's forward: trainers read from it which columns and arguments the model takes."""
        return inspect.signature(MethodType(type(self.__self__).forward, self.__self__))

    def original(self, *args, **kwargs):
        return type(self.__self__).forward(self.__self__, *args, **kwargs)


def is_patched(module: Module) -> bool:
    return RECORD in vars(module)


def modeling_file(module: Module) -> Any:
    """The module of transformers that defines `module`'s class: its helper functions are what the model itself uses."""
    return sys.modules[type(module).forward.__module__]


def _has_cache(kwargs: dict) -> bool:
    return any(kwargs.get(name) is not None for name in _CACHE_NAMES)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operands of a GEMM as torch.nn.Linear would see them inside an autocast region."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


# --- norm, MLP, decoder layer ----------------------------------------------------------------------------------------


def rms_norm_forward(norm: Module, hidden_states: torch.Tensor, residual: torch.Tensor | None = None):
    """norm(hidden_states), or with `residual` the pair (norm(s), s), s = residual + hidden_states."""
    weight, eps = norm.weight, norm.variance_epsilon
    if residual is not None:
        if hidden_states.dtype == residual.dtype == weight.dtype:
            return add_rms_norm(hidden_states, residual, weight, eps)
        s = residual + hidden_states  # under autocast: bf16 into an fp32 residual stream
        return rms_norm_forward(norm, s), s
    if hidden_states.dtype != weight.dtype:  # fp32 weights over bf16 activations: transformers promotes the result
        return getattr(norm, RECORD).original(hidden_states)
    return rms_norm(hidden_states, weight, eps)


def is_plain(linear: Module) -> bool:
    """Whether x W^T is all that calling `linear` does: no bias, LoRA, quantisation, tensor parallelism, sharding of its
    own. What brings those along changes the class, also of the weight, or hangs hooks on the module."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear) or any(hooks):
        return False
    sharded = hasattr(linear.weight, "full_tensor")  # a DTensor, which FSDP2 gathers before the call
    return sharded or type(linear.weight) in (nn.Parameter, torch.Tensor)


def mlp_forward(mlp: Module, x: torch.Tensor) -> torch.Tensor:
    if not (is_plain(mlp.gate_proj) and is_plain(mlp.up_proj)):
        return getattr(mlp, RECORD).original(x)
    operands = _autocast(x.reshape(-1, x.shape[-1]), mlp.gate_proj.weight, mlp.up_proj.weight)
    gate_up, down = gate_up_linear(*operands), mlp.down_proj
    if is_plain(down):
        return swiglu_linear(gate_up, *_autocast(down.weight)).view(*x.shape[:-1], -1)
    return down(swiglu(gate_up).view(*x.shape[:-1], -1))


def decoder_layer_forward(layer: Module, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    # The class's own forward is wrapped in the checkpointing that is done here; releases of transformers before that
    # did it in `__call__`, which still runs.
    checkpoints = layer.gradient_checkpointing and type(layer).__call__ is nn.Module.__call__
    if checkpoints and layer.training and torch.is_grad_enabled():
        kwargs = {name: value for name, value in kwargs.items() if name not in (*_CACHE_NAMES, "use_cache")}
        return layer._gradient_checkpointing_func(partial(_decoder_layer, layer, **kwargs), hidden_states)
    return _decoder_layer(layer, hidden_states, **kwargs)


def _decoder_layer(layer: Module, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    norm = layer.post_attention_layernorm
    if is_patched(norm):
        x, residual = norm(attended, residual=hidden_states)
    else:  # replaced after patching, by a trainable copy for instance
        residual = hidden_states + attended
        x = norm(residual)
    return residual + layer.mlp(x)


# --- rotary embedding ------------------------------------------------------------------------------------------------


class RotaryTables:
    """What `rope` takes, computed once per forward of the model. Neither a tuple nor a dataclass: FSDP2 looks into
    those and casts the floating-point tensors that it finds in a layer's arguments to its parameter dtype."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype):
        self.cos, self.sin = cos, sin  # fp32 [P, D/2], one row per position id
        self.rows = rows  # [B, L]: each token's row of the tables
        self.dtype = dtype  # that of the hidden states

    def as_transformers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [B, L, D], rounded to the hidden states' dtype: what the rotary module itself returns."""
        cos, sin = (table[self.rows].to(self.dtype) for table in (self.cos, self.sin))
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def rotary_forward(rotary: Module, x: torch.Tensor, position_ids: torch.Tensor) -> RotaryTables:
    """transformers' own table, scaling and all, without its rounding to x.dtype; with a row per position id no table
    has to be long enough for all positions."""
    cos, sin = getattr(rotary, RECORD).original(x.new_empty(0, dtype=torch.float32), position_ids)
    half = cos.shape[-1] // 2
    cos, sin = (t[..., :half].reshape(-1, half) for t in (cos, sin))
    rows = torch.arange(position_ids.numel(), device=cos.device).view(position_ids.shape)
    return RotaryTables(cos, sin, rows.expand(x.shape[0], -1), x.dtype)


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass
class Documents:
    """The documents of a batch, flattened to [B * L] tokens: the arguments of `attention`."""

    cu_seqlens: torch.Tensor  # int32 [N+1]
    max_seqlen: int


def model_forward(model: Module, input_ids=None, attention_mask=None, position_ids=None, *args, **kwargs):
    """The decoder stack: finds the documents once, for the attention of all layers."""
    record = getattr(model, RECORD)
    documents: Documents | str = "positional arguments"
    if not args:
        documents = _find_documents(model, input_ids, attention_mask, position_ids, kwargs)
    if isinstance(documents, Documents):
        kwargs["steep_documents"] = documents
        # A mask of four dimensions is taken as it is: no [L, L] mask is built for attention that reads none.
        attention_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=documents.cu_seqlens.device)
    if not torch.compiler.is_compiling():
        by = documents if isinstance(documents, str) else "steep"
        record.calls[by] = record.calls.get(by, 0) + 1
    return record.original(input_ids, attention_mask, position_ids, *args, **kwargs)


def _find_documents(model: Module, input_ids, attention_mask, position_ids, kwargs: dict) -> Documents | str:
    """The documents that transformers would let attend to themselves, or why its own attention has to do it.

    Tensors are looked at on a CPU only: on a GPU that would be a synchronisation, and under torch.compile a break.
    """
    inputs = kwargs.get("inputs_embeds") if input_ids is None else input_ids
    if inputs is None:
        return "no inputs"
    batch, length = inputs.shape[:2]
    readable = inputs.device.type == "cpu" and not torch.compiler.is_compiling()
    use_cache = kwargs.get("use_cache")
    if _has_cache(kwargs) or (model.config.use_cache if use_cache is None else use_cache):
        return "a key-value cache"
    if model.training and model.config.attention_dropout:
        return "attention dropout"
    if kwargs.get("output_attentions", model.config.output_attentions):
        return "attention weights are asked for"
    if attention_mask is not None:
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            return "a mask of more than padding"
        if not readable:
            return "an attention_mask, not looked at on a GPU"
        if not attention_mask.all():
            return "padding"
    elif kwargs.get("cu_seq_lens_q") is not None:
        max_seqlen = kwargs.get("max_length_q")
        if batch != 1 or max_seqlen is None or (isinstance(max_seqlen, torch.Tensor) and max_seqlen.is_cuda):
            return "cu_seq_lens_q without batch size 1 and max_length_q as an int"
        return Documents(kwargs["cu_seq_lens_q"].reshape(-1).to(torch.int32), int(max_seqlen))
    elif position_ids is not None:
        if not readable:
            return "position_ids without cu_seq_lens_q and max_length_q, not looked at on a GPU"
        starts = torch.ones(batch, length, dtype=torch.bool)
        starts[:, 1:] = position_ids.diff(dim=-1) != 1
        bounds = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=batch * length)
        return Documents(bounds.to(torch.int32), int(bounds.diff().max()))
    return Documents(torch.arange(batch + 1, dtype=torch.int32, device=inputs.device) * length, length)


def sliding_window(attn: Module) -> int | None:
    if type(attn).__name__.endswith("LlamaAttention"):  # ignores whatever its configuration says
        return None
    return attn.sliding_window if hasattr(attn, "sliding_window") else getattr(attn.config, "sliding_window", None)


def attention_forward(
    attn: Module, hidden_states: torch.Tensor, position_embeddings=None, attention_mask=None,
    steep_documents: Documents | None = None, **kwargs,
):  # fmt: skip
    """Projections, rope and attention on flat [T, heads, D]; without documents, transformers' attention function."""
    tables = position_embeddings if isinstance(position_embeddings, RotaryTables) else None
    if _has_cache(kwargs):
        position_embeddings = position_embeddings if tables is None else tables.as_transformers()
        return getattr(attn, RECORD).original(hidden_states, position_embeddings, attention_mask, **kwargs)

    batch, length = hidden_states.shape[:2]
    modeling = modeling_file(attn)
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    q, k, v = (project(hidden_states).view(batch * length, -1, attn.head_dim) for project in projections)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if tables is not None:
        q, k = rope(q, k, *(t.to(q.device) for t in (tables.cos, tables.sin, tables.rows.reshape(-1))))
    else:
        q, k = (x.view(batch, length, -1, attn.head_dim) for x in (q, k))
        q, k = modeling.apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        q, k = q.flatten(0, 1), k.flatten(0, 1)

    window, weights = sliding_window(attn), None
    if steep_documents is not None:
        cu_seqlens, max_seqlen = steep_documents.cu_seqlens.to(q.device), steep_documents.max_seqlen
        q, k = q.to(v.dtype), k.to(v.dtype)  # fp32 norms promote in transformers; its attention casts back as well
        o = attention(q, k, v, cu_seqlens, max_seqlen, window=window, scale=attn.scaling)
    else:
        q, k, v = (x.view(batch, length, -1, attn.head_dim).transpose(1, 2) for x in (q, k, v))
        function = modeling.ALL_ATTENTION_FUNCTIONS.get(
            attn.config._attn_implementation, modeling.eager_attention_forward
        )
        dropout = attn.attention_dropout if attn.training else 0.0
        options = {"dropout": dropout, "scaling": attn.scaling, "sliding_window": window}
        o, weights = function(attn, q, k, v, attention_mask, **options, **kwargs)
    return attn.o_proj(o.reshape(batch, length, -1)), weights


# --- experts ---------------------------------------------------------------------------------------------------------


def experts_forward(
    experts: Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The router stays transformers': its logits are recorded there, and its share of the time is nothing."""
    x, gate_up, down = _autocast(hidden_states, experts.gate_up_proj, experts.down_proj)
    return moe_experts(x, top_k_weights, top_k_index, gate_up, down)


# --- output head and loss --------------------------------------------------------------------------------------------


def lm_head_forward(
    head: Module, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, num_items=None,
    ignore_index: int = -100,
) -> torch.Tensor:  # fmt: skip
    """Logits; or with `labels`, already shifted, the loss: the sum over targets divided by num_items (None: their
    number). num_items is taken rather than its inverse because FSDP2 would cast a floating-point argument."""
    if labels is None:
        return F.linear(hidden_states, head.weight, head.bias)
    x, weight = _autocast(hidden_states.reshape(-1, hidden_states.shape[-1]), head.weight)
    labels = labels.reshape(-1).to(x.device)
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    if not isinstance(num_items, torch.Tensor):
        num_items = torch.full((), num_items, device=x.device)
    scale = num_items.to(x.device, torch.float32).reshape(()).reciprocal()
    if x.dtype == torch.float16:
        # A GradScaler multiplies the loss before its gradients can underflow; the fused loss has made them by then.
        logits = F.linear(x, weight).float()
        return scale * F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return linear_cross_entropy(x, weight, labels, scale=scale, ignore_index=ignore_index)[0]


def causal_lm_forward(
    model: Module, input_ids=None, attention_mask=None, position_ids=None, *args,
    labels=None, logits_to_keep=0, **kwargs,
):  # fmt: skip
    """In training with labels: the loss, and neither logits nor a key-value cache. Else the model's own forward."""
    head = model.lm_head
    fused = labels is not None and model.training and is_patched(head) and not args
    fused = fused and isinstance(logits_to_keep, int) and logits_to_keep == 0
    if not fused or getattr(model.loss_function, "__name__", None) != "ForCausalLMLoss":
        kwargs |= {"labels": labels, "logits_to_keep": logits_to_keep}
        return getattr(model, RECORD).original(input_ids, attention_mask, position_ids, *args, **kwargs)

    return_dict = kwargs.pop("return_dict", None)
    num_items, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
    ignore_index = kwargs.pop("ignore_index", -100)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = False
    routed = kwargs.get("output_router_logits")
    if routed is None:
        routed = getattr(model.config, "output_router_logits", False)
    if routed:
        kwargs["output_router_logits"] = True
    outputs = model.model(input_ids, attention_mask, position_ids, **kwargs)
    loss = head(outputs.last_hidden_state, labels=shift_labels, num_items=num_items, ignore_index=ignore_index)

    modeling = modeling_file(model)
    fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    if not hasattr(modeling, "load_balancing_loss_func"):
        output = modeling.CausalLMOutputWithPast(loss=loss, **fields)
    else:
        aux_loss = None
        if routed:
            aux_loss = modeling.load_balancing_loss_func(
                outputs.router_logits, model.num_experts, model.num_experts_per_tok, attention_mask
            )
            loss = loss + model.router_aux_loss_coef * aux_loss.to(loss.device)
        output = modeling.MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, **fields)
    as_dict = model.config.return_dict if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()
