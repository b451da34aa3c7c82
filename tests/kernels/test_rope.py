import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from steep.kernels import rope
from tests.kernels.kernel_checks import check, gradients


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


def test_wrong_shapes_are_named():
    cos, sin = tables(4, 4)
    q = torch.ones(3, 2, 8)
    with pytest.raises(ValueError, match="do not agree"):
        rope(q, q[:2], cos, sin, torch.arange(3))
    with pytest.raises(ValueError, match="head dimension 8"):
        rope(q, q, cos[:, :2], sin[:, :2], torch.arange(3))
