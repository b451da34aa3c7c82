from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import sliding_window_causal_mask_function

from steep.kernels import attention
from tests.kernels.conftest import use_triton
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


def test_no_tokens_at_all(path):
    for lengths in ([0], [0, 0], []):
        function = ours(lengths, lengths, None) if lengths else lambda q, k, v: attention(q, k, v, bounds([]), 0)
        assert [g.shape[0] for g in gradients(function, inputs(lengths, lengths), torch.float32)] == [0] * 4


def test_keys_without_queries_have_no_gradient(path):
    _, dq, dk, dv = gradients(ours([0], [5], None), inputs([0], [5]), torch.float32)
    assert (dq.numel(), dk.count_nonzero(), dv.count_nonzero()) == (0, 0, 0)


def test_a_nan_stays_in_its_document(path, dtype):
    q, k, v = (x.to(dtype) for x in inputs([20, 9, 20], [20, 9, 20]))
    clean = ours([20, 9, 20], [20, 9, 20], 7)(q, k, v)
    for x in (q, k, v):
        x[20:29] = float("nan")
    spoilt = ours([20, 9, 20], [20, 9, 20], 7)(q, k, v)
    assert spoilt[20:29].isnan().all()
    assert torch.equal(torch.cat([clean[:20], clean[29:]]), torch.cat([spoilt[:20], spoilt[29:]]))


def test_large_scores_do_not_overflow(path):
    q = 300 * torch.eye(16)[:, None].repeat(2, 1, 1)  # a score of 22500 at the query's own token, 0 elsewhere
    v = torch.randn(32, 1, 16)
    assert torch.equal(ours([16, 16], [16, 16], None)(q, q, v), v)


def test_rows_whose_offsets_need_64_bits(path):
    q, k, v = inputs([2], [129])
    apart = torch.empty(2**31 + 32).as_strided(k.shape, (2**24, 16, 1)).copy_(k)
    assert torch.equal(ours([2], [129], 50)(q, apart, v), ours([2], [129], 50)(q, k, v))


@pytest.mark.parametrize("layout", ["heads first", "odd strides", "one head of many", "broadcast"])
def test_any_strides(path, layout):
    q, k, v = inputs([19], [19])
    want = gradients(ours([19], [19], None), (q, k, v), torch.float32)
    views = {
        "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "odd strides": lambda x: torch.cat([x, x[..., :3]], 2)[..., :16],
        "one head of many": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
        "broadcast": lambda x: x,
    }
    view = views[layout]
    got = [ours([19], [19], None)(view(q), view(k), view(v))]
    if layout == "broadcast":  # one kv head for all, as a view
        k, v = (x[:, :1].expand(-1, 2, -1) for x in (k, v))
        want = [ours([19], [19], None)(q, k.contiguous(), v.contiguous())]
        got = [ours([19], [19], None)(q, k, v)]
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("window", [None, 70, 200])
def test_the_real_tiles_agree_with_the_small_ones(monkeypatch, window):
    """The interpreter with the tile sizes of the GPU: blocks seen whole, the diagonal, the window's edge, both ends."""
    module = kernel_module("attention_triton")
    lengths_q, lengths_k = [300, 5], [340, 5]
    q, k, v = inputs(lengths_q, lengths_k, (2, 1), 8)
    do, cu_q, cu_k = torch.randn(q.shape), bounds(lengths_q), bounds(lengths_k)
    sizes = {"forward": (128, 128), "dq": (128, 128), "dkv": (64, 128)}
    monkeypatch.setattr(module, "tile_sizes", lambda which, *_: dict(zip(("BLOCK_M", "BLOCK_N"), sizes[which])))
    o, lse = module.attention_triton(q, k, v, cu_q, cu_k, window, 0.3)
    got = [o, *module.attention_backward_triton(do, q, k, v, o, lse, cu_q, cu_k, window, 0.3)]
    reference = kernel_module("attention").attention_reference
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = reference(*leaves, cu_q, cu_k, window, 0.3)
    assert max(errors(got, [want, *torch.autograd.grad(want, leaves, do.double())])) < FP32_BOUND


