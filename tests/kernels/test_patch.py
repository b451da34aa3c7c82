"""`patch` on tiny random models of every family: transformers' own results, in training and generation, and no trace
of it after `unpatch`."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from steep.kernels import patch, unpatch
from tests.kernels.conftest import use_triton

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral"]
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "use_cache": False,
    "attn_implementation": "sdpa", "initializer_range": 0.2,  # large: scores that matter, gradients that do not cancel
}  # fmt: skip
EXTRA = {"Mistral": {"sliding_window": 5}, "Mixtral": {"num_local_experts": 4, "experts_implementation": "eager"}}
LENGTHS = [7, 1, 9]


def tiny(family: str, head: str = "ForCausalLM", **options) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **EXTRA.get(family, {}), **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{head}")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide mistakes
            nn.init.normal_(parameter, 0.5, 0.2)
    return model


def packed() -> dict:
    """One row of three documents, as DataCollatorWithFlattening makes it."""
    ids = torch.randint(1, 61, (1, sum(LENGTHS)))
    labels = ids.clone()
    labels[0, [0, 7, 8]] = -100
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return {"input_ids": ids, "labels": labels, "position_ids": positions[None]}


def flash_arguments() -> dict:
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 9, "max_length_k": 9}


def rows() -> dict:
    ids = torch.randint(1, 61, (2, 9))
    return {"input_ids": ids, "labels": ids}


def padded() -> dict:
    batch = rows()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {**batch, "labels": batch["labels"].masked_fill(mask == 0, -100), "attention_mask": mask}


BATCHES = {"packed": packed, "rows": rows, "padded": padded}


def results(model: nn.Module, batch: dict, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Loss and every gradient of a training step; logits of an evaluation step."""
    model = copy.deepcopy(model).to(dtype) if dtype else model
    model.train()
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    if "attention_mask" in batch:
        logits = logits[batch["attention_mask"].bool()]
    return {"loss": output.loss.detach(), "logits": logits, **grads}


def distances(got: dict, want: dict) -> dict[str, float]:
    """Relative distance per tensor, as far as the true one does not vanish."""
    assert got.keys() == want.keys()
    return {
        name: ((got[name].double() - want[name].double()).norm() / want[name].double().norm().clamp(min=1e-4)).item()
        for name in want
    }


def assert_close(got: dict, want: dict) -> None:
    worst = distances(got, want)
    name = max(worst, key=worst.__getitem__)
    assert worst[name] < 1e-5, f"{name}: {worst[name]:.3g}"


