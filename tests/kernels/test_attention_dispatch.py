"""Which backend the dispatch trusts, with stand-ins for the packages that only a GPU machine has.

The self-test's children are real processes here too: the stand-ins are packages on their path, the device is the CPU.
"""

import json
import os
import re
import sys
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from steep.kernels import attention
from tests.kernels.kernel_checks import kernel_module

module, selftest = kernel_module("attention"), kernel_module("attention_selftest")
CPU = torch.device("cpu")
FA3, FA4, FA2 = "flash_attention_3", "flash_attention_4", "flash_attention_2"

# A `flash_attn_varlen_func` as FlashAttention 2 and 3 have it: keywords, and a (left, right) window.
FLASH = """
import torch
from steep.kernels.attention import attention_reference
def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
    deterministic,
):
    assert causal and deterministic and window_size[1] in (0, -1)
    window = None if window_size[0] == -1 else window_size[0] + 1
    o = attention_reference(q.float(), k.float(), v.float(), cu_seqlens_q, cu_seqlens_k, window, softmax_scale)
    return o.to(q.dtype), None
"""


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(flash_attn=source, ...) puts packages where this process and its children import from."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    (tmp_path / "packages").mkdir()

    def run(**sources):
        for name, source in sources.items():
            (tmp_path / "packages" / f"{name}.py").write_text(textwrap.dedent(source))

    yield run
    for name in ("flash_attn", "flash_attn_interface"):
        sys.modules.pop(name, None)


@pytest.fixture
def verdicts(tmp_path):
    """verdicts() -> {backend: complaint} as kept in the cache."""

    def read():
        found = (json.loads(file.read_text()) for file in (tmp_path / "cache" / "steep").glob("attention-*.json"))
        return {verdict["backend"]: verdict["complaint"] for verdict in found}

    return read


# --- children --------------------------------------------------------------------------------------------------------


def test_a_right_backend_is_taken_and_its_verdict_kept(install, verdicts, monkeypatch, recwarn):
    install(flash_attn=FLASH)
    assert selftest.select_backend([FA3, FA2], CPU) == FA2
    assert verdicts() == {FA2: None}
    monkeypatch.setattr(selftest, "_run_child", None)  # the other ranks start none
    assert selftest.select_backend([FA3, FA2], CPU) == FA2
    assert not recwarn.list


def test_a_crash_and_a_wrong_result_pass_the_backend_over(install, verdicts):
    install(
        flash_attn_interface=FLASH.replace("    o = ", "    __import__('ctypes').string_at(0)\n    o = "),
        flash_attn=FLASH.replace("o.to(q.dtype), None", "1.1 * o.to(q.dtype)"),
    )
    with pytest.warns(RuntimeWarning) as warned, pytest.raises(RuntimeError, match="no attention backend works on cpu"):
        selftest.select_backend([FA3, FA2], CPU)
    crashed, wrong = (str(w.message) for w in warned)
    assert f"{FA3} is passed over: the process that tried it was killed by SIGSEGV" in crashed
    assert f"{FA2} is passed over: o differs from the reference by 0.1 (head_dim 128, window None" in wrong
    assert set(verdicts()) == {FA3, FA2}


def test_a_package_that_cannot_be_imported_is_named_and_tried_again_next_time(install, verdicts):
    install(flash_attn_interface="raise ImportError('libcudart.so.12: cannot open shared object file')")
    with (
        pytest.warns(RuntimeWarning, match=f"{FA3} is passed over: ImportError: libcudart"),
        pytest.raises(RuntimeError),
    ):
        selftest.select_backend([FA3], CPU)
    assert verdicts() == {}


def test_a_package_that_ends_the_process_has_not_passed(install):
    install(flash_attn_interface="import os; os._exit(0)")
    with pytest.warns(RuntimeWarning, match=f"{FA3} is passed over: exit status 0"), pytest.raises(RuntimeError):
        selftest.select_backend([FA3], CPU)