@pytest.mark.parametrize("window", [None, 50])
def test_only_blocks_that_are_seen_in_part_are_masked(monkeypatch, window):
    """How many blocks the loops visit, with and without a mask, against brute force over a document of ten tiles."""
    use_triton(monkeypatch)
    shared, visited = kernel_module("_triton"), Counter()
    call = shared._interpret_device_function

    def number(x):
        return int(x.handle.data.item()) if hasattr(x, "handle") else int(x)

    def record(function, *args, **kwargs):
        if "MASKED" in function.arg_names:
            given = dict(zip(function.arg_names, args))
            first, stop, count = (number(given.get(name, 0)) for name in ("first", "stop", "count"))
            visited[function.fn.__name__, bool(given["MASKED"])] += count or max(-(-(stop - first) // 16), 0)
        return call(function, *args, **kwargs)

    monkeypatch.setattr(shared, "_interpret_device_function", record)
    gradients(ours([150], [160], window), inputs([150], [160], (1, 1)), torch.float32)

    last, key = torch.arange(160)[:, None] + 10, torch.arange(160)
    seen = (key <= last) & (key > last - (window or 999))
    for names, blocks in (
        (("_attend", "_dq_steps"), seen),  # rows past the document's end are computed with the others
        (("_dkv_steps",), seen & (last < 160)),  # here they would be summed over
    ):
        blocks = blocks.unflatten(0, (10, 16)).unflatten(2, (10, 16)).transpose(1, 2).flatten(2)
        whole, seen_at_all = blocks.all(-1).sum().item(), blocks.any(-1).sum().item()
        for name in names:
            assert (visited[name, False], visited[name, True]) == (whole, seen_at_all - whole)


def test_wrong_inputs_are_named():
    q, k, v = inputs([4], [4])
    cu, long = bounds([4]), bounds([4]).long()
    cached = {"max_seqlen_k": 4}
    for message, call in {
        r"q has shape \(4, 64\)": lambda: attention(q.flatten(1), k, v, cu, 4),
        "q is torch.int64": lambda: attention(q.long(), k, v, cu, 4),
        "k is torch.bfloat16; allowed: torch.float32": lambda: attention(q, k.bfloat16(), v, cu, 4),
        r"k has shape \(4, 2, 8\); expected \(\*, \*, 16\)": lambda: attention(q, k[:, :, :8], v, cu, 4),
        "k is on meta; expected cpu": lambda: attention(q, k.to("meta"), v, cu, 4),
        r"v has shape \(3, 2, 16\)": lambda: attention(q, k, v[:3], cu, 4),
        "v is torch.float64": lambda: attention(q, k, v.double(), cu, 4),
        r"q has shape \(4, 3, 16\) and k": lambda: attention(q[:, :3], k, v, cu, 4),
        "q has 4 rows and k 3; cu_seqlens_k is needed": lambda: attention(q, k[:3], v[:3], cu, 4),
        "cu_seqlens_q is torch.int64": lambda: attention(q, k, v, long, 4),
        "cu_seqlens_q is on meta": lambda: attention(q, k, v, cu.to("meta"), 4),
        r"cu_seqlens_q has shape \(1, 2\)": lambda: attention(q, k, v, cu[None], 4),
        "cu_seqlens_q has 0 entries": lambda: attention(q, k, v, cu[:0], 4),
        "cu_seqlens_q has 2 entries at stride 2; expected N \\+ 1, contiguous": lambda: attention(
            q, k, v, bounds([2, 2])[::2], 4
        ),
        "cu_seqlens_q must ascend from 0 to 4": lambda: attention(q, k, v, bounds([3]), 4),
        "cu_seqlens_k is torch.int64": lambda: attention(q, k, v, cu, 4, cu_seqlens_k=long, **cached),
        r"cu_seqlens_k has shape \(3,\)": lambda: attention(
            q, k, v, cu, 4, cu_seqlens_k=bounds([2, 2]), max_seqlen_k=4
        ),
        "max_seqlen_q is tensor": lambda: attention(q, k, v, cu, torch.tensor(4)),
        "max_seqlen_q is 4.0": lambda: attention(q, k, v, cu, 4.0),
        "max_seqlen_k is None": lambda: attention(q, k, v, cu, 4, cu_seqlens_k=cu.clone()),
        "window is 0": lambda: attention(q, k, v, cu, 4, window=0),
        "scale is -1": lambda: attention(q, k, v, cu, 4, scale=-1),
        "4 queries but only 3 keys": lambda: attention(
            q, k[:3], v[:3], cu, 4, **{**cached, "cu_seqlens_k": bounds([3])}
        ),
    }.items():
        with pytest.raises(ValueError, match=f"attention: {message}|a document has {message}"):
            call()
