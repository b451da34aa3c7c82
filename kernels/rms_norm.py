"""RMSNorm and RMSNorm of a residual sum, forward and backward.

    rstd = (mean(x^2) + eps)^-1/2          y = x * rstd * w
    m = dy * w      dx = rstd * (m - x * rstd^2 * mean(m * x))      dw = sum_rows(dy * x * rstd)

Floor (bf16, n = rows * H elements): forward reads x and writes y, 4n bytes (with the residual sum 8n: x, r in, s, y
out); backward reads dy and x and writes dx, 6n bytes (with the residual sum 8n: ds in as well; 2n more where it writes
y again). Saved: x (or s), rstd per row. Source: Zhang & Sennrich 2019, arXiv:1910.07467; arithmetic in fp32 as in
transformers' LlamaRMSNorm, rounded once, or where LlamaRMSNorm rounds. May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, persistent_programs, round_to, tl, unit_rows

# --- torch reference -------------------------------------------------------------------------------------------------


def _rms_norm_cpu(
    x: torch.Tensor, weight: torch.Tensor, eps: float, exact_hf: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    acc = compute_dtype(x.dtype)
    if exact_hf:  # transformers' own sum, to the last bit
        mean = x.to(acc).pow(2).mean(-1, keepdim=True)
    else:
        # vector_norm reads x once, without a temporary; blocks of rows that fit the cache were measured slower.
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc).square_().div_(x.shape[-1])
    rstd = mean.add_(eps).rsqrt_()
    return _scale_cpu(x, weight, rstd, exact_hf), rstd.squeeze(-1)


def _scale_cpu(x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    x_hat = torch.mul(x, rstd)
    if exact_hf:
        x_hat = x_hat.to(x.dtype).to(rstd.dtype)
    return x_hat.mul_(weight).to(x.dtype)


def _add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, exact_hf: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = x + residual
    y, rstd = _rms_norm_cpu(s, weight, eps, exact_hf)
    return y, s, rstd


def _rms_norm_backward_cpu(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    exact_hf: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = x.shape[-1]
    acc = compute_dtype(x.dtype)
    dy_TH, x_TH, w = dy.reshape(-1, hidden).to(acc), x.reshape(-1, hidden).to(acc), weight.to(acc)
    rstd = rstd.reshape(-1)
    if exact_hf:
        m_TH = (dy_TH * w).to(x.dtype).to(acc)
        dw = (x_TH * rstd.unsqueeze(-1)).to(x.dtype).to(acc).mul_(dy_TH).sum(0)
        c = (m_TH * x_TH).sum(1, keepdim=True)
    else:
        # Both reductions are matrix-vector products of the one temporary dy * x.
        t_TH = dy_TH * x_TH
        dw = torch.mv(t_TH.T, rstd)
        c = torch.mv(t_TH, w).unsqueeze_(-1)
        m_TH = torch.mul(dy_TH, w, out=t_TH)
    rstd = rstd.unsqueeze(-1)
    dx = m_TH.mul_(rstd).addcmul_(x_TH, c.mul_(rstd.pow(3)).div_(hidden), value=-1)
    if ds is not None:
        dx = (dx.to(x.dtype) if exact_hf else dx).add_(ds.reshape(-1, hidden))
    return dx.to(x.dtype).view(x.shape), dw.to(weight.dtype)


def _rms_norm_backward_recompute_cpu(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    exact_hf: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = _rms_norm_backward_cpu(dy, ds, x, weight, rstd, exact_hf)
    dy.copy_(_scale_cpu(x, weight, rstd.unsqueeze(-1), exact_hf))
    return gradients


# --- Triton ----------------------------------------------------------------------------------------------------------
# A tile is BLOCK_ROWS rows by CHUNKS pieces of BLOCK columns. Pieces, since a power of two that holds 5120 columns
# leaves 37 % of its lanes idle and takes the registers for them; 3 x 2048 leaves 17 %.


@kernel
def _forward_kernel(
    X, R, W, Y, S, RSTD, rows, x_stride, r_stride, eps,
    hidden: tl.constexpr, RESIDUAL: tl.constexpr, EXACT_HF: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of rows, kept in registers between the sum and the scaling: x is read once."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    in_rows = (row < rows) | (BLOCK_ROWS == 1)
    row = row.to(tl.int64)
    x: tl.tuple = ()
    r: tl.tuple = ()
    w: tl.tuple = ()
    for c in tl.static_range(CHUNKS):  # all loads before the first store: they are in flight together
        mask = in_rows & (c * BLOCK + col < hidden)
        x += (tl.load(X + row * x_stride + c * BLOCK + col, mask, 0.0).to(tl.float32),)
        if RESIDUAL:
            r += (tl.load(R + row * r_stride + c * BLOCK + col, mask, 0.0).to(tl.float32),)
        w += (tl.load(W + c * BLOCK + col, c * BLOCK + col < hidden, 0.0).to(tl.float32),)
    if RESIDUAL:
        # The sum is rounded before it is normalised: s is what the next layer adds to and what backward sees.
        sums: tl.tuple = ()
        for c in tl.static_range(CHUNKS):
            s = cast(x[c] + r[c], S.dtype.element_ty, INTERPRET)
            tl.store(S + row * hidden + c * BLOCK + col, s, in_rows & (c * BLOCK + col < hidden))
            sums += (s.to(tl.float32),)
        x = sums
    square = x[0] * x[0]
    for c in tl.static_range(1, CHUNKS):
        square += x[c] * x[c]
    rstd = tl.rsqrt(tl.sum(square, 1, keep_dims=True) / hidden + eps)
    tl.store(RSTD + row, rstd, in_rows)
    for c in tl.static_range(CHUNKS):
        x_hat = x[c] * rstd
        if EXACT_HF:
            x_hat = round_to(x_hat, Y.dtype.element_ty, INTERPRET)
        y = cast(x_hat * w[c], Y.dtype.element_ty, INTERPRET)
        tl.store(Y + row * hidden + c * BLOCK + col, y, in_rows & (c * BLOCK + col < hidden))


@kernel
def _backward_kernel(
    DY, DS, X, W, RSTD, DX, DW, rows, dy_stride, ds_stride, x_stride, programs,
    hidden: tl.constexpr, RESIDUAL: tl.constexpr, RECOMPUTE: tl.constexpr, EXACT_HF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A persistent program walks over tiles, copying the next STAGES - 1 to shared memory meanwhile, and keeps its part
    of dw in registers. RECOMPUTE: y takes the place of dy, from the same products as in the forward."""
    dtype: tl.constexpr = DX.dtype.element_ty
    col = tl.arange(0, BLOCK)[None, :]
    w: tl.tuple = ()
    dw: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        w += (tl.load(W + c * BLOCK + col, c * BLOCK + col < hidden, 0.0).to(tl.float32),)
        dw += (tl.zeros((BLOCK_ROWS, BLOCK), tl.float32),)
    for start in tl.range(tl.program_id(0) * BLOCK_ROWS, rows, programs * BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        in_rows = (row < rows) | (BLOCK_ROWS == 1)
        row = row.to(tl.int64)
        rstd = tl.load(RSTD + row, in_rows, 0.0)
        x_hat: tl.tuple = ()
        m: tl.tuple = ()
        dw_next: tl.tuple = ()
        product = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
        for c in tl.static_range(CHUNKS):
            mask = in_rows & (c * BLOCK + col < hidden)
            x = tl.load(X + row * x_stride + c * BLOCK + col, mask, 0.0).to(tl.float32)
            dy = tl.load(DY + row * dy_stride + c * BLOCK + col, mask, 0.0).to(tl.float32)
            x_hat += (x * rstd,)
            x_hat_hf, m_c = x_hat[c], dy * w[c]
            if EXACT_HF:
                x_hat_hf, m_c = round_to(x_hat_hf, dtype, INTERPRET), round_to(m_c, dtype, INTERPRET)
            m += (m_c,)
            dw_next += (dw[c] + dy * x_hat_hf,)
            product += m[c] * x_hat[c]
            if RECOMPUTE:
                y = cast(x_hat_hf * w[c], DY.dtype.element_ty, INTERPRET)
                tl.store(DY + row * dy_stride + c * BLOCK + col, y, mask)
        dw = dw_next
        mean = tl.sum(product, 1, keep_dims=True) / hidden
        for c in tl.static_range(CHUNKS):
            mask = in_rows & (c * BLOCK + col < hidden)
            dx = rstd * (m[c] - x_hat[c] * mean)
            if RESIDUAL:
                if EXACT_HF:
                    dx = round_to(dx, dtype, INTERPRET)
                dx += tl.load(DS + row * ds_stride + c * BLOCK + col, mask, 0.0).to(tl.float32)
            tl.store(DX + row * hidden + c * BLOCK + col, cast(dx, dtype, INTERPRET), mask)
    for c in tl.static_range(CHUNKS):
        out = DW + tl.program_id(0) * hidden + c * BLOCK + col
        tl.store(out, tl.sum(dw[c], 0, keep_dims=True), c * BLOCK + col < hidden)


@kernel
def _sum_rows_kernel(
    X, OUT, rows, hidden, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """Column sums of a matrix of few rows, in one pass with every load in flight."""
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(X + row * hidden + col, (row < rows) & (col < hidden), 0.0)
    tl.store(OUT + col, cast(tl.sum(x, 0, keep_dims=True), OUT.dtype.element_ty, INTERPRET), col < hidden)


def _tile(hidden: int) -> dict[str, int]:
    """16 elements per thread, up to 24 between 4096 and 6144 columns, where the next power of two would be 32."""
    block = min(next_power_of_2(hidden), 2048 if hidden <= 6144 else 4096)
    chunks = cdiv(hidden, block)
    block_rows = max(1, 4096 // (block * chunks))
    num_warps = min(max(block * block_rows // (512 if chunks == 1 else 256), 1), 16)
    return {"BLOCK": block, "CHUNKS": chunks, "BLOCK_ROWS": block_rows, "num_warps": num_warps}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] as [rows, H] with unit stride along H; a copy only where no view has that form."""
    x = x.reshape(-1, x.shape[-1])
    return unit_rows(x)


def _launch_forward(x_RH, r_RH, weight, y, s, rstd, eps: float, **constexprs) -> None:
    rows, hidden = x_RH.shape
    tile = _tile(hidden)
    grid = (cdiv(rows, tile["BLOCK_ROWS"]),)
    launch(
        _forward_kernel, grid, x_RH, r_RH, weight, y, s, rstd, rows, x_RH.stride(0), r_RH.stride(0), eps,
        hidden=hidden, **tile, **constexprs,
    )  # fmt: skip


def _rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, exact_hf: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    x_RH, y = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch_forward(x_RH, x_RH, weight, y, y, rstd, eps, RESIDUAL=False, EXACT_HF=exact_hf)
    return y, rstd


def _add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, exact_hf: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, s = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch_forward(_rows(x), _rows(residual), weight, y, s, rstd, eps, RESIDUAL=True, EXACT_HF=exact_hf)
    return y, s, rstd


# Shared memory of one SM for tiles that are on their way; the rest stays cache.
_PREFETCH_BYTES = 200 * 1024


def _launch_backward(dy_RH, ds, x, weight, rstd, **constexprs) -> tuple[torch.Tensor, torch.Tensor]:
    x_RH = _rows(x)
    ds_RH = dy_RH if ds is None else _rows(ds)
    rows, hidden = x_RH.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(hidden)
    elements = tile["BLOCK_ROWS"] * tile["BLOCK"] * tile["CHUNKS"]
    # Two programs per SM hide each other's reductions, as long as their registers fit; one alone has the deeper queue.
    per_sm = 2 if elements <= 6144 else 1
    tile_bytes = elements * x.element_size() * (2 if ds is None else 3)
    stages = 1 + min(3, _PREFETCH_BYTES // per_sm // tile_bytes)
    programs = max(1, min(persistent_programs(x, per_sm), cdiv(rows, tile["BLOCK_ROWS"])))
    dw_partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    strides = dy_RH.stride(0), ds_RH.stride(0), x_RH.stride(0)
    launch(
        _backward_kernel, (programs,), dy_RH, ds_RH, x_RH, weight, rstd, dx, dw_partial, rows, *strides, programs,
        hidden=hidden, RESIDUAL=ds is not None, STAGES=stages, **tile, **constexprs,
    )  # fmt: skip
    # The partial sums are added in a fixed order. torch's sum and cast would be two launches of a few microseconds
    # each, beside a kernel of a hundred.
    dw = torch.empty_like(weight)
    launch(
        _sum_rows_kernel, (cdiv(hidden, 32),), dw_partial, dw, programs, hidden,
        BLOCK_ROWS=next_power_of_2(programs), BLOCK=32, num_warps=8,
    )  # fmt: skip
    return dx, dw


def _rms_norm_backward_triton(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    exact_hf: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_backward(_rows(dy), ds, x, weight, rstd, RECOMPUTE=False, EXACT_HF=exact_hf)


def _rms_norm_backward_recompute_triton(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    exact_hf: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_backward(dy, ds, x, weight, rstd, RECOMPUTE=True, EXACT_HF=exact_hf)


# --- operators -------------------------------------------------------------------------------------------------------


def _rstd_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))


_rms_norm_op = define_op(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, bool exact_hf) -> (Tensor, Tensor)",
    cpu=_rms_norm_cpu,
    cuda=_rms_norm_triton,
    fake=lambda x, weight, eps, exact_hf: (x.new_empty(x.shape), _rstd_like(x)),
)
_add_rms_norm_op = define_op(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps, bool exact_hf) -> (Tensor, Tensor, Tensor)",
    cpu=_add_rms_norm_cpu,
    cuda=_add_rms_norm_triton,
    fake=lambda x, residual, weight, eps, exact_hf: (x.new_empty(x.shape), x.new_empty(x.shape), _rstd_like(x)),
)
_rms_norm_backward_op = define_op(
    "rms_norm_backward",
    "(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor rstd, bool exact_hf) -> (Tensor, Tensor)",
    cpu=_rms_norm_backward_cpu,
    cuda=_rms_norm_backward_triton,
    fake=lambda dy, ds, x, weight, rstd, exact_hf: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_rms_norm_backward_recompute_op = define_op(
    "rms_norm_backward_recompute",
    "(Tensor(a!) dy, Tensor? ds, Tensor x, Tensor weight, Tensor rstd, bool exact_hf) -> (Tensor, Tensor)",
    cpu=_rms_norm_backward_recompute_cpu,
    cuda=_rms_norm_backward_recompute_triton,
    fake=lambda dy, ds, x, weight, rstd, exact_hf: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def norm_forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, exact_hf: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, rstd) without autograd; s is x itself where there is no residual."""
    if residual is None:
        y, rstd = _rms_norm_op(x, weight, eps, exact_hf)
        return y, x, rstd
    return _add_rms_norm_op(x, residual, weight, eps, exact_hf)


def norm_backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    exact_hf: bool,
    *,
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of s and of weight. recompute: contiguous `dy` [rows, H] is overwritten by y, bit for bit as it was."""
    operator = _rms_norm_backward_recompute_op if recompute else _rms_norm_backward_op
    return operator(dy, ds, s, weight, rstd, exact_hf)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, exact_hf: bool) -> torch.Tensor:
        y, rstd = _rms_norm_op(x, weight, eps, exact_hf)
        ctx.save_for_backward(x, weight, rstd)
        ctx.exact_hf = exact_hf
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        x, weight, rstd = ctx.saved_tensors
        dx, dw = _rms_norm_backward_op(dy, None, x, weight, rstd, ctx.exact_hf)
        return dx, dw, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, exact_hf: bool):
        y, s, rstd = norm_forward(x, residual, weight, eps, exact_hf)
        ctx.save_for_backward(s, weight, rstd)
        ctx.has_residual, ctx.exact_hf = residual is not None, exact_hf
        ctx.set_materialize_grads(False)  # the sum of the last layer is not used: no zeros to read
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor | None, ds: torch.Tensor | None):
        if dy is None:
            return ds, ds if ctx.has_residual else None, None, None, None
        s, weight, rstd = ctx.saved_tensors
        dx, dw = _rms_norm_backward_op(dy, ds, s, weight, rstd, ctx.exact_hf)
        return dx, dx if ctx.has_residual else None, dw, None, None


# --- public ----------------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, exact_hf: bool = False) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Arithmetic in fp32 (fp64 for fp64); the result and the gradient of x have x's dtype, that of weight has weight's.

    Args:
        x: [..., H] in bf16, fp16 or fp32; on a CPU in fp64 too.
        weight: [H], in x's dtype or in fp32.
        eps: added to the mean square.
        exact_hf: round where transformers' LlamaRMSNorm does instead of once: x / sqrt(...) before it is multiplied by
            weight; in backward dy * weight, and the gradient of x before that of the residual sum is added.

    Raises:
        ValueError: an argument of another dtype, shape or device.
    """
    check_norm("rms_norm", x, weight)
    return _RMSNorm.apply(x, weight, eps, exact_hf)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, exact_hf: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) with s = x + residual, rounded to x's dtype, and y = rms_norm(s, weight, eps): the pre-norm residual step.

    x and residual [..., H] of one shape and dtype, all else as in `rms_norm`. Both results are differentiable; x and
    residual receive the same gradient. Without a residual s is x; what flows back through s is still added to the
    gradient of the norm before that is rounded.
    """
    check_norm("add_rms_norm", x, weight, residual)
    return _AddRMSNorm.apply(x, residual, weight, eps, exact_hf)


def check_norm(
    function: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    weight_name: str = "weight",
) -> None:
    """ValueError unless these are what the norm in `function` takes."""
    check_tensor(f"{function}: x", x, dtype=float_dtypes(x))
    if x.ndim == 0:
        raise ValueError(f"{function}: x is a scalar; expected [..., H]")
    check_tensor(f"{function}: {weight_name}", weight, x.shape[-1:], dtype=(x.dtype, compute_dtype(x.dtype)), like=x)
    if residual is not None:
        check_tensor(f"{function}: residual", residual, tuple(x.shape), like=x)