def patched(model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    patch(model, **options)
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small lose more by waiting for a second thread than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients_are_those_of_transformers(family, batch):
    model, inputs = tiny(family), BATCHES[batch]()
    assert_close(results(patched(model), inputs), results(model, inputs))


def error(model: nn.Module, truths: list[dict], batches: list[dict]) -> float:
    """Squared relative distance of logits and of the whole gradient from the truth, summed over batches."""
    total = 0.0
    for truth, batch in zip(truths, batches):
        got = results(model, batch)
        for names in (["logits"], [name for name in truth if name not in ("loss", "logits")]):
            distance = sum((got[name].double() - truth[name]).square().sum().item() for name in names)
            total += distance / sum(truth[name].square().sum().item() for name in names)
    return total


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_are_no_further_from_float64_than_transformers(family, autocast):
    options = {"num_experts_per_tok": 4} if family == "Mixtral" else {}  # all: a choice would drown what is measured
    model = tiny(family, num_hidden_layers=1, initializer_range=0.1, **options)
    model, batches = model if autocast else model.bfloat16(), [packed() for _ in range(3)]
    truths = [results(model, batch, torch.float64) for batch in batches]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert error(patched(model), truths, batches) <= error(model, truths, batches)


def test_interpreted_kernels_give_the_same(monkeypatch):
    model, inputs = tiny("Qwen3", num_hidden_layers=1), packed()
    want = results(model, inputs)
    use_triton(monkeypatch)
    assert_close(results(patched(model), inputs), want)


def test_packed_documents_may_come_as_flash_attention_arguments():
    model, inputs = tiny("Mistral"), packed()
    model = patched(model)
    want = results(model, inputs)
    assert_close(results(model, inputs | flash_arguments()), want)
    del inputs["position_ids"]  # rotary positions are relative: documents need not start at 0
    assert_close(results(model, inputs | flash_arguments()), want)
    assert distances(results(model, inputs), want)["loss"] > 1e-4  # as one document


def test_unpatch_leaves_nothing_behind():
    model, inputs = tiny("Qwen3"), packed()
    before = results(model, inputs)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    patch(model)
    results(model, inputs)
    unpatch(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
    after = results(model, inputs)
    assert all(torch.equal(before[name], after[name]) for name in before)
    patch(model)  # and it can be done again


def test_copies_and_files(tmp_path):
    model, inputs = tiny("Llama", tie_word_embeddings=True), packed()
    want = results(model, inputs)
    mine = patched(model)
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert copied.forward.__self__ is copied
        assert copied.model.layers[1].mlp.forward.__self__ is copied.model.layers[1].mlp
        assert copied(**inputs).logits is not None
        assert copied.train()(**inputs).logits is None
        assert_close(results(copied, inputs), want)
    assert mine.state_dict().keys() == model.state_dict().keys()
    mine.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_a_cache(family):
    model = tiny(family).eval()
    prompts = torch.randint(1, 61, (2, 6))
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "use_cache": True}
    want = model.generate(prompts, **options)
    assert len(set(want[:, 6:].flatten().tolist())) > 2
    assert torch.equal(patched(model).generate(prompts, **options), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes(reentrant):
    model, inputs = tiny("Llama"), packed()
    mine, calls = patched(model), []
    mine.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mine.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    got = results(mine, inputs)
    assert len(calls) == 3  # forward, recomputation, evaluation
    assert_close(got, results(model, inputs))


@pytest.mark.parametrize("batch", ["packed", "padded"])
def test_compiles(batch):
    model, inputs = tiny("Qwen3", num_hidden_layers=1), BATCHES[batch]()
    if batch == "packed":
        inputs |= flash_arguments()
    want = results(model, inputs)
    mine = patched(model)
    mine.compile(backend="aot_eager", fullgraph=batch == "packed")
    assert_close(results(mine, inputs), want)


@pytest.mark.parametrize("num_items", [5, torch.tensor(5)])
def test_the_loss_takes_what_transformers_takes(num_items):
    model, inputs = tiny("Llama").train(), rows()
    mine = patched(model)
    shifted = torch.randint(0, 61, (2, 9))
    for arguments in ({"num_items_in_batch": num_items}, {"shift_labels": shifted}, {"ignore_index": 7}):
        got, want = mine(**inputs, **arguments), model(**inputs, **arguments)
        assert torch.allclose(got.loss, want.loss, rtol=1e-6)
        assert got.logits is None
    assert torch.allclose(mine(**inputs, return_dict=False)[0], model(**inputs).loss)
    assert torch.equal(mine.eval()(**inputs).logits, mine(inputs["input_ids"]).logits)


def test_fp16_gradients_survive_as_far_as_a_grad_scaler_lets_them():
    """Of 4 million tokens each has gradients below the smallest fp16 number until the loss is scaled up."""
    model, inputs = tiny("Llama").train(), packed() | {"num_items_in_batch": 2**22}
    gradients = []
    for m in (model, patched(model)):
        m.zero_grad()
        with torch.autocast("cpu", torch.float16):
            output = m(**inputs)
        (2.0**22 * output.loss).backward()
        gradients.append({name: p.grad for name, p in m.named_parameters()})
    assert output.logits is None
    assert max(distances(gradients[1], gradients[0]).values()) < 1e-2


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_a_batch_without_targets_teaches_nothing(num_items):
    """transformers divides 0 by 0 here."""
    model, inputs = patched(tiny("Llama")).train(), rows()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs, num_items_in_batch=num_items).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_the_activation_of_an_mlp_is_not_saved():
    mlp, saved = tiny("Llama").model.layers[0].mlp, {}
    mine = patched(tiny("Llama")).model.layers[0].mlp
    x = torch.randn(3, 5, 32, requires_grad=True)
    for m in (mlp, mine):
        with saved_tensors_hooks(lambda t, m=m: saved.setdefault(m, []).append(t) or t, lambda t: t):
            m(x)
    rows = {m: sum(t.numel() for t in tensors if t.numel() % 15 == 0) for m, tensors in saved.items()}
    assert rows[mine] == 15 * (32 + 2 * 40)  # x, [gate | up]
    assert rows[mlp] > rows[mine]


class Quantised(torch.Tensor):
    """Stands for torchao's weights in a plain nn.Linear."""


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_weights_of_another_class_are_multiplied_by_their_own_module(name):
    model, inputs, calls = tiny("Llama"), packed(), []
    for m in (mine := copy.deepcopy(model), model):
        linear = getattr(m.model.layers[0].mlp, name)
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    assert ("weight of another class" in str(patch(mine))) == (name == "gate_proj")
    forward = nn.Linear.forward
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(nn.Linear, "forward", lambda *args: calls.append(args[0]) or forward(*args))
        got = results(mine, inputs)
    assert getattr(mine.model.layers[0].mlp, name) in calls
    assert_close(got, results(model, inputs))


def test_where_logits_are_needed_they_are_computed():
    model, inputs = tiny("Llama").train(), rows()
    mine = patched(model)
    assert mine(inputs["input_ids"]).logits.shape == (2, 9, 61)
    mine.loss_function = lambda logits, labels, **_: logits.square().mean()
    output = mine(**inputs)
    assert torch.allclose(output.loss, output.logits.square().mean())
    assert patched(model, loss=False)(**inputs).logits is not None


def test_router_logits_and_auxiliary_loss():
    model, inputs = tiny("Mixtral").train(), padded()
    for arguments in ({"output_router_logits": True}, {}):
        got, want = patched(model)(**inputs, **arguments), model(**inputs, **arguments)
        assert torch.allclose(got.loss, want.loss, rtol=1e-6)
    got, want = patched(model)(**inputs, output_router_logits=True), model(**inputs, output_router_logits=True)
    assert torch.allclose(got.aux_loss, want.aux_loss, rtol=1e-6)
    for mine, theirs in zip(got.router_logits, want.router_logits, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_hidden_states_and_attention_weights():
    model, inputs = tiny("Llama", attn_implementation="eager").train(), rows()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    got, want = patched(model)(**inputs, **wanted), model(**inputs, **wanted)
    for name in ("hidden_states", "attentions"):
        for mine, theirs in zip(getattr(got, name), getattr(want, name), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)


ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "dynamic": {"factor": 2.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8},
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_rope_of_every_type(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPES[rope_type]}
    model, inputs = tiny("Llama", rope_parameters=rope, max_position_embeddings=8), rows()
    assert_close(results(patched(model), inputs), results(copy.deepcopy(model), inputs))


OPTIONS = ["rms_norm", "rope", "swiglu", "attention", "loss", "moe"]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_alone(option):
    model, inputs = tiny("Mixtral" if option == "moe" else "Qwen3"), packed()
    mine = copy.deepcopy(model)
    report = patch(mine, **{name: name == option for name in OPTIONS})
    done = {kernel for kernel, _, reason in report.rows if reason is None}
    assert done == {
        "rms_norm": {"rms_norm", "add_rms_norm"},
        "loss": {"linear_cross_entropy"},
        "moe": {"moe_experts"},
    }.get(option, {option})
    assert f"not replaced: {next(name for name in OPTIONS if name != option)}=False" in str(report)
    assert_close(results(mine, inputs), results(model, inputs))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("order", ["patch last", "patch first"])
def test_lora(targets, order):
    model, inputs = tiny("Llama"), packed()
    lora = LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"], init_lora_weights=False)
    torch.manual_seed(1)
    want = get_peft_model(copy.deepcopy(model), lora)
    mine = copy.deepcopy(model if order == "patch first" else want)
    report = patch(mine)
    if order == "patch first":
        torch.manual_seed(1)
        mine = get_peft_model(mine, lora)
    else:
        assert "lm_head is a peft" in str(report)
        assert ("gate_proj is a peft" in str(report)) == (targets == "all-linear")
    assert_close(results(mine, inputs), results(want, inputs))


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one state per process, and whoever trained before in it has set the precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_wraps_a_patched_model_and_unwraps_it(fresh_accelerate):
    model, inputs = patched(tiny("Llama")), rows()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    assert prepared.train()(**inputs).logits is None
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain.train()(**inputs).logits is None
    unpatch(plain)
    assert "forward" not in vars(plain)
    with pytest.raises(ValueError, match="another forward in the model itself"):
        patch(accelerator.prepare(tiny("Llama")))


def test_columns_of_a_dataset_are_read_off_the_signature():
    model = tiny("Mixtral")
    assert inspect.signature(patched(model).forward) == inspect.signature(model.forward)


def test_the_report_says_who_computed_the_attention():
    model = tiny("Llama").train()
    report = patch(model)
    for batch in (packed(), padded(), padded(), {**rows(), "attention_mask": torch.ones(2, 9)}, rows()):
        model(**batch)
    model.eval()(**rows(), use_cache=True)
    assert report.calls == {"steep": 3, "padding": 2, "a key-value cache": 1}
    lines = str(report).splitlines()
    assert lines[1].split() == ["kernel", "modules", "count"]
    assert ["attention", "model.layers.*.self_attn", "2"] in [line.split() for line in lines]
    assert lines[-2].split() == ["2", "transformers:", "padding"]


def test_what_cannot_be_replaced_is_named_and_left_alone():
    model, inputs = tiny("Llama", hidden_act="gelu", mlp_bias=True), rows()
    mine = copy.deepcopy(model)
    assert "gate_proj is an nn.Linear with a bias" in str(patch(mine))
    assert_close(results(mine, inputs), results(model, inputs))
    assert "the activation is gelu" in str(patch(tiny("Qwen2", hidden_act="gelu")))
    classifier = tiny("Llama", "ForSequenceClassification")
    report = patch(classifier)
    assert not any(kernel == "linear_cross_entropy" for kernel, _, _ in report.rows)
    assert patch(tiny("Qwen3", "Model")).rows


def test_attention_dropout_stays_what_it_was():
    model, inputs = tiny("Llama", attention_dropout=0.5).train(), rows()
    mine = copy.deepcopy(model)
    report = patch(mine)
    torch.manual_seed(3)
    want = model(**inputs).loss
    torch.manual_seed(3)
    assert torch.allclose(mine(**inputs).loss, want, rtol=1e-5)
    assert report.calls == {"attention dropout": 1}


def test_unsupported_models_are_refused():
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is not supported.*Llama, Mistral, Qwen2, Qwen3, Mixtral"):
        patch(gemma)
    with pytest.raises(ValueError, match="Linear is not supported"):
        patch(nn.Linear(2, 2))
    model = tiny("Llama")
    patch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    unpatch(model)
    unpatch(model)
    model._tp_size = 2
    with pytest.raises(ValueError, match="tensor parallel"):
        patch(model)
