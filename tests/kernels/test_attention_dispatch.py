"""Which backend the dispatch trusts, with stand-ins for the packages that only a GPU machine has."""

import sys
import types

import pytest
import torch

from tests.kernels.kernel_checks import kernel_module

module = kernel_module("attention")
CPU, HOPPER = torch.device("cpu"), (9, 0)


def right(q, k, v, cu_q, cu_k, window, scale):
    return module.attention_reference(q, k, v, cu_q, cu_k, window, scale)


def ignores_window(q, k, v, cu_q, cu_k, window, scale):
    return right(q, k, v, cu_q, cu_k, None, scale)


def window_off_by_one(q, k, v, cu_q, cu_k, window, scale):
    return right(q, k, v, cu_q, cu_k, window and window + 1, scale)


def aligned_top_left(q, k, v, cu_q, cu_k, window, scale):
    if cu_q[-1] != cu_k[-1]:
        keep = torch.cat([torch.arange(a, a + n) for a, n in zip(cu_k[:-1], cu_q.diff())])
        k, v, cu_k = k[keep], v[keep], cu_q
    return right(q, k, v, cu_q, cu_k, window, scale)


def breaks(*_):
    raise RuntimeError("no kernel image is available")


def varies(q, *rest):
    varies.calls = getattr(varies, "calls", 0) + 1
    return right(q, *rest) * (1 + 1e-2 * (varies.calls % 2))


def flash_package(compute, unbounded):
    """A `flash_attn_varlen_func` as FlashAttention has it: keywords, (left, right) window, its own "no window"."""

    def flash_attn_varlen_func(
        q, k, v, other=None, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size, deterministic,
    ):  # fmt: skip
        assert other is None
        assert causal
        assert deterministic
        assert window_size[1] in (0, unbounded)
        window = None if window_size[0] == unbounded else window_size[0] + 1
        return compute(q, k, v, cu_seqlens_q, cu_seqlens_k, window, softmax_scale), None

    package = types.ModuleType("stand_in")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    return package


@pytest.fixture
def install(monkeypatch):
    """install(fa3=..., fa4=..., fa2=...) puts stand-ins in place; varlen and triton are replaced by the formula."""

    def run(fa3=None, fa4=None, fa2=None, torch_varlen=right, triton=right):
        for name, compute, unbounded in (
            ("flash_attn_interface", fa3, -1),
            ("flash_attn", fa2, -1),
            ("flash_attn.cute", fa4, None),
        ):
            monkeypatch.setitem(sys.modules, name, compute and flash_package(compute, unbounded))
        if fa4 and not fa2:
            monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        for name, compute in (("torch_varlen", torch_varlen), ("triton", triton)):
            monkeypatch.setitem(
                module._BACKENDS,
                name,
                lambda q, k, v, cu_q, cu_k, _q, _k, window, scale, compute=compute: compute(
                    q, k, v, cu_q, cu_k, window, scale
                ),
            )

    return run


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ({"fa3": right, "fa4": right, "fa2": right}, "flash_attention_3"),
        ({"fa4": right, "fa2": right}, "flash_attention_4"),
        ({"fa2": right}, "flash_attention_2"),
        ({}, "torch_varlen"),
    ],
)
def test_order_on_hopper(install, installed, chosen, recwarn):
    install(**installed)
    assert module.select_backend(CPU, HOPPER) == chosen
    assert not recwarn.list


def test_order_elsewhere(install):
    install(fa3=right, fa4=right, fa2=right)
    assert module.select_backend(CPU, (8, 0)) == "flash_attention_2"
    assert module.select_backend(CPU, (10, 0)) == "flash_attention_4"


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (ignores_window, r"differs from the reference by .* \(window 1"),
        (window_off_by_one, r"differs from the reference by .* \(window 1, 0 cached"),
        (aligned_top_left, "9 cached keys"),
        (breaks, "RuntimeError: no kernel image"),
        (varies, "differs between two runs"),
    ],
)
def test_a_faulty_backend_is_passed_over_by_name(install, fault, complaint):
    install(fa3=fault, fa2=right)
    with pytest.warns(RuntimeWarning, match=f"flash_attention_3 is passed over: .*{complaint}"):
        assert module.select_backend(CPU, HOPPER) == "flash_attention_2"


def test_without_any_backend_the_error_says_so(install):
    install(torch_varlen=breaks, triton=breaks)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="no attention backend"):
        module.select_backend(CPU, HOPPER)


def test_the_cpu_needs_no_choice():
    assert module.attention_backend("cpu") == "torch_sdpa_cpu"


def test_torch_varlen_takes_the_arguments_we_give_it():
    """No GPU here, but the operator's schema, its fake and its backward's schema must accept our call."""
    import torch.nn.attention.varlen

    q, k = (torch.empty(12, h, 64, dtype=torch.bfloat16, device="meta") for h in (4, 2))
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    for window in (None, 5):
        documents = (cu, cu, 7, 7, window, 0.125, "torch_varlen")
        o, lse = module._attention_cuda(q, k, k, *documents)
        assert (o.shape, lse.shape) == (q.shape, (4, 12))
        grads = module._attention_backward_cuda(o, q, k, k, o, lse, *documents)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    assert not torch.are_deterministic_algorithms_enabled()
