"""Low-rank adapters: parity with PEFT in values, training and files; frozen weights, merging, whole runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steep.data import IGNORE
from steep.engine import AdamWConfig, Engine, LoraConfig, SafetensorsFolder, merge_adapters, parse_recipe, train
from steep.engine.checkpoint import list_checkpoints
from steep.engine.lora import adapter_tensors
from steep.engine.metrics import training_flops
from steep.engine.verify import verify
from tests.engine.parity import documents, labels_of, packed, relative_error, tiny_transformers
from tests.engine.test_engine import make_batch
from tests.engine.test_trainer import after_step, assert_same_run
from tests.engine.tiny_run import make_mixtral, make_model, make_recipe

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture(scope="module")
def batch():
    return make_batch(documents([30, 20], 257), [0, 0])


def trained(model, batch, steps: int = 3, dtype: str = "float32", **settings) -> Engine:
    engine = Engine.load(model, dtype=dtype, lora=LoraConfig(**{"rank": 4, **settings}))
    for _ in range(steps):
        engine.forward_backward(batch, batch.num_valid)
        engine.step(1e-2)
    return engine


def logits(engine: Engine, docs: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return engine.decoder.logits(engine.decoder(*packed(docs)))


def peft_model(hf, targets: tuple[str, ...], rslora: bool, seed: int = 3):
    """PEFT's adapters on a model of transformers, with a B that is not zero."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(hf, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize(
    ("case", "targets", "rslora"),
    [
        ("llama_attention_bias", ALL, False),
        ("qwen3", ("q_proj", "v_proj", "up_proj"), True),
        ("qwen2_tied", ("k_proj", "o_proj", "down_proj"), False),
        ("mixtral", ATTENTION, True),
    ],
)
def test_files_and_logits_agree_with_peft(case, targets, rslora, tmp_path):
    from peft import PeftModel

    hf = tiny_transformers(case)
    hf.save_pretrained(tmp_path / "base")
    docs = documents([9, 1, 14], hf.config.vocab_size)
    plain = torch.cat([hf(doc[None], use_cache=False).logits[0] for doc in docs]).detach()
    theirs = peft_model(hf, targets, rslora)
    theirs.save_pretrained(tmp_path / "peft")
    expected = torch.cat([theirs(doc[None], use_cache=False).logits[0] for doc in docs]).detach()
    assert relative_error(plain, expected) > 0.03

    engine = Engine.load(tmp_path / "base", lora=LoraConfig(start=tmp_path / "peft"))
    assert relative_error(logits(engine, docs), expected) < 3e-6
    engine.export_adapter(tmp_path / "ours")
    engine.export(tmp_path / "merged")

    ours = PeftModel.from_pretrained(tiny_transformers(case), tmp_path / "ours")
    values, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert values.keys() == given.keys()
    assert all(torch.equal(values[name], given[name]) for name in given)
    found = torch.cat([ours(doc[None], use_cache=False).logits[0] for doc in docs]).detach()
    assert torch.equal(found, expected)
    assert relative_error(logits(Engine.load(tmp_path / "merged"), docs), expected) < 3e-6


