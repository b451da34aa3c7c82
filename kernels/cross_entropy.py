"""Cross-entropy of rows of logits, which it turns into their own gradient in place: the pointwise half of
linear_cross_entropy. With y the label, s the scale of a row, e label smoothing and c the weight of the z-loss:

    lse = log(sum_j exp(z_j))     nll = lse - z_y
    loss = s * ((1 - e) * nll + e * (lse - mean_j(z_j)) + c * lse^2)
    dz_j = s * ((1 + 2 * c * lse) * softmax(z)_j - e / V - (1 - e) * [j = y])

Floor: each logit read and written once, 4 bytes in bf16. The row is read a second time, out of the L2: `_num_warps`
keeps the rows in flight on 132 SMs below its 50 MB. Arithmetic in fp32; each gradient, the label's too, is rounded
once. Sources: Szegedy et al. 2016, arXiv:1512.00567 (smoothing, as torch's F.cross_entropy); Chowdhery et al. 2022,
arXiv:2204.02311 (z-loss); Milakov & Gimelshein 2018, arXiv:1805.02867 (maximum and sum in one read).
May touch: torch, triton.
"""

from __future__ import annotations

import torch

from ._op import compute_dtype
from ._triton import cast, kernel, launch, next_power_of_2, tl

# --- torch reference -------------------------------------------------------------------------------------------------

_BLOCK_ROWS = 16  # stay in the cache between the passes