def test_a_hanging_backend_is_killed_with_all_it_started(install, monkeypatch, tmp_path):
    install(flash_attn_interface="import time; time.sleep(600)")
    children = []
    popen = selftest.subprocess.Popen
    monkeypatch.setattr(selftest.subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])
    monkeypatch.setattr(selftest, "SECONDS", 1)
    with pytest.warns(RuntimeWarning, match="no result within 1 seconds .kept in"), pytest.raises(RuntimeError):
        selftest.select_backend([FA3], CPU)
    with pytest.raises(ProcessLookupError):
        os.killpg(children[0].pid, 0)


def test_of_many_ranks_one_tests_and_the_others_wait(install, monkeypatch):
    install(flash_attn_interface="")
    started = []

    def run_child(name, device):
        started.append(name)
        time.sleep(0.2)
        return 0, None

    monkeypatch.setattr(selftest, "_run_child", run_child)
    with ThreadPoolExecutor(8) as ranks:
        chosen = list(ranks.map(lambda _: selftest.select_backend([FA3], CPU), range(8)))
    assert (chosen, started) == ([FA3] * 8, [FA3])


def test_without_a_cache_folder_every_rank_tests_for_itself(install, monkeypatch):
    install(flash_attn_interface="")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(selftest, "_run_child", lambda name, device: (0, None))
    assert selftest.select_backend([FA3], CPU) == FA3


def test_a_gpu_that_no_second_process_can_use_is_tested_from_here(install, monkeypatch):
    install(flash_attn_interface=FLASH, flash_attn="raise ValueError('broken')")
    monkeypatch.setattr(selftest, "_run_child", lambda name, device: (selftest._NO_DEVICE, "busy"))
    with pytest.warns(RuntimeWarning, match=f"{FA2} is passed over: ValueError: broken"):
        assert selftest.select_backend([FA2, FA3], CPU) == FA3


# --- what the test notices -------------------------------------------------------------------------------------------


def right(q, k, v, cu_q, cu_k, _q, _k, window, scale):
    cu_k = cu_q if cu_k is None else cu_k
    return module.attention_reference(q.float(), k.float(), v.float(), cu_q, cu_k, window, scale).to(q.dtype)


def ignores_window(*args):
    return right(*args[:7], None, args[8])


def window_off_by_one(*args):
    return right(*args[:7], args[7] and args[7] + 1, args[8])


def aligned_top_left(q, k, v, cu_q, cu_k, *rest):
    if cu_k is not None:
        keep = torch.cat([torch.arange(a, a + n) for a, n in zip(cu_k[:-1], cu_q.diff())])
        k, v = k[keep], v[keep]
    return right(q, k, v, cu_q, None, *rest)


def takes_views_for_contiguous(q, k, *rest):
    return right(q, k.as_strided(k.shape, (k.shape[1] * k.shape[2], k.shape[2], 1)), *rest)


class SlightlyOtherGradient(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        SlightlyOtherGradient.calls += 1
        return grad * (1 + 2**-7 * (SlightlyOtherGradient.calls % 2))


def backward_varies(q, *rest):
    return right(SlightlyOtherGradient.apply(q), *rest)


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (right, None),
        (ignores_window, r"o differs from the reference by .*window 1, 9 cached"),
        (window_off_by_one, r"o differs from the reference by .*window 1, 9 cached"),
        (aligned_top_left, r"o differs from the reference by .*window None, 9 cached"),
        (takes_views_for_contiguous, r"o differs from the reference by"),
        (backward_varies, "dq differs between two runs"),
    ],
)
def test_the_self_test_notices(backend, complaint):
    found = selftest.self_test(backend, CPU)
    assert found is None if complaint is None else re.search(complaint, found)


# --- order and demands -----------------------------------------------------------------------------------------------


def test_order():
    assert module.candidates((9, 0)) == [FA3, FA4, FA2, "torch_varlen", "triton"]
    assert module.candidates((8, 0))[0] == FA2
    assert module.candidates((10, 0))[0] == FA4


def test_installed_is_told_without_an_import(install, tmp_path):
    install(flash_attn_interface="raise SystemExit")
    assert [selftest._installed(name) for name in module.candidates((9, 0))] == [True, False, False, True, True]
    (tmp_path / "packages/flash_attn/cute").mkdir(parents=True)  # FlashAttention-4 alone has no flash_attn/__init__.py
    assert [selftest._installed(name) for name in (FA4, FA2)] == [True, False]
    (tmp_path / "packages/flash_attn/__init__.py").write_text("raise SystemExit")
    assert [selftest._installed(name) for name in (FA4, FA2)] == [True, True]