def test_training_equals_peft(tmp_path):
    hf = tiny_transformers("llama").train()
    hf.save_pretrained(tmp_path / "base")
    theirs = peft_model(hf, ALL, rslora=False)
    theirs.save_pretrained(tmp_path / "peft")
    settings = AdamWConfig(weight_decay=0.1, max_grad_norm=0.5)
    engine = Engine.load(tmp_path / "base", lora=LoraConfig(start=tmp_path / "peft"), optimizer=settings)
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(4):
        docs = documents([7, 1, 20, 12], hf.config.vocab_size, seed=step)
        batch = make_batch(docs, [0, 0, 0, 0])
        sums = engine.forward_backward(batch, batch.num_valid)
        norm, _ = engine.step(1e-2)
        found = torch.cat([theirs(doc[None], use_cache=False).logits[0] for doc in docs])
        loss = F.cross_entropy(found, labels_of(docs), ignore_index=IGNORE)
        loss.backward()
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(parameters, 0.5).item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        assert sums.nll.item() / batch.num_valid == pytest.approx(loss.item(), rel=1e-5)
    given = dict(theirs.named_parameters())
    for name, (a, b, _) in adapter_tensors(engine.decoder).items():
        for kind, tensor in (("A", a), ("B", b)):
            expected = given[f"base_model.model.{name}.lora_{kind}.default.weight"].detach()
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_begins_at_the_model_and_trains_nothing_else(model, batch, dtype, adapter_dtype):
    base = Engine.load(model, dtype=dtype)
    weights = {name: tensor.clone() for name, tensor in base.decoder.state_dict().items()}
    engine = Engine.load(model, dtype=dtype, lora=LoraConfig(rank=4, dtype=adapter_dtype))
    first = engine.forward_backward(batch, batch.num_valid).nll
    assert torch.equal(first, base.forward_backward(batch, batch.num_valid).nll)
    for _ in range(8):
        engine.step(1e-2)
        last = engine.forward_backward(batch, batch.num_valid).nll
    assert last < 0.8 * first
    after = engine.decoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    frozen = [p for p in engine.decoder.parameters() if not p.requires_grad]
    assert len(frozen) == len(weights)
    assert all(parameter.grad is None for parameter in frozen)
    state = {name for name in engine.state_dict() if name != "optimizer.step"}
    assert all(".adapter." in name for name in state)
    assert {tensor.dtype for name, tensor in engine.state_dict().items() if name.startswith("model.")} == {
        getattr(torch, adapter_dtype)
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit(model, batch, dtype):
    gradients = []
    for recompute in ("none", "selective", "full"):
        engine = trained(model, batch, steps=2, dtype=dtype)
        engine.decoder.recompute = recompute
        engine.forward_backward(batch, batch.num_valid)
        gradients.append([parameter.grad.clone() for parameter in engine.optimizer.parameters.values()])
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(*gradients))
    assert all(gradient.any() for gradient in gradients[0])


