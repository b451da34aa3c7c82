import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import sliding_window_causal_mask_function

from steep.kernels import attention
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, gradients, kernel_module


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(lengths_q, lengths_k, window):
    """Whole score matrices and transformers' own mask functions, document by document, in the dtype of q."""
    visible = sliding_window_causal_mask_function(window or 10**9)

    def run(q, k, v):
        outputs = [q[:0]]
        for (q0, q1), (k0, k1) in zip(spans(lengths_q), spans(lengths_k)):
            query, key = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None], torch.arange(k1 - k0)[None]
            groups = q.shape[1] // k.shape[1]
            q_HLD, k_HLD, v_HLD = (
                x.transpose(0, 1) for x in (q[q0:q1], *(x[k0:k1].repeat_interleave(groups, 1) for x in (k, v)))
            )
            scores = (q_HLD @ k_HLD.transpose(1, 2)) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~visible(0, 0, query, key), float("-inf"))
            outputs.append((torch.softmax(scores, -1) @ v_HLD).transpose(0, 1))
        return torch.cat(outputs)

    return run


def spans(lengths):
    ends = bounds(lengths).tolist()
    return zip(ends, ends[1:])


def ours(lengths_q, lengths_k, window):
    def run(q, k, v):
        return attention(
            q, k, v, bounds(lengths_q), max(lengths_q),
            cu_seqlens_k=bounds(lengths_k), max_seqlen_k=max(lengths_k), window=window,
        )  # fmt: skip

    return run


def inputs(lengths_q, lengths_k, heads=(4, 2), dim=16):
    rows_q, rows_k = sum(lengths_q), sum(lengths_k)
    return [torch.randn(n, h, dim) for n, h in ((rows_q, heads[0]), (rows_k, heads[1]), (rows_k, heads[1]))]


LENGTHS = [5, 1, 37, 0, 0]  # the cumulative lengths are padded by repeating the last one
CACHED = [9, 1, 40, 0, 0]


@pytest.mark.parametrize("lengths_k", [LENGTHS, CACHED], ids=["training", "cached"])
@pytest.mark.parametrize("window", [None, 7, 37])
def test_matches_float64(path, dtype, lengths_k, window):
    formula = plain(LENGTHS, lengths_k, window)
    check(ours(LENGTHS, lengths_k, window), formula, formula, inputs(LENGTHS, lengths_k), dtype)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 1)])
@pytest.mark.parametrize("dim", [8, 24])
def test_heads_and_head_dimensions(path, heads, dim):
    if path == "interpreter" and heads != (3, 1):
        pytest.skip("grouping is covered once; the interpreter is slow")
    formula = plain([20, 3], [20, 3], None)
    check(ours([20, 3], [20, 3], None), formula, formula, inputs([20, 3], [20, 3], heads, dim), torch.float32)


@pytest.mark.parametrize("window", [1, 2, 11, 12, 13])
def test_window_counts_as_in_transformers(path, window):
    if path == "interpreter" and window in (2, 13):
        pytest.skip("one value on each side of the document's length is enough in the interpreter")
    close(ours([12, 3], [12, 3], window), plain([12, 3], [12, 3], window), inputs([12, 3], [12, 3]))


def test_window_of_one_returns_the_values(path):
    q, k, v = inputs([6], [6], (2, 2))
    assert torch.allclose(ours([6], [6], 1)(q, k, v), v, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 50),
)
def test_any_documents(documents, window):
    lengths_q, lengths_k = [n for n, _ in documents], [n + cached for n, cached in documents]
    data = inputs(lengths_q, lengths_k)
    close(ours(lengths_q, lengths_k, window), plain(lengths_q, lengths_k, window), data)


def close(function, formula, data):
    """dq and dk vanish where a query sees one key only, so errors are measured against the largest tensor."""
    got, want = gradients(function, data, torch.float32), gradients(formula, data, torch.float64)
    assert max((g - w).norm() for g, w in zip(got, want)) < FP32_BOUND * max(w.norm() for w in want)


def test_decoding_steps_of_many_sequences_equal_one_pass():
    lengths = [17, 40, 3, 25]
    q, k, v = inputs(lengths, lengths)
    whole = ours(lengths, lengths, None)(q, k, v)
    last = bounds(lengths)[1:] - 1
    step = ours([1] * 4, lengths, None)(q[last], k, v)
    assert (step - whole[last]).abs().max() < 1e-6


def test_documents_do_not_see_each_other(path):
    q, k, v = inputs([6, 9], [6, 9])
    packed = ours([6, 9], [6, 9], None)(q, k, v)
    alone = ours([9], [9], None)(q[6:], k[6:], v[6:])
    assert torch.equal(packed[6:], alone)


def test_views_of_a_fused_projection_expanded_gradient_and_retained_graph(path):
    qkv = torch.randn(11, 8 * 16, requires_grad=True)

    def split(function):
        return lambda x: function(*(h.view(-1, n, 16) for h, n in zip(x.split([64, 32, 32], 1), (4, 2, 2))))

    o = split(ours([11], [11], None))(qkv)
    ones = torch.ones(()).expand(o.shape)
    (first,) = torch.autograd.grad(o, qkv, ones, retain_graph=True)
    (second,) = torch.autograd.grad(o, qkv, ones)
    assert torch.equal(first, second)
    _, want = gradients(lambda x: split(plain([11], [11], None))(x).sum(), [qkv], torch.float64)
    assert max(errors([first], [want])) < FP32_BOUND


def test_two_runs_are_equal(path, dtype):
    data = inputs([20, 7], [20, 7])
    first, second = (gradients(ours([20, 7], [20, 7], 9), data, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_tokens_at_all():
    data = inputs([0], [0])
    assert [g.shape[0] for g in gradients(ours([0], [0], None), data, torch.float32)] == [0] * 4


def test_the_real_tiles_agree_with_the_small_ones(monkeypatch):
    """The interpreter with the tile sizes of the GPU, on a document of several tiles."""
    module = kernel_module("attention_triton")
    lengths = [150, 5]
    q, k, v = inputs(lengths, lengths, (2, 1), 8)
    do, cu = torch.randn(q.shape), bounds(lengths)
    monkeypatch.setattr(
        module,
        "tile_sizes",
        lambda which, *_: {"BLOCK_M": 128 if which == "forward" else 64, "BLOCK_N": 128 if which == "dkv" else 64},
    )
    o, lse = module.attention_triton(q, k, v, cu, cu, 70, 0.3)
    got = [o, *module.attention_backward_triton(do, q, k, v, o, lse, cu, cu, 70, 0.3)]
    reference = kernel_module("attention").attention_reference
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = reference(*leaves, cu, cu, 70, 0.3)
    assert max(errors(got, [want, *torch.autograd.grad(want, leaves, do.double())])) < FP32_BOUND


def test_wrong_inputs_are_named():
    q, k, v = inputs([4], [4])
    with pytest.raises(ValueError, match="do not agree"):
        attention(q, k[:, :, :8], v, bounds([4]), 4)
    with pytest.raises(ValueError, match="window is 0"):
        attention(q, k, v, bounds([4]), 4, window=0)
    with pytest.raises(ValueError, match="4 queries but only 3 keys"):
        attention(q, k, v, bounds([4]), 4, cu_seqlens_k=bounds([3]), max_seqlen_k=3)