def cross_entropy_cpu(
    logits: torch.Tensor, dz: torch.Tensor | None, labels: torch.Tensor, scale: torch.Tensor,
    nll: torch.Tensor, loss: torch.Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """As `cross_entropy_triton`, but no label may be `ignore_index`: the caller leaves such rows out."""
    acc = compute_dtype(logits.dtype)
    columns = [t.unsqueeze(1) for t in (labels, scale.expand(len(labels)), nll, loss)]
    for z_out, label, scale_1, nll_out, loss_out, dz_out in zip(
        *(t.split(_BLOCK_ROWS) for t in (logits, *columns, logits if dz is None else dz))
    ):
        z = z_out.to(acc)
        target, top = z.gather(1, label), z.amax(1, keepdim=True)
        mean = z.mean(1, keepdim=True) if label_smoothing else target
        # The fused softmax is half the price of log_softmax and exp; the largest probability, which is
        # 1 / sum(exp(z - top)), gives the log of the sum without the underflow that the label's own could have.
        p = torch.softmax(z, 1, out=z)
        torch.sub(top - target, p.amax(1, keepdim=True).log_(), out=nll_out)
        lse = nll_out + target
        loss_1 = torch.lerp(nll_out, lse - mean, label_smoothing)
        torch.mul(loss_1.addcmul_(lse, lse, value=z_loss), scale_1, out=loss_out)
        if dz is None:
            continue
        if z_loss:
            p.mul_(1 + 2 * z_loss * lse)
        p.scatter_add_(1, label, p.new_full((1, 1), label_smoothing - 1).expand(len(label), 1))
        if label_smoothing:
            p.sub_(label_smoothing / p.shape[1])
        p.mul_(scale_1)
        if z is not z_out or dz.dtype != logits.dtype:
            dz_out.copy_(p.to(dz.dtype))  # converted aside first: dz may lie in p's memory


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def _load(logits, col, vocab, width, RAGGED: tl.constexpr, EVICT: tl.constexpr):
    """Logits in fp32, -inf outside the vocabulary; whole vectors of them, whatever V is."""
    z = tl.load(logits + col, col < width, float("-inf"), eviction_policy=EVICT).to(tl.float32)
    if RAGGED:
        z = tl.where(col < vocab, z, float("-inf"))
    return z


@kernel
def _cross_entropy_kernel(
    LOGITS, DZ, LABELS, SCALE, NLL, LOSS, vocab, width, stride, dz_stride, scale_stride, ignore_index,
    label_smoothing, z_loss,
    GRAD: tl.constexpr, SMOOTH: tl.constexpr, RAGGED: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row. Every thread keeps the maximum and the sum of its own columns, so that no warp waits for another until
    the row has been read; then (GRAD) the row is read again and overwritten by dz."""
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    TILE: tl.constexpr = UNROLL * LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    dz = DZ + row * dz_stride
    label = tl.load(LABELS + row)
    unroll, lane, vec = tl.arange(0, UNROLL), tl.arange(0, LANES), tl.arange(0, VEC)
    tile = (unroll[:, None, None] * LANES + lane[None, :, None]) * VEC + vec[None, None, :]
    if label != ignore_index:
        # A label outside the vocabulary makes loss and gradients NaN.
        known = (label >= 0) & (label < vocab)
        target = tl.load(logits + label, known, float("nan")).to(tl.float32)

        # exp(z - top) as exp2(fma(z, LOG2E, -shift)) with shift = top * LOG2E, rounded, wherever it stands.
        top = tl.full((LANES,), -2e38, tl.float32)
        shift = top * LOG2E
        total = tl.zeros((LANES,), tl.float32)
        z_sum = tl.zeros((LANES,), tl.float32)
        for start in range(0, width, TILE):
            col = start + tile
            z = _load(logits, col, vocab, width, RAGGED, "")
            top = tl.maximum(top, tl.max(tl.max(z, 2), 0))
            new_shift = top * LOG2E
            e = tl.exp2(tl.fma(z, LOG2E, -new_shift[None, :, None]))
            total = total * tl.exp2(shift - new_shift) + tl.sum(tl.sum(e, 2), 0)
            shift = new_shift
            if SMOOTH:
                z_sum += tl.sum(tl.sum(tl.where(col < vocab, z, 0.0), 2), 0)
        peak = tl.max(top, 0)
        row_shift = peak * LOG2E
        sum_exp = tl.sum(total * tl.exp2(shift - row_shift), 0)
        # The difference, exact here, is the rounding of row_shift: without it the lse would be off by half its ulp.
        log_sum = (tl.log2(sum_exp) - tl.fma(peak, LOG2E, -row_shift)) * LN2
        lse = peak + log_sum
        nll = (peak - target) + log_sum

        scale = tl.load(SCALE + row * scale_stride).to(tl.float32)
        z_weight = tl.full((), z_loss, tl.float32)
        loss = nll + z_weight * lse * lse
        confidence = 1.0
        uniform = 0.0
        if SMOOTH:
            smoothing = tl.full((), label_smoothing, tl.float32)
            confidence = 1.0 - smoothing
            uniform = smoothing / vocab
            loss += smoothing * (target - tl.sum(z_sum, 0) / vocab)
        tl.store(NLL + row, nll)
        tl.store(LOSS + row, scale * loss)

        if GRAD:
            slope = 1.0 + 2.0 * z_weight * lse
            factor = tl.where(known, scale * slope / sum_exp, float("nan"))
            offset = scale * uniform
            # Every thread must have read the label's logit before another one overwrites it.
            tl.debug_barrier()
            for start in range(0, width, TILE):
                col = start + tile
                z = _load(logits, col, vocab, width, RAGGED, "evict_first")
                if DZ.dtype != LOGITS.dtype:
                    # dz lies in the first half of the row: all of this tile is read before any of it is overwritten.
                    tl.debug_barrier()
                grad = tl.fma(tl.exp2(tl.fma(z, LOG2E, -row_shift)), factor, -offset)
                grad = cast(grad, DZ.dtype.element_ty, INTERPRET)
                tl.store(dz + col, grad, col < width, eviction_policy="evict_first")
            tl.debug_barrier()
            p = tl.exp2(tl.fma(target, LOG2E, -row_shift)) / sum_exp
            grad = scale * (slope * p - uniform - confidence)
            tl.store(dz + label, cast(grad, DZ.dtype.element_ty, INTERPRET), known)
    else:
        tl.store(NLL + row, 0.0)
        tl.store(LOSS + row, 0.0)
        if GRAD:
            zero = tl.zeros((UNROLL, LANES, VEC), tl.float32).to(DZ.dtype.element_ty)
            for start in range(0, width, TILE):
                tl.store(dz + start + tile, zero, start + tile < width)


def _num_warps(row_bytes: int) -> int:
    """Threads of a row. With 64 registers a thread an SM holds 32 warps: at 8 KB of row a warp those are at most 256 KB
    of rows, 35 MB on 132 SMs (40 MB at V = 152064, one row an SM), and they have 64 KB of loads in flight."""
    return min(max(next_power_of_2(row_bytes // 8192), 1), 32)


def cross_entropy_triton(
    logits: torch.Tensor, dz: torch.Tensor | None, labels: torch.Tensor, scale: torch.Tensor,
    nll: torch.Tensor, loss: torch.Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """Write nll and loss [rows] and, unless dz is None, dz [rows, V]: `logits` itself, or in a narrower dtype the first
    half of each row of `logits`. scale: [rows] or 0-dim. Whole vectors are loaded and stored, so the memory behind a
    row must reach to a multiple of 16 columns; what stands there is lost."""
    rows, vocab = logits.shape
    width = -(-vocab // 16) * 16
    num_warps = _num_warps(vocab * logits.element_size())
    out = logits if dz is None else dz
    launch(
        _cross_entropy_kernel, (rows,), logits, out, labels, scale, nll, loss, vocab, width, logits.stride(0),
        out.stride(0), scale.stride(0) if scale.ndim else 0, ignore_index, label_smoothing, z_loss,
        GRAD=dz is not None, SMOOTH=label_smoothing > 0, RAGGED=width != vocab, UNROLL=4, LANES=32 * num_warps,
        VEC=16 // logits.element_size(), num_warps=num_warps,
    )  # fmt: skip