def test_adapters_beside_float8_projections(model, batch):
    exact = trained(model, batch)
    engine = trained(model, batch)
    engine.decoder.float8 = "blockwise"
    losses = [each.forward_backward(batch, batch.num_valid).nll.item() for each in (exact, engine)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    for name, parameter in exact.optimizer.parameters.items():
        assert relative_error(engine.optimizer.parameters[name].grad, parameter.grad) < 0.5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_round_trip_is_exact(model, batch, dtype):
    first, second = trained(model, batch, dtype=dtype), trained(model, batch, steps=1, dtype=dtype)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for engine in (first, second):
        engine.forward_backward(batch, batch.num_valid)
        engine.step(1e-2)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_merging_rounds_once(model, batch, tmp_path):
    engine = trained(model, batch, dtype="bfloat16", target_modules=("q_proj", "v_proj", "down_proj"))
    tensors = adapter_tensors(engine.decoder)
    with pytest.warns(UserWarning, match="were trained in bfloat16"):
        engine.export(tmp_path / "merged")
    engine.export(tmp_path / "wide", torch.float32)
    source = SafetensorsFolder(model)
    changed = 0
    for folder, dtype in (("merged", torch.bfloat16), ("wide", torch.float32)):
        for name in (stored := SafetensorsFolder(tmp_path / folder)).names:
            expected = source.get(name).bfloat16()
            if (found := tensors.get(name.removesuffix(".weight"))) is not None:
                a, b, scale = found
                expected = expected.float() + scale * (b.float() @ a.float())
                changed += 1
            torch.testing.assert_close(
                stored.get(name), expected.to(dtype), rtol=0, atol=1e-7 if dtype.itemsize > 2 else 0
            )
    assert changed == 2 * 2 * 3
    before = engine.eval_nll(batch).nll
    merge_adapters(engine.decoder)
    assert not any("adapter" in name for name, _ in engine.decoder.named_parameters())
    assert torch.equal(
        engine.eval_nll(batch).nll, Engine.load(tmp_path / "merged", dtype="bfloat16").eval_nll(batch).nll
    )
    assert engine.eval_nll(batch).nll.item() == pytest.approx(before.item(), rel=2e-3)


def test_mistakes_are_refused(model, batch, tmp_path):
    with pytest.raises(ValueError, match=r"lora.rank: 17, .* rank 16; allowed: up to 16"):
        Engine.load(model, lora=LoraConfig(rank=17))
    mixtral = make_mixtral(tmp_path / "mixtral", model)
    with pytest.raises(ValueError, match=r"up_proj is inside the experts of mixtral; allowed: q_proj, k_proj, v_proj"):
        Engine.load(mixtral, lora=LoraConfig(rank=4, target_modules=("q_proj", "up_proj")))
    assert len(adapter_tensors(Engine.load(mixtral, lora=LoraConfig(rank=4)).decoder)) == 2 * 4
    with pytest.raises(ValueError, match="an adapter brings its own rank"):
        LoraConfig(start=tmp_path, rank=4)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: not found"):
        Engine.load(model, lora=LoraConfig(start=tmp_path))
    with pytest.raises(ValueError, match="export_adapter needs adapters"):
        Engine.load(model).export_adapter(tmp_path / "none")

    engine = trained(model, batch)
    engine.export_adapter(tmp_path / "good")
    again = Engine.load(model, lora=LoraConfig(start=tmp_path / "good"))
    assert torch.equal(again.eval_nll(batch).nll, engine.eval_nll(batch).nll)
    with pytest.raises(FileExistsError):
        engine.export_adapter(tmp_path / "good")
    config = tmp_path / "good" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"use_dora is True; allowed: False"):
        Engine.load(model, lora=LoraConfig(start=tmp_path / "good"))
    config.write_text(json.dumps(values | {"r": 2}))
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \[4, 32\], expected \[2, 32\]"):
        Engine.load(model, lora=LoraConfig(start=tmp_path / "good"))
    config.write_text(json.dumps(values))
    with torch.no_grad():
        engine.decoder.layers[0].qkv.adapter.b[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf; nothing was exported"):
        engine.export_adapter(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_frozen_matrices_cost_a_third_less(model):
    config = Engine.load(model).config
    lengths = np.array([50, 7])
    full, frozen = training_flops(config, lengths), training_flops(config, lengths, frozen=True)
    attention = 12 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * (50 * 51 + 7 * 8) / 2
    assert (frozen - attention) / (full - attention) == pytest.approx(2 / 3)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora_run")
    make_recipe(root)
    return root


def lora_recipe(root, **changes):
    settings = {"lora": {"rank": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}}
    return parse_recipe(make_recipe(root, **(settings | changes)))


def test_a_run_and_its_resume(prepared, tmp_path, monkeypatch):
    whole, broken = (shutil.copytree(prepared, tmp_path / name) for name in ("whole", "broken"))
    manifest = train(lora_recipe(whole, export={"every": 4}, precision="bfloat16"))
    figures = manifest["figures"]
    assert figures["validation_after"]["held_out"] < figures["validation_before"]["held_out"] - 0.05
    assert figures["trained_parameters"] == 2 * 4 * (3 * 32 + 32 + 16 + 48)
    out = whole / "out"
    names = SafetensorsFolder(list_checkpoints(out / "checkpoints")[0]).names
    assert all(".adapter." in name or name == "optimizer.step" or name.startswith("spikes.") for name in names)

    with monkeypatch.context() as patched:
        after_step(patched, 6, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(lora_recipe(broken, export={"every": 4}, precision="bfloat16"))
    train(lora_recipe(broken, export={"every": 4}, precision="bfloat16"))
    assert_same_run(broken / "out", out)
    for folder in ("adapter", "exports/step-00000004"):
        files = [(root / "out" / folder / "adapter_model.safetensors").read_bytes() for root in (whole, broken)]
        assert files[0] == files[1]

    kinds = {Path(each["path"]).name: each["kind"] for each in verify(out)["artefacts"]}
    assert (kinds["adapter"], kinds["model"], kinds["step-00000004"]) == ("adapter", "model", "adapter")
    last = Engine.load(whole / "base", dtype="bfloat16", lora=LoraConfig(start=out / "adapter"))
    last.export(tmp_path / "merged")
    stored = [folder / "model.safetensors" for folder in (tmp_path / "merged", out / "model")]
    assert stored[0].read_bytes() == stored[1].read_bytes()
    with pytest.raises(ValueError, match="lora.rank"):
        train(lora_recipe(broken, lora={"rank": 2}))
    assert json.loads((out / "adapter" / "manifest.json").read_text())["provenance"]["step"] == 12


def test_several_processes_are_refused(prepared, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="lora: works in one process only; there are 2"):
        train(lora_recipe(prepared))
