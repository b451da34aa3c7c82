"""The kernels inside other people's training machinery: activation checkpointing, torch.compile, FSDP2, the Trainer."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from steep.kernels import patch
from tests.processes import run_ranks

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "plain_loop.py"


def plain_loop():
    """The decoder of the plain loop calls every public function of a decoder: it is what is trained here."""
    spec = importlib.util.spec_from_file_location("plain_loop", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(tokens: int = 96):
    torch.manual_seed(0)
    module = plain_loop()
    model, batch = module.Decoder(hidden=128, layers=2), module.make_batch(97, tokens, "cpu")
    return model, batch, (batch.labels != -100).sum()


def hf_model() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, use_cache=False,
        )
    )  # fmt: skip


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def distances(got: dict, want: dict) -> dict[str, float]:
    return {name: ((got[name] - want[name]).norm() / want[name].norm()).item() for name in want}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant):
    model, batch, count = example()
    loss = model(batch, count)
    want = gradients(model, loss)
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=reentrant)
    again = model(batch, count)
    assert torch.equal(loss, again)
    got = gradients(model, again)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_compiles_as_one_graph():
    model, batch, count = example()
    loss = model(batch, count)
    want = gradients(model, loss)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(batch, count)
    assert torch.allclose(loss, compiled, rtol=1e-6)
    assert max(distances(gradients(model, compiled), want).values()) < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_takes_the_same_steps(tmp_path, accumulation):
    documents = [{"input_ids": torch.randint(61, (n,)).tolist()} for n in (5, 9, 1, 12, 3, 7, 8, 2, 11, 4, 6, 10)]
    trained = []
    for use in (False, True):
        model = hf_model()
        report = patch(model) if use else SimpleNamespace(calls={})
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=3, max_steps=3, learning_rate=1e-2, use_cpu=True,
            optim="sgd", gradient_accumulation_steps=accumulation, report_to=[], disable_tqdm=True, logging_steps=1,
            save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        trainer = transformers.Trainer(model=model, args=args, train_dataset=documents, data_collator=collator)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained.append((losses, model.state_dict()))
    (losses, weights), (mine, my_weights) = trained
    assert report.calls == {"steep": 3 * accumulation}
    assert torch.allclose(torch.tensor(losses), torch.tensor(mine), rtol=1e-4)
    assert max(distances(my_weights, weights).values()) < 1e-6


def _rank(rank: int, directory: str) -> None:
    sys.modules["kernels"] = None  # as in tests/conftest.py, for this process
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    errors = {}

    model, *_ = example()
    batches = [plain_loop().make_batch(97, tokens, "cpu") for tokens in (64, 96)]
    count = sum((batch.labels != -100).sum() for batch in batches)
    loss = sum(model(batch, count) for batch in batches)
    want = {"loss": loss.detach(), **gradients(model, loss)}
    model, *_ = example()
    for unit in (*model.layers, model.head, model):
        fully_shard(unit)
    errors["example"] = _distances(model, model(batches[rank], count), want)

    ids = torch.randint(61, (2, 12))
    model = hf_model().train()
    loss = model(input_ids=ids, labels=ids).loss
    want = {"loss": loss.detach(), **gradients(model, loss)}
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        for patched in ("before", "after"):
            model = hf_model().train()
            if patched == "before":
                patch(model)
            for unit in (*model.model.layers, model.lm_head, model):
                fully_shard(unit, mp_policy=policy)
            if patched == "after":
                patch(model)
            tables = []
            model.model.layers[0].self_attn.register_forward_pre_hook(
                lambda _, __, kwargs, tables=tables: tables.append(kwargs["position_embeddings"]), with_kwargs=True
            )
            output = model(input_ids=ids[rank : rank + 1], labels=ids[rank : rank + 1], num_items_in_batch=22)
            assert output.logits is None
            assert tables[0].cos.dtype == tables[0].sin.dtype == torch.float32
            errors[policy.param_dtype, patched] = _distances(model, output.loss, want)
    if rank == 0:
        torch.save(errors, f"{directory}/errors")
    dist.destroy_process_group()


def _distances(model: nn.Module, loss: torch.Tensor, want: dict) -> dict[str, float]:
    got = {name: grad.full_tensor() for name, grad in gradients(model, 2 * loss).items()}  # FSDP2 averages over ranks
    total = loss.detach().clone()
    dist.all_reduce(total)
    return distances({"loss": total, **got}, want)


def test_fsdp2_on_two_ranks_gives_the_loss_and_gradients_of_one(tmp_path):
    run_ranks(_rank, 2, str(tmp_path))
    errors = torch.load(tmp_path / "errors")
    assert max(errors["example"].values()) < 1e-5
    for patched in ("before", "after"):
        assert max(errors[None, patched].values()) < 1e-5
        # What FSDP2 casts to bf16 on the way into a module must not include the scale of the loss.
        assert errors[torch.bfloat16, patched]["loss"] < 1e-4
