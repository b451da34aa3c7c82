import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.integrations.neftune import neftune_post_forward_hook

from steep.kernels import NeftuneNoise, document_lengths, embedding
from tests.kernels.kernel_checks import check, errors, gradients, kernel_module
from tests.kernels.offset_checks import narrow_products

V, H = 13, 12
CU_SEQLENS = torch.tensor([0, 5, 5, 6, 40, 40, 40], dtype=torch.int32)  # empty documents, one of one token
TOKENS = torch.randint(0, V, (40,), generator=torch.Generator().manual_seed(1))
LENGTHS = document_lengths(CU_SEQLENS, 40)


def plain(tokens):
    return lambda weight: F.embedding(tokens, weight)


@pytest.mark.parametrize(
    "tokens",
    [TOKENS, TOKENS.int(), torch.full((100,), 3), torch.arange(3).repeat_interleave(32), TOKENS[:1], TOKENS[:0]],
    ids=["random", "int32", "one token only", "runs that end with a chunk", "one", "none"],
)
def test_matches_float64(path, dtype, tokens):
    check(lambda weight: embedding(tokens, weight), plain(tokens), plain(tokens), [torch.randn(V, H)], dtype)


runs = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 70)), max_size=4)


@settings(max_examples=15, deadline=None)
@given(runs=runs, seed=st.integers(0, 99))
def test_runs_of_any_length_add_up(runs, seed):
    """Runs that begin, end and go on anywhere in the chunks that the Triton programs sum."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([token for token, count in runs for _ in range(count)], dtype=torch.int64)
    tokens = tokens[torch.randperm(len(tokens), generator=generator)]
    dy = torch.randn(len(tokens), 4, generator=generator)
    want = torch.zeros(5, 4, dtype=torch.float64).index_add_(0, tokens, dy.double())
    module = kernel_module("embedding")
    for function in (module._embedding_backward_triton, module._embedding_backward_cpu):
        assert errors([function(dy, tokens, 5)], [want])[0] < 1e-6
    for function in (module._embedding_accumulate_triton, module._embedding_accumulate_cpu):
        main_grad = torch.ones(5, 4)
        function(dy, tokens, main_grad)
        assert errors([main_grad], [want + 1])[0] < 1e-6


def test_two_runs_equal_and_expanded_gradients(path):
    weight = torch.randn(V, H, requires_grad=True)
    first, second = (torch.autograd.grad(embedding(TOKENS, weight).sum(), weight)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, TOKENS.bincount(minlength=V)[:, None].expand(V, H).float())


def test_rows_of_a_wider_table(path):
    wide = torch.randn(V, H + 4)
    assert torch.equal(embedding(TOKENS, wide[:, :H]), wide[TOKENS, :H])


def test_main_grad_collects_micro_batches(path, dtype):
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    main_grad = torch.zeros(V, H)
    generator = torch.Generator().manual_seed(0)
    want = torch.zeros(V, H, dtype=torch.float64)
    outputs = []
    for tokens in (TOKENS, TOKENS[:7]):  # both forwards before either backward, as in a pipeline
        dy = torch.randn(len(tokens), H, generator=generator).to(dtype)
        want.index_add_(0, tokens, dy.double())
        outputs.append((embedding(tokens, weight, main_grad=main_grad), dy))
    for y, dy in outputs:
        y.backward(dy)
    assert weight.grad is None
    assert errors([main_grad], [want])[0] < 1e-6


# --- noise -----------------------------------------------------------------------------------------------------------


def noise_of(tokens=TOKENS, lengths=LENGTHS, hidden=H, alpha=5.0, seed=1, step=2, first_token=0):
    noise = NeftuneNoise(alpha, lengths, seed, step, first_token)
    return embedding(tokens, torch.zeros(V, hidden), noise=noise)


def test_document_lengths():
    assert LENGTHS.tolist() == [5] * 5 + [1] + [34] * 34
    assert document_lengths(CU_SEQLENS, 42)[40:].tolist() == [0, 0]
    assert document_lengths(CU_SEQLENS, 0).tolist() == []


def test_noise_is_added_and_rounded_once(path, dtype):
    weight = torch.randn(V, H).to(dtype)
    y = embedding(TOKENS, weight, noise=NeftuneNoise(5.0, LENGTHS, 1, 2))
    exact = weight[TOKENS].double() + noise_of().double()
    assert (y.double() - exact).abs().max() <= (exact.abs().max() * torch.finfo(dtype).eps)
    assert torch.equal(y, exact.to(dtype)) or dtype == torch.float32


def test_range_and_variance_of_each_document():
    tokens = torch.zeros(400, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 100, 400], dtype=torch.int32)
    hidden = 256
    noise = noise_of(tokens, document_lengths(cu_seqlens, 400), hidden, alpha=15.0)
    for begin, end in ((0, 100), (100, 400)):
        amplitude = 15.0 / math.sqrt((end - begin) * hidden)
        part = noise[begin:end].double()
        assert 0.999 * amplitude < part.abs().max() <= amplitude * (1 + 1e-6)
        spread = amplitude * math.sqrt(1 / 3 / part.numel())
        assert part.mean().abs() < 5 * spread
        spread = amplitude**2 * math.sqrt(4 / 45 / part.numel())  # of the mean of squares of a uniform variable
        assert (part.square().mean() - amplitude**2 / 3).abs() < 5 * spread


def test_amplitude_is_that_of_transformers_for_one_sequence():
    module = torch.nn.Module()
    module.neftune_noise_alpha = 5.0
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(module.train(), None, torch.zeros(1, 200, 64))[0]
    ours = noise_of(torch.zeros(200, dtype=torch.int64), torch.full((200,), 200), 64)
    assert theirs.abs().max().item() == pytest.approx(ours.abs().max().item(), rel=1e-3)
    assert theirs.square().mean().item() == pytest.approx(ours.square().mean().item(), rel=0.05)


def test_no_length_no_noise(path):
    assert noise_of(lengths=torch.zeros_like(LENGTHS)).abs().max() == 0


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, 40), first=st.integers(0, 2**40))
def test_noise_does_not_depend_on_the_sharding(cut, first):
    whole = noise_of(first_token=first)
    parts = [
        noise_of(TOKENS[piece], LENGTHS[piece], first_token=first + (piece.start or 0))
        for piece in (slice(0, cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_paths_draw_the_same_noise():
    module = kernel_module("embedding")
    weight, step, first = torch.zeros(V, 1028), torch.tensor(2**40 + 3), torch.tensor(2**41 + 1)
    tensors = TOKENS, weight, LENGTHS, step, first
    on_cpu, on_gpu = (f(*tensors, 5.0, 2**62 + 7) for f in (module._embedding_cpu, module._embedding_triton))
    assert torch.allclose(on_cpu, on_gpu, rtol=1e-6, atol=0)


def test_seed_and_step_change_the_noise():
    base = noise_of()
    assert torch.equal(base, noise_of(step=torch.tensor(2), first_token=torch.tensor(0)))
    for other in (noise_of(seed=3), noise_of(step=3), noise_of(first_token=1)):
        assert (base == other).float().mean() < 0.01


def test_noise_leaves_the_gradient_alone_and_is_recomputed(path):
    noise = NeftuneNoise(5.0, LENGTHS, 1, 2)

    def loss(weight):
        return embedding(TOKENS, weight, noise=noise).square().sum()

    weight = torch.randn(V, H, requires_grad=True)
    (want,) = torch.autograd.grad(loss(weight), weight)
    checkpoint(loss, weight, use_reentrant=False).backward()
    assert torch.equal(weight.grad, want)
    cotangent = [
        gradients(f, [weight], torch.float32)[1] for f in (lambda w: embedding(TOKENS, w, noise=noise), plain(TOKENS))
    ]
    assert torch.allclose(*cotangent)


def test_compiles_to_the_same_numbers():
    def loss(tokens, weight, cu_seqlens, step, main_grad):
        noise = NeftuneNoise(5.0, document_lengths(cu_seqlens, 40), 1, step)
        return embedding(tokens, weight, noise=noise, main_grad=main_grad).square().sum()

    weight = torch.randn(V, H, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in (torch.tensor(3), torch.tensor(4)):
        eager, traced = (f(TOKENS, weight, CU_SEQLENS, step, None) for f in (loss, compiled))
        assert torch.equal(eager, traced)
        assert torch.equal(*(torch.autograd.grad(x, weight)[0] for x in (eager, traced)))
    grads = torch.zeros(2, V, H)
    for function, main_grad in zip((loss, compiled), grads):
        for _ in range(2):
            function(TOKENS, weight, CU_SEQLENS, step, main_grad).backward()
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


# --- limits ----------------------------------------------------------------------------------------------------------


def test_no_offset_wraps_around():
    module = kernel_module("embedding")
    tokens = torch.empty(9, dtype=torch.int64, device="meta")
    weight, dy = (torch.empty_strided((9, H), (1 << 33, 1), device="meta") for _ in range(2))
    main_grad = torch.empty(1 << 33, H, device="meta")
    for call in (
        (module._embedding_triton, tokens, weight, None, None, None, 0.0, 0),  # Philox wraps around by design
        (module._embedding_accumulate_triton, dy, tokens, main_grad),
    ):
        assert narrow_products("embedding", *call) == []


def test_wrong_arguments_are_named():
    weight, noise = torch.zeros(V, H), NeftuneNoise(5.0, LENGTHS, 1, 2)
    wrong_noise = [
        (NeftuneNoise(5.0, LENGTHS[1:], 1, 2), "noise.lengths has shape"),
        (NeftuneNoise(5.0, LENGTHS.float(), 1, 2), "noise.lengths is torch.float32"),
        (NeftuneNoise(5.0, LENGTHS, -1, 2), "noise.seed is -1"),
        (NeftuneNoise(5.0, LENGTHS, 1, torch.tensor(2.0)), "noise.step is torch.float32"),
        (NeftuneNoise(5.0, LENGTHS, 1, 2, LENGTHS), "noise.first_token has shape"),
    ]
    for tokens, table, keywords, message in (
        (TOKENS[None], weight, {}, "embedding: tokens has shape"),
        (TOKENS.float(), weight, {}, "embedding: tokens is torch.float32"),
        (TOKENS, weight[0], {}, "embedding: weight has shape"),
        (TOKENS, weight, {"main_grad": weight[1:]}, "embedding: main_grad has shape"),
        (TOKENS, weight, {"main_grad": weight.double()}, "embedding: main_grad is torch.float64"),
        (TOKENS, weight, {"main_grad": torch.zeros(H, V).T}, "must be contiguous"),
        (TOKENS, weight, {"main_grad": torch.zeros(V, H, requires_grad=True)}, "require no gradient"),
        (TOKENS, torch.zeros(V, 6), {"noise": noise}, "multiple of 4"),
        (torch.tensor([1, V, -1]), weight, {}, rf"tokens\[1\] is {V}; allowed: 0 to {V - 1}"),
        (torch.tensor([1, 2, -1]), weight, {}, r"tokens\[2\] is -1"),
        *((TOKENS, weight, {"noise": bad}, message) for bad, message in wrong_noise),
    ):
        with pytest.raises(ValueError, match=message):
            embedding(tokens, table, **keywords)