def test_a_demanded_backend(install, monkeypatch):
    monkeypatch.setenv("STEEP_ATTENTION", "flash_attention_5")
    with pytest.raises(ValueError, match="STEEP_ATTENTION is 'flash_attention_5'; allowed: flash_attention_3, "):
        module._demanded_backend()
    monkeypatch.setenv("STEEP_ATTENTION", FA3)
    with pytest.raises(ValueError, match="STEEP_ATTENTION is 'flash_attention_3', which cannot be imported"):
        module._demanded_backend()
    monkeypatch.setenv("STEEP_ATTENTION", "triton")
    assert module._demanded_backend() == "triton"
    assert module.attention_backend("cpu") == "torch_sdpa_cpu"  # the variable is about GPUs


# --- what foreign packages are given ---------------------------------------------------------------------------------


def call(backend, monkeypatch, **overrides):
    """`attention` with its gradients through one backend, as on a GPU that has it."""
    monkeypatch.setitem(module._loaded, backend, module.load_backend(backend))
    monkeypatch.setattr(module, "attention_backend", lambda device_type: backend)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, h, 8, generator=generator, requires_grad=True) for h in (4, 2, 2))
    cu = torch.tensor([0, 2, 7, 7], dtype=torch.int32)
    function = overrides.pop("function", attention)
    o = function(q, k, v, cu, 5, window=3)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), torch.ones_like(o))]


@pytest.fixture
def fa4(monkeypatch):
    """FlashAttention-4's two functions as 4.0.0b36 has them: five results forward, three backward, no operator."""

    def fwd(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse,
        **window,
    ):  # fmt: skip
        assert (causal, return_lse, window) == (True, True, {"window_size_left": 2, "window_size_right": 0})
        o, lse = module._forward_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, 0, 0, 3, softmax_scale)
        return o, lse, None, None, None

    def bwd(
        q, k, v, out, dout, lse, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        deterministic, **window,
    ):  # fmt: skip
        assert (causal, deterministic, window) == (True, True, {"window_size_left": 2, "window_size_right": 0})
        return module._backward_cpu(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, 0, 0, 3, softmax_scale)

    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[2]]._flash_attn_fwd, sys.modules[names[2]]._flash_attn_bwd = fwd, bwd


def test_flash_attention_4_is_one_node_of_a_compiled_graph(fa4, monkeypatch):
    expected = call("torch_sdpa_cpu", monkeypatch)
    eager = call(FA4, monkeypatch)
    compiled = call(FA4, monkeypatch, function=torch.compile(attention, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(eager, expected))
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected))


def test_flash_attention_2_and_3_are_called_through_their_public_function(install, monkeypatch):
    install(flash_attn_interface=FLASH, flash_attn=FLASH)
    expected = call("torch_sdpa_cpu", monkeypatch)
    for backend in (FA3, FA2):
        got = call(backend, monkeypatch)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))


def test_their_call_is_part_of_a_compiled_graph(install, monkeypatch):
    traceable = (
        FLASH[: FLASH.index("    o = ")] + "    return (q * cu_seqlens_k[1] + k.mean() * v.mean() * window, q)\n"
    )
    install(flash_attn_interface=traceable)
    eager = call(FA3, monkeypatch)
    compiled = call(FA3, monkeypatch, function=torch.compile(attention, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))


def test_torch_varlen_takes_the_arguments_we_give_it():
    """No GPU here, but the operators' schemas and fakes must accept our call."""
    q, k = (torch.empty(12, h, 64, dtype=torch.bfloat16, device="meta") for h in (4, 2))
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    for window in (None, 5):
        documents = (cu, cu, 7, 7, window, 0.125)
        o, lse = module._forward_torch(q, k, k, *documents)
        assert (o.shape, lse.shape) == (q.shape, (4, 12))
        grads = module._backward_torch(o, q, k, k, o, lse, *documents)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


def test_the_deterministic_switch_is_put_back(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    with pytest.raises(KeyError), module._deterministic():
        seen += [torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory]
        raise KeyError
    seen += [torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory]
    assert seen == [True, False, False, True]
