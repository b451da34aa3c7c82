"""Nothing in a training step waits for the device.

A step runs on fake tensors, which have shapes and devices but no values: who asks one for a value, by `.item()`,
`bool`, `nonzero` or a mask as an index, fails. Copies between host and device are judged as CUDA would: without waiting
only from page-locked memory, and when asked for. Kernels are opaque operators here; what their launchers do is host
arithmetic. On a build of torch without CUDA autograd does not run on fake CUDA tensors: there the forward and the
optimizer run on "cuda", and the backward on "cpu", of whose operators one is another (`kernels.linear` in fp32). With a
GPU torch's own detector watches a real step.
"""

import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from steep.engine import AdamWConfig, Decoder, Engine, LoraConfig, ModelConfig
from steep.engine.lora import add_adapters
from steep.engine.shards import LocalShard
from steep.engine.spikes import SpikeConfig, SpikeGuard
from steep.engine.trainer import Trainer
from tests.engine.parity import documents
from tests.engine.test_engine import make_batch
from tests.engine.tiny_run import make_mixtral, make_model

aten = torch.ops.aten
AUTOGRAD_ON_CUDA = torch.backends.cuda.is_built()
# (settings of AdamW, of the decoder, of adapters)
CASES: dict[str, tuple[dict, dict, dict | None]] = {
    "plain": ({}, {}, None),
    "selective_8bit": ({"moments": "8bit", "master": "none"}, {"recompute": "selective"}, None),
    "full_offload": ({"offload": True}, {"recompute": "full"}, None),
    "in_backward": ({"in_backward": True, "max_grad_norm": None}, {}, None),
    "lora": ({}, {"recompute": "selective"}, {"rank": 4}),
    "lora_float8": ({}, {"float8": "rowwise"}, {"rank": 4}),
}


PAGE_LOCKED: dict[int, Tensor] = {}  # by the storage, for which it also keeps it


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def page_locked(tensor: Tensor) -> bool:
    return storage_of(tensor) in PAGE_LOCKED


class Waits(AssertionError):
    """A copy between host and device that the host waits for."""


class JudgeCopies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source, target, asked = None, None, False
        if func is aten._to_copy.default:
            source, asked = args[0], kwargs.get("non_blocking", False)
            target = kwargs.get("device") or source.device
        elif func is aten.copy_.default:
            target, source = args[0].device, args[1]
            asked = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        elif func is aten.lift_fresh.default and args[0].device.type == "cuda":
            raise Waits("a tensor made from values of the host")
        if source is not None:
            kinds = source.device.type, torch.device(target).type
            if kinds == ("cpu", "cuda") and source.dim() and not (asked and page_locked(source)):
                raise Waits(f"copy of {tuple(source.shape)} to the device, non_blocking={asked}")
            # a new tensor on the host is page-locked if non_blocking is asked for, an old one may not be
            if kinds == ("cuda", "cpu") and not (asked and (func is not aten.copy_.default or page_locked(args[0]))):
                raise Waits(f"copy of {tuple(source.shape)} to the host, non_blocking={asked}")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("no_sync")
    dense = make_model(root / "dense")
    return {"dense": dense, "mixture": make_mixtral(root / "mixture", dense)}


@pytest.fixture
def fakes(monkeypatch):
    """Makes torch and the engine accept fake tensors where they look at what they are."""

    def lock_pages(tensor: Tensor) -> Tensor:
        PAGE_LOCKED[storage_of(tensor)] = tensor
        return tensor

    def indexed(tensor: Tensor, index) -> Tensor:
        """Tensor's own __getitem__ looks for the device, as its copy_ and contiguous do."""
        dim = 0
        for each in index if isinstance(index, tuple) else (index,):
            if isinstance(each, Tensor):
                return aten.index.Tensor(tensor, [None] * dim + [each])
            if isinstance(each, int):
                tensor = aten.select.int(tensor, dim, each)
                continue
            tensor = aten.unsqueeze(tensor, dim) if each is None else _sliced(tensor, dim, each)
            dim += 1
        return tensor

    def whole(tensor: Tensor) -> LocalShard:
        return LocalShard(tensor.detach().view(-1), 0, tensor.numel(), True)

    monkeypatch.setattr(Tensor, "pin_memory", lock_pages)
    monkeypatch.setattr("steep.engine.optimizer.local_shard", whole)
    if not AUTOGRAD_ON_CUDA:
        monkeypatch.setattr(Tensor, "__getitem__", indexed)
        monkeypatch.setattr(
            Tensor, "contiguous", lambda tensor: aten.clone(tensor, memory_format=torch.contiguous_format)
        )
        monkeypatch.setattr(Tensor, "copy_", lambda tensor, *args, **kwargs: aten.copy_(tensor, *args, **kwargs))
    monkeypatch.setenv("STEEP_ATTENTION", "triton")
    # GPUs have float8; asking which one this is belongs to the start, not to a step
    monkeypatch.setattr(sys.modules["steep.kernels.fp8_linear"], "_check_device", lambda device, recipe: None)
    yield FakeTensorMode(allow_non_fake_inputs=True)
    PAGE_LOCKED.clear()


