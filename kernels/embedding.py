"""Embedding: rows of a table by token, with NEFTune's noise, forward and backward.

    y_t = W[token_t] + a_t * u_t,    u ~ U(-1, 1)^H,    a_t = alpha / sqrt(L_t * H)    (a = 0 without noise)
    dW_v = sum of dy_t over the t with token_t = v, in fp32, in the order of t

L_t is the length of the token's own document. The noise is a pure function of (seed, step, position of the token in the
global batch, column): recomputation, other micro-batches and any sharding give the same.
Floor (bf16): forward reads and writes T * H elements, 4 T H bytes; about 25 integer instructions an element hide the
noise behind them only partly. Backward reads T * H elements and writes V * H (zeros mostly), 2 H (T + V) bytes; into an
fp32 `main_grad` it reads and writes only the rows that occur, at most 10 T H bytes. Saved: tokens.
Source: Jain et al. 2023, arXiv:2310.05914. May touch: torch, triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, tl, unit_rows
from .philox import philox_bits, philox_block

_HALF_RANGE = 1 << 23  # noise is an odd multiple of 2^-23 in (-1, 1): symmetric, exact in fp32, never 0

# --- torch reference -------------------------------------------------------------------------------------------------

_BLOCK_TOKENS = 256  # the noise of one block at a time


def _embedding_cpu(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    lengths: torch.Tensor | None,
    step: torch.Tensor | None,
    first_token: torch.Tensor | None,
    alpha: float,
    seed: int,
) -> torch.Tensor:
    vocab, hidden = weight.shape
    inside = (tokens >= 0) & (tokens < vocab)
    if not inside.all():
        index = int(inside.int().argmin())  # of equal ones the first
        raise ValueError(f"embedding: tokens[{index}] is {tokens[index].item()}; allowed: 0 to {vocab - 1}")
    y = weight.index_select(0, tokens)
    if lengths is None or step is None or first_token is None:
        return y
    acc = compute_dtype(weight.dtype)
    first, stream = int(first_token), int(step)
    for begin in range(0, len(tokens), _BLOCK_TOKENS):
        block = y[begin : begin + _BLOCK_TOKENS]
        bits = philox_bits(seed, stream, (first + begin) * hidden, block.numel()).view(block.shape)
        noise = ((bits >> 8) | 1).sub_(_HALF_RANGE).to(acc).mul_(1 / _HALF_RANGE)
        length = lengths[begin : begin + _BLOCK_TOKENS, None].to(acc)
        amplitude = torch.where(length > 0, alpha / (length * hidden).sqrt(), 0)
        block.copy_(noise.mul_(amplitude).add_(block))
    return y


def _row_sums(dy: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that occur and the sums of their rows of dy; torch's own adds up in the dtype that it is given."""
    occurring, index = tokens.unique(return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(dy.to(dtype), index, len(occurring), -1, False)
    return occurring.long(), sums


def _embedding_backward_cpu(dy: torch.Tensor, tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    occurring, sums = _row_sums(dy, tokens, compute_dtype(dy.dtype))
    return dy.new_zeros(vocab, dy.shape[1]).index_copy_(0, occurring, sums.to(dy.dtype))


def _embedding_accumulate_cpu(dy: torch.Tensor, tokens: torch.Tensor, main_grad: torch.Tensor) -> None:
    occurring, sums = _row_sums(dy, tokens, main_grad.dtype)
    main_grad.index_copy_(0, occurring, sums.add_(main_grad.index_select(0, occurring)))


# --- Triton ----------------------------------------------------------------------------------------------------------

_ROWS = 32  # sorted rows of one program of the backward


@kernel
def _forward_kernel(
    TOKENS, W, Y, LENGTHS, STEP, FIRST_TOKEN, alpha, seed, hidden, w_stride,
    NOISE: tl.constexpr, HALF_RANGE: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One block of columns of one token."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(TOKENS + row).to(tl.int64)
    y = tl.load(W + token * w_stride + col, col < hidden, 0.0).to(tl.float32)
    if NOISE:
        start = (tl.load(FIRST_TOKEN) + row) * hidden + tl.program_id(1) * BLOCK
        bits = philox_block(seed, tl.load(STEP), start, BLOCK)
        noise = (((bits >> 8) | 1).to(tl.int32) - HALF_RANGE).to(tl.float32) * (1 / HALF_RANGE)
        length = tl.load(LENGTHS + row).to(tl.float32)
        amplitude = tl.where(length > 0, alpha / tl.sqrt(tl.maximum(length, 1.0) * hidden), 0.0)
        y += noise * amplitude
    tl.store(Y + row * hidden + col, cast(y, Y.dtype.element_ty, INTERPRET), col < hidden)


@kernel
def _add_to_gradient(GRAD, token, total, hidden, col, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr):
    row = GRAD + token.to(tl.int64) * hidden + col
    if ACCUMULATE:
        total += tl.load(row, col < hidden, 0.0)
    tl.store(row, cast(total, GRAD.dtype.element_ty, INTERPRET), col < hidden)


@kernel
def _sum_kernel(
    DY, ORDER, SORTED, GRAD, FIRST, LAST, tokens, hidden, dy_stride,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sums the runs of equal tokens among ROWS sorted rows. A run inside is the gradient of its token; what a run that
    began before has here goes to FIRST, what one that goes on behind has here to LAST."""
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = chunk * ROWS
    end = tl.minimum(begin + ROWS, tokens)
    began_before = tl.load(SORTED + begin - 1, begin > 0, -1) == tl.load(SORTED + begin)
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.range(begin, end, num_stages=STAGES):
        row = tl.load(ORDER + index)
        total += tl.load(DY + row * dy_stride + col, col < hidden, 0.0).to(tl.float32)
        token = tl.load(SORTED + index)
        run_ends = tl.load(SORTED + index + 1, index + 1 < tokens, -1) != token
        if run_ends | (index + 1 == end):
            if began_before:
                tl.store(FIRST + chunk * hidden + col, total, col < hidden)
            elif run_ends:
                _add_to_gradient(GRAD, token, total, hidden, col, ACCUMULATE, INTERPRET)
            else:
                tl.store(LAST + chunk * hidden + col, total, col < hidden)
            total = tl.zeros((BLOCK,), tl.float32)
            began_before = False


@kernel
def _join_kernel(
    SORTED, RUN_ENDS, GRAD, FIRST, LAST, hidden,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The run that begins in a chunk and goes on behind it, from its parts."""
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = (chunk + 1) * ROWS
    token = tl.load(SORTED + end - 1)
    run_end = tl.load(RUN_ENDS + chunk)
    begins_here = tl.load(SORTED + end - ROWS - 1, chunk > 0, -1) != token
    if begins_here & (run_end > end):
        total = tl.load(LAST + chunk * hidden + col, col < hidden, 0.0)
        for part in tl.range(chunk + 1, (run_end + ROWS - 1) // ROWS, num_stages=STAGES):
            total += tl.load(FIRST + part * hidden + col, col < hidden, 0.0)
        _add_to_gradient(GRAD, token, total, hidden, col, ACCUMULATE, INTERPRET)


def _tile(hidden: int) -> dict[str, int]:
    """One 16-byte vector of bf16 per thread."""
    block = min(max(next_power_of_2(hidden), 32), 1024)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}


def _embedding_triton(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    lengths: torch.Tensor | None,
    step: torch.Tensor | None,
    first_token: torch.Tensor | None,
    alpha: float,
    seed: int,
) -> torch.Tensor:
    weight = unit_rows(weight)
    hidden, tile = weight.shape[1], _tile(weight.shape[1])
    y = weight.new_empty(tokens.shape[0], hidden)
    noise = (tokens, tokens, tokens) if lengths is None else (lengths.contiguous(), step, first_token)
    launch(
        _forward_kernel, (tokens.shape[0], cdiv(hidden, tile["BLOCK"])), tokens.contiguous(), weight, y, *noise,
        alpha, seed, hidden, weight.stride(0), NOISE=lengths is not None, HALF_RANGE=_HALF_RANGE, **tile,
    )  # fmt: skip
    return y


def _accumulate(dy: torch.Tensor, tokens: torch.Tensor, grad: torch.Tensor, accumulate: bool) -> None:
    """Set (or add) the rows of grad of the tokens that occur, each from one program and in the order of the tokens."""
    dy = unit_rows(dy)
    count, hidden = dy.shape
    chunks, tile = cdiv(count, _ROWS), _tile(hidden)
    blocks = cdiv(hidden, tile["BLOCK"])
    tokens, order = tokens.sort(stable=True)
    first, last = torch.empty(2, chunks, hidden, dtype=torch.float32, device=dy.device)
    constants = {"ACCUMULATE": accumulate, "ROWS": _ROWS, "STAGES": 4, **tile}
    launch(
        _sum_kernel, (chunks, blocks), dy, order, tokens, grad, first, last, count, hidden, dy.stride(0), **constants
    )
    crossing = tokens[_ROWS - 1 : count - 1 : _ROWS].contiguous()  # the last token of every chunk but the last
    run_ends = torch.searchsorted(tokens, crossing, right=True)
    launch(_join_kernel, (len(crossing), blocks), tokens, run_ends, grad, first, last, hidden, **constants)


def _embedding_backward_triton(dy: torch.Tensor, tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    dw = dy.new_zeros(vocab, dy.shape[1])
    _accumulate(dy, tokens, dw, False)
    return dw


def _embedding_accumulate_triton(dy: torch.Tensor, tokens: torch.Tensor, main_grad: torch.Tensor) -> None:
    _accumulate(dy, tokens, main_grad, True)


# --- operators -------------------------------------------------------------------------------------------------------

_embedding_op = define_op(
    "embedding",
    "(Tensor tokens, Tensor weight, Tensor? lengths, Tensor? step, Tensor? first_token, float alpha, int seed) "
    "-> Tensor",
    cpu=_embedding_cpu,
    cuda=_embedding_triton,
    fake=lambda tokens, weight, *_: weight.new_empty(tokens.shape[0], weight.shape[1]),
)
_embedding_backward_op = define_op(
    "embedding_backward",
    "(Tensor dy, Tensor tokens, SymInt vocab) -> Tensor",
    cpu=_embedding_backward_cpu,
    cuda=_embedding_backward_triton,
    fake=lambda dy, tokens, vocab: dy.new_empty(vocab, dy.shape[1]),
)
_embedding_accumulate_op = define_op(
    "embedding_accumulate",
    "(Tensor dy, Tensor tokens, Tensor(a!) main_grad) -> ()",
    cpu=_embedding_accumulate_cpu,
    cuda=_embedding_accumulate_triton,
    fake=lambda dy, tokens, main_grad: None,
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight, main_grad, lengths, step, first_token, alpha, seed):
        ctx.save_for_backward(tokens)
        ctx.vocab = weight.shape[0]
        ctx.main_grad = main_grad  # not a saved tensor: other micro-batches write to it in between
        return _embedding_op(tokens, weight, lengths, step, first_token, alpha, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        (tokens,) = ctx.saved_tensors
        dw = None
        if ctx.main_grad is None:
            dw = _embedding_backward_op(dy, tokens, ctx.vocab)
        else:
            _embedding_accumulate_op(dy, tokens, ctx.main_grad)
        return None, dw, None, None, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NeftuneNoise:
    """Uniform noise of amplitude alpha / sqrt(L * H) on the embeddings of one piece of a global batch.

    alpha: 5, 10 or 15 in the paper.
    lengths: int32 or int64 [T], L of every token: `document_lengths(cu_seqlens, T)` for packed documents, or one
        sequence length for all, as transformers' hook takes it. Where it is 0 there is no noise.
    seed: of the run, 0 to 2^63 - 1.
    step: number of the optimizer step; its noise is independent of every other's.
    first_token: position of the piece's first token in the step's global batch.

    step and first_token are ints or int64 tensors of no dimension on the device of the tokens: tensors where they
    change under torch.compile (an int may compile again) or in a CUDA graph (an int is frozen into it).
    """

    alpha: float
    lengths: torch.Tensor
    seed: int
    step: int | torch.Tensor
    first_token: int | torch.Tensor = 0


def document_lengths(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """int [T]: the length of the document of each of `tokens` tokens; 0 behind the last one.

    cu_seqlens [N + 1] as for attention: starts with 0, may repeat its entries (empty documents, padding).
    """
    lengths = torch.cat([cu_seqlens.diff(), cu_seqlens.new_zeros(1)])
    index = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return lengths[torch.searchsorted(cu_seqlens, index, right=True) - 1]


def embedding(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    *,
    noise: NeftuneNoise | None = None,
    main_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight[tokens], with NEFTune's noise if given: [T, H] in weight.dtype, rounded once.

    Args:
        tokens: int32 or int64 [T], 0 <= token < V. A token outside is a ValueError on the CPU and not checked on a GPU,
            where that would be a synchronisation.
        weight: [V, H]; H a multiple of 4 where there is noise.
        noise: changes nothing in the backward.
        main_grad: fp32 [V, H], contiguous. If given, the backward adds the gradient of the weight to it, in fp32, and
            weight itself gets none: neither a dense matrix of zeros nor a rounding per micro-batch.

    The gradient of the weight is summed in fp32 in the order of the tokens, without atomics: the same bits every time.
    """
    check_tensor("embedding: weight", weight, (None, None), dtype=float_dtypes(weight))
    check_tensor("embedding: tokens", tokens, (None,), dtype=(torch.int32, torch.int64), like=weight)
    if main_grad is not None:
        check_tensor("embedding: main_grad", main_grad, tuple(weight.shape), dtype=torch.float32, like=weight)
        if not main_grad.is_contiguous() or main_grad.requires_grad:
            raise ValueError("embedding: main_grad must be contiguous and require no gradient")
    if noise is None:
        return _Embedding.apply(tokens, weight, main_grad, None, None, None, 0.0, 0)
    check_tensor(
        "embedding: noise.lengths", noise.lengths, (len(tokens),), dtype=(torch.int32, torch.int64), like=weight
    )
    if weight.shape[1] % 4:
        raise ValueError(f"embedding: weight has {weight.shape[1]} columns; noise needs a multiple of 4")
    if not 0 <= noise.seed < 2**63:
        raise ValueError(f"embedding: noise.seed is {noise.seed}; allowed: 0 to 2^63 - 1")
    step, first_token = (_scalar(name, getattr(noise, name), weight) for name in ("step", "first_token"))
    return _Embedding.apply(tokens, weight, main_grad, noise.lengths, step, first_token, noise.alpha, noise.seed)


def _scalar(name: str, value: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=torch.int64, device=like.device)  # a fill, no copy from the host
    check_tensor(f"embedding: noise.{name}", value, (), dtype=torch.int64, like=like)
    return value
