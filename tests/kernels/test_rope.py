import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from steep.kernels import rope
from tests.kernels.kernel_checks import check, gradients, kernel_module
from tests.kernels.offset_checks import narrow_products


def tables(positions, half):
    angles = torch.outer(torch.arange(positions).float(), 10000.0 ** (-torch.arange(half) / half))
    return angles.cos(), angles.sin()


def eager(cos, sin, positions):
    """transformers' own rotation, in the dtype of q: [T, heads, D] in and out."""

    def rotate(q, k):
        cos_TD, sin_TD = (torch.cat([t[positions.long()]] * 2, -1).to(q.dtype)[None] for t in (cos, sin))
        q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos_TD, sin_TD)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return rotate


@pytest.mark.parametrize(
    ("tokens", "heads_q", "heads_k", "head_dim"), [(11, 5, 3, 12), (1, 1, 1, 2), (0, 2, 1, 8), (300, 3, 1, 8)]
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_matches_float64_of_transformers(path, dtype, tokens, heads_q, heads_k, head_dim, index):
    if path == "interpreter":
        tokens = min(tokens, 20)
    cos, sin = tables(50, head_dim // 2)
    positions = torch.randint(0, 50, (tokens,)).to(index)
    inputs = torch.randn(tokens, heads_q, head_dim), torch.randn(tokens, heads_k, head_dim)
    reference = eager(cos, sin, positions)
    check(lambda q, k: rope(q, k, cos, sin, positions), reference, reference, inputs, dtype)


def test_views_of_a_fused_projection(path):
    cos, sin = tables(20, 8)
    positions = torch.arange(9)
    qkv = torch.randn(9, 8 * 16)

    def split(function):
        def run(x):
            heads = x.view(9, 8, 16)
            return function(heads[:, :5], heads[:, 5:7])

        return run

    reference = split(eager(cos, sin, positions))
    check(split(lambda q, k: rope(q, k, cos, sin, positions)), reference, reference, [qkv], torch.float32)


def test_positions_restart_per_document(path):
    cos, sin = tables(20, 4)
    q, k = torch.randn(9, 2, 8), torch.randn(9, 1, 8)
    packed = rope(q, k, cos, sin, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]))
    alone = rope(q[4:], k[4:], cos, sin, torch.arange(5))
    assert torch.equal(packed[0][4:], alone[0])
    assert torch.equal(packed[1][4:], alone[1])


def test_only_one_result_used_and_two_runs_equal(path):
    cos, sin = tables(20, 4)
    positions = torch.arange(9)
    q, k = torch.randn(9, 2, 8), torch.randn(9, 1, 8)

    def only_q(q, k):
        return rope(q, k, cos, sin, positions)[0]

    runs = [gradients(only_q, (q, k), torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert runs[0][2].abs().max() == 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 12])
def test_exact_hf_is_transformers_to_the_bit(path, precision, head_dim):
    cos, sin = tables(50, head_dim // 2)
    positions = torch.randint(0, 50, (10,))
    inputs = torch.randn(10, 3, head_dim), torch.randn(10, 2, head_dim)
    got = gradients(lambda q, k: rope(q, k, cos, sin, positions, exact_hf=True), inputs, precision)
    want = gradients(eager(cos, sin, positions), inputs, precision)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    rounded_once = gradients(lambda q, k: rope(q, k, cos, sin, positions), inputs, precision)
    assert not torch.equal(rounded_once[0], want[0])


def test_expanded_gradients_and_strided_heads(path):
    cos, sin = tables(20, 4)
    positions = torch.arange(9)
    q = torch.randn(2, 9, 8).transpose(0, 1).requires_grad_()  # heads first in memory
    k = torch.randn(9, 1, 16)[..., ::2].requires_grad_()  # not even the columns are contiguous
    reference = torch.autograd.grad([x.sum() for x in eager(cos, sin, positions)(q, k)], (q, k))
    got = torch.autograd.grad([x.sum() for x in rope(q, k, cos, sin, positions)], (q, k))
    for a, b in zip(got, reference):
        assert torch.allclose(a, b, atol=1e-6)


def test_no_offset_wraps_around():
    q, k = (torch.empty_strided((9, 2, 8), strides, device="meta") for strides in ((16, 1 << 33, 1), (1 << 33, 8, 1)))
    table, positions = torch.empty(20, 4, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
    function = kernel_module("rope")._rope_triton
    assert narrow_products("rope", function, q, k, table, table, positions, False, False) == []


def test_wrong_arguments_are_named():
    cos, sin = tables(4, 4)
    q, positions = torch.ones(3, 2, 8), torch.arange(3)
    for arguments, message in (
        ((q, q[:2], cos, sin, positions), r"rope: k has shape \(2, 2, 8\)"),
        ((q, q.double(), cos, sin, positions), "rope: k is torch.float64"),
        ((q[0], q, cos, sin, positions), "rope: q has shape"),
        ((q, q, cos[:, :2], sin[:, :2], positions), "rope: cos has shape"),
        ((q, q, cos, sin[:2], positions), "rope: sin has shape"),
        ((q, q, cos.bfloat16(), sin, positions), "rope: cos is torch.bfloat16"),
        ((q, q, cos, sin, positions[:2]), "rope: positions has shape"),
        ((q, q, cos, sin, positions.float()), "rope: positions is torch.float32"),
        ((q, q, cos, sin, positions.to("meta")), "rope: positions is on meta"),
        ((q[..., :7], q[..., :7], cos, sin, positions), "head dimension 7"),
    ):
        with pytest.raises(ValueError, match=message):
            rope(*arguments)