def _sliced(tensor: Tensor, dim: int, part: slice) -> Tensor:
    return aten.slice.Tensor(tensor, dim, *part.indices(tensor.shape[dim]))


def make_decoder(folder, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        return Decoder(ModelConfig.from_folder(folder)).to(dtype)


def put_on(decoder: Decoder, device: str) -> Decoder:
    """Memory without values for parameters that are on `meta`."""
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(memory, parameter.requires_grad))
    return decoder


def make_trainer(engine: Engine) -> Trainer:
    """As much of a Trainer as a step needs."""
    trainer = object.__new__(Trainer)
    trainer.engine, trainer.world_size, trainer.sources = engine, 1, ["first", "second"]
    trainer.guard = SpikeGuard(SpikeConfig(), engine.device)
    return trainer


def run_step(trainer: Trainer, batches: list, autograd: bool) -> None:
    engine = trainer.engine
    if autograd:
        trainer._train_step(batches, 100, 1e-3)
        return
    with torch.inference_mode():  # which keeps no track of views either
        for batch in batches:
            engine.eval_nll(batch, 2)
    engine.begin_step(1e-3)
    for name, parameter in engine.optimizer.parameters.items():
        parameter.grad = torch.empty_like(parameter, dtype=parameter.grad_dtype)
        if engine.optimizer.config.in_backward:
            engine.optimizer._in_backward._update(name, parameter)
    loss = torch.empty((), device=engine.device)
    grad_norm, skipped = engine.step(1e-3, veto=lambda norm: trainer.guard.judge(loss, norm))
    trainer.guard.update(loss, grad_norm, skipped)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "case"), [*itertools.product(["dense"], CASES), ("mixture", "plain")])
def test_a_step_waits_for_nothing(models, fakes, family, case, dtype, device):
    optimizer, options, lora = CASES[case]
    decoder = make_decoder(models[family], dtype)
    if lora is not None:
        add_adapters(decoder, LoraConfig(**lora, dtype="float32"))
    batches = [make_batch(documents([30, 20], 257), [0, 1])] * (1 if case == "in_backward" else 2)
    with fakes:
        put_on(decoder, device)
        decoder.rope_tables.get(50, decoder.norm.weight.device)  # made once, not in every step
        for name, value in options.items():
            setattr(decoder, name, value)
        trainer = make_trainer(Engine(decoder, AdamWConfig(**optimizer)))
        with JudgeCopies():
            run_step(trainer, batches, autograd=device == "cpu" or AUTOGRAD_ON_CUDA)


def ask_for_value(grad_norm: Tensor) -> Tensor:
    return grad_norm * 0 if grad_norm.item() > 1 else grad_norm


def branch_on_tensor(grad_norm: Tensor) -> Tensor:
    return grad_norm if (grad_norm > 1) else grad_norm * 0


def index_by_mask(grad_norm: Tensor) -> Tensor:
    values = grad_norm.expand(3)
    return values[values > 0].sum()


def find_nonzero(grad_norm: Tensor) -> Tensor:
    return grad_norm.expand(3).nonzero().sum()


def copy_to_host(grad_norm: Tensor) -> Tensor:
    return grad_norm.expand(3).cpu()


def copy_to_device(grad_norm: Tensor) -> Tensor:
    return torch.zeros(3).to(grad_norm.device, non_blocking=True).sum()  # from pageable memory


@pytest.mark.parametrize(
    ("planted", "devices"),
    [
        (ask_for_value, ["cpu", "cuda"]),
        (branch_on_tensor, ["cpu", "cuda"]),
        (index_by_mask, ["cpu"]),
        (find_nonzero, ["cpu"]),
        (copy_to_host, ["cuda"]),
        (copy_to_device, ["cuda"]),
    ],
)
def test_a_step_that_waits_is_found(models, fakes, planted, devices):
    batch = make_batch(documents([30, 20], 257), [0, 1])
    for device in devices:
        decoder = make_decoder(models["dense"], torch.bfloat16)
        with fakes:
            trainer = make_trainer(Engine(put_on(decoder, device)))
            decoder.rope_tables.get(50, trainer.engine.device)
            trainer.guard.judge = lambda loss, grad_norm: planted(grad_norm)
            with JudgeCopies(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException, Waits)):
                run_step(trainer, [batch], autograd=device == "cpu" or AUTOGRAD_ON_CUDA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["plain", "selective_8bit", "full_offload", "in_backward", "lora"])
def test_a_real_step_on_a_gpu_waits_for_nothing(models, case):
    optimizer, options, lora = CASES[case]
    engine = Engine.load(
        models["dense"], dtype="bfloat16", device="cuda", optimizer=AdamWConfig(**optimizer),
        lora=None if lora is None else LoraConfig(**lora),
    )  # fmt: skip
    for name, value in options.items():
        setattr(engine.decoder, name, value)
    trainer = make_trainer(engine)
    batch = make_batch(documents([30, 20], 257), [0, 1])
    for _ in range(2):  # compiles kernels and makes tables
        trainer._train_step([batch], 100, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step([batch], 100, 1e-3)
        with pytest.raises(RuntimeError, match="synchronizing"):
            engine.optimizer.step_count.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
