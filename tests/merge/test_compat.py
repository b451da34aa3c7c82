"""`compat: mergekit-0.1.5` against mergekit 0.1.5: the same bits, for every method, on four kinds of tiny models.

mergekit merges all cases in one subprocess, with the seed that the YAML has for steep. bf16 models are merged under
`dtype: bfloat16`, so that arithmetic, weights and masks are bf16 in mergekit; float32 models in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.merge import merge, parse_config, plan_merge, read_yaml
from steep.merge.compat import MERGEKIT, MergekitMerge
from steep.merge.tensor_merge import Subject
from tests.merge.models import bits, read_model, sibling, write_model, write_yaml
from tests.merge.test_mergekit import _absolute

pytest.importorskip("mergekit")
pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, INTERMEDIATE, VOCAB, HEADS, LAYERS, EXPERTS = 16, 24, 40, 2, 2, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HIDDEN // HEADS,
    "num_hidden_layers": LAYERS,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
    },
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def shapes(kind: str, vocab: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        attention = {"q": (HIDDEN, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, HIDDEN)}
        found |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        if kind == "qwen2":
            found |= {f"{prefix}self_attn.{name}_proj.bias": attention[name][:1] for name in "qkv"}
        found |= {prefix + "input_layernorm.weight": (HIDDEN,), prefix + "post_attention_layernorm.weight": (HIDDEN,)}
        up, down = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
        if kind == "mixtral":
            found[prefix + "block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                names = [f"{prefix}block_sparse_moe.experts.{expert}.w{number}.weight" for number in (1, 2, 3)]
                found |= dict(zip(names, (up, down, up), strict=True))
        else:
            found |= {f"{prefix}mlp.{name}_proj.weight": up for name in ("gate", "up")}
            found[prefix + "mlp.down_proj.weight"] = down
    found["model.norm.weight"] = (HIDDEN,)
    return found if kind == "qwen2" else found | {"lm_head.weight": (vocab, HIDDEN)}


def random_models(kind: str, vocab: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {
        name: 0.02 * torch.randn(shape, generator=generator) + ("norm" in name)
        for name, shape in shapes(kind, vocab).items()
    }
    siblings = {"a": sibling(base, 1), "b": sibling(base, 2), "far": sibling(base, 3, 0.02)}
    return {"base": base, **siblings, "farther": sibling(base, 4, 0.03)}


def merged(method: str, models: str, base: str | None = None, *weights: Any, **shared: Any) -> dict[str, Any]:
    """A configuration; `models` are names separated by spaces, each with one of the weights, if there are any."""
    entries: list[dict[str, Any]] = [{"model": name} for name in models.split()]
    for entry, weight in zip(entries, weights):
        entry["parameters"] = {"weight": weight}
    return {"merge_method": method, "models": entries, "parameters": shared} | ({"base_model": base} if base else {})


def thinned(method: str, **shared: Any) -> dict[str, Any]:
    return merged(method, "a b", "base", 0.7, 0.4, **shared)


def sliced(method: str, *slices: list[tuple[str, int, int]], base: str | None = None, **shared: Any) -> dict[str, Any]:
    written = [
        {"sources": [{"model": model, "layer_range": [first, last]} for model, first, last in sources]}
        for sources in slices
    ]
    return {"merge_method": method, "slices": written, "parameters": shared} | ({"base_model": base} if base else {})


GRADIENT = [
    {"filter": "self_attn", "value": [0.1, 0.9]},
    *({"filter": name, "value": [0.8, 0.3]} for name in ("mlp", "block_sparse_moe")),  # Mixtral's, in either program
    {"value": 0.45},
]
CASES: dict[str, dict[str, Any]] = {
    "linear": merged("linear", "base a b", None, 0.5, 0.7, 0.3),
    "linear_with_a_base": merged("linear", "a far", "base", 0.7, 0.3, weight=0.25),
    "linear_not_normalized": merged("linear", "far a", None, GRADIENT, -0.413, normalize=False),
    "slerp": merged("slerp", "base far", "base", t=0.3),
    "slerp_of_siblings": merged("slerp", "a", "base", t=0.6),
    "slerp_gradient": sliced("slerp", [("far", 0, 2), ("base", 0, 2)], base="base", t=GRADIENT),
    "nuslerp": merged("nuslerp", "base far", None, 0.7, 0.4),
    "nuslerp_of_task_vectors": merged("nuslerp", "a far", "base", 0.7, 0.4),
    "nuslerp_rows": merged("nuslerp", "a far", None, 0.3, 0.8, nuslerp_flatten=False),
    "nuslerp_columns": merged("nuslerp", "a far", "base", 0.3, 0.8, nuslerp_flatten=False, nuslerp_row_wise=True),
    "multislerp": merged("multislerp", "base far farther", None, 0.7, 0.4, 0.2),
    "multislerp_of_task_vectors": merged("multislerp", "a far", "base", 0.7, 0.4, normalize_weights=False),
    "karcher": merged("karcher", "base far farther"),
    "karcher_few_steps": merged("karcher", "far farther", max_iter=1),
    "model_stock": merged("model_stock", "far farther a", "base"),
    "model_stock_rows": merged("model_stock", "far farther", "base", filter_wise=True),
    "task_arithmetic": merged("task_arithmetic", "a b far", "base", 0.7, 0.3, 0.1, **{"lambda": 0.8}),
    "task_arithmetic_normalized": merged("task_arithmetic", "a base b", "base", GRADIENT, weight=0.4, normalize=True),
    "ties": thinned("ties", density=0.5),
    "ties_not_normalized": thinned("ties", density=0.8, normalize=False, int8_mask=True, **{"lambda": 1.2}),
    "ties_sparse": thinned("ties", density=0.01),
    "ties_rescaled": thinned("ties", density=0.3, rescale=True),
    "ties_gradient": merged("ties", "a b far", "base", GRADIENT, 0.6, -0.2, density=[0.9, 0.2], normalize=True),
    "dare_linear": thinned("dare_linear", density=0.4),
    "dare_linear_normalized": thinned("dare_linear", density=GRADIENT, normalize=True),
    "dare_ties": merged("dare_ties", "b far a", "base", 0.7, 0.4, 0.3, density=0.6, normalize=True),
    "dare_not_rescaled": thinned("dare_ties", density=0.3, rescale=False, **{"lambda": 1.4}),
    "della": thinned("della", density=0.5),
    "della_linear": thinned("della_linear", density=0.3, epsilon=0.2),
    "breadcrumbs": thinned("breadcrumbs", density=0.5, gamma=0.1),
    "breadcrumbs_default": thinned("breadcrumbs", density=0.9),
    "breadcrumbs_ties": thinned("breadcrumbs_ties", density=0.4, gamma=0.05, normalize=True, rescale=True),
    "sce": merged("sce", "far farther", "base"),
    "sce_selected": merged("sce", "far farther", "base", select_topk=0.3),
    "ram": merged("ram", "a b", "base"),
    "ramplus_tl": merged("ramplus_tl", "a b", "base", r=0.3, alpha=0.7),
    "nearswap": merged("nearswap", "a", "base", t=1e-3),
    "arcee_fusion": merged("arcee_fusion", "far", "base"),
    "passthrough": merged("passthrough", "a", scale=0.3),
    "stacked": sliced("passthrough", [("a", 0, 2)], [("b", 1, 2)], [("a", 1, 2)]),
    "sliced_dare": sliced(
        "dare_ties", [("a", 0, 1), ("base", 0, 1)], [("b", 1, 2), ("base", 1, 2)], base="base", weight=0.8, density=0.5
    ),
}


@dataclass(frozen=True)
class Run:
    """Cases on one set of models. stored: their dtype. others: of those that have another. keys: of the YAML."""

    kind: str
    stored: torch.dtype
    keys: dict[str, Any]
    cases: tuple[str, ...]
    others: dict[str, torch.dtype] = field(default_factory=dict)
    vocab: int = VOCAB


# mergekit writes no configuration for a stack of Qwen2 layers: it leaves `layer_types` as long as it was
OF_KIND = {kind: tuple(case for case in CASES if (kind, case) != ("qwen2", "stacked")) for kind in KINDS}
SOME = (
    "linear",
    "slerp",
    "nuslerp",
    "karcher",
    "ties",
    "dare_ties",
    "della",
    "sce_selected",
    "arcee_fusion",
    "nearswap",
)
RUNS = {f"{kind}_bf16": Run(kind, BF16, {"dtype": "bfloat16"}, OF_KIND[kind]) for kind in KINDS}
RUNS |= {f"{kind}_fp32": Run(kind, FP32, {}, OF_KIND[kind]) for kind in KINDS}
RUNS |= {
    "fp16": Run("llama", FP16, {}, SOME),
    "mixed": Run("llama", BF16, {}, SOME, {"a": FP32, "far": FP16}),
    "narrowed": Run("llama", FP32, {"dtype": "bfloat16", "out_dtype": "float16"}, SOME),
    "widened": Run("llama", BF16, {"dtype": "float32", "out_dtype": "bfloat16"}, SOME),
    # more than a million elements: sums in several pieces, quantiles of a sample
    "large_bf16": Run("llama", BF16, {}, SOME, vocab=66_000),
    "large_fp32": Run("llama", FP32, {}, SOME, vocab=66_000),
}
CASES_OF_RUNS = [(run, case) for run, of in RUNS.items() if of.kind != "mixtral" for case in of.cases]
DRAWN = [case for case in CASES if "dare" in case or "della" in case]
# of these no element depends on another, or none outside its row
BY_ROW = (
    *("linear", "linear_with_a_base", "linear_not_normalized", "task_arithmetic", "task_arithmetic_normalized"),
    *("nearswap", "ram", "passthrough", "stacked", "model_stock_rows", "nuslerp_rows"),
)
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """With the models and configurations of each run, and `steep/RUN/CASE` and `mergekit/RUN/CASE`."""
    folder = tmp_path_factory.mktemp("compat")
    jobs = []
    for name, run in RUNS.items():
        sizes = SIZES | KINDS[run.kind] | {"vocab_size": run.vocab}
        for model, tensors in random_models(run.kind, run.vocab).items():
            write_model(folder / name / model, tensors, dtype=run.others.get(model, run.stored), **sizes)
        for case in run.cases:
            config = CASES[case] | run.keys | {"random_seed": SEED, "compat": MERGEKIT}
            yaml_file = write_yaml(folder / name / f"{case}.yml", _absolute(config, folder / name))
            jobs.append([str(yaml_file), str(folder / "mergekit" / name / case)])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, Path(__file__).with_name("mergekit_oracle.py"), folder / "jobs.json"]
    with (folder / "log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        oracle = subprocess.Popen(command, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        patch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of folders that nobody needs tomorrow
        for yaml_file, theirs in jobs:
            merge(yaml_file, theirs.replace("/mergekit/", "/steep/"))
        assert oracle.wait(300) == 0, (folder / "log").read_text()[-3000:]
    return folder


def both(folder: Path, run: str, case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return read_model(folder / "steep" / run / case), read_model(folder / "mergekit" / run / case)


@pytest.mark.parametrize(("run", "case"), CASES_OF_RUNS)
def test_same_bits(folder: Path, run: str, case: str) -> None:
    ours, theirs = both(folder, run, case)
    assert ours.keys() == theirs.keys()
    assert_same_bits(ours, theirs, case)


def assert_same_bits(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], case: str) -> None:
    """mergekit writes float32 for two methods whatever the `dtype`; rounded to it the bits are the same."""
    if case in ("arcee_fusion", "ramplus_tl"):
        theirs = {name: x.to(ours[name].dtype) for name, x in theirs.items() if name in ours}
    assert not [name for name, x in ours.items() if x.dtype != theirs[name].dtype or bits(x) != bits(theirs[name])]


def fused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixtral's tensors as mergekit 0.1.5 writes them: all experts of a layer in two tensors."""
    found = {
        name.replace("block_sparse_moe.gate", "mlp.gate"): x for name, x in tensors.items() if ".experts." not in name
    }
    layers = dict.fromkeys(name.split("block_sparse_moe")[0] for name in tensors if ".experts." in name)
    for layer in layers:
        w1, w2, w3 = (
            [tensors[f"{layer}block_sparse_moe.experts.{expert}.w{number}.weight"] for expert in range(EXPERTS)]
            for number in (1, 2, 3)
        )
        found[layer + "mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3)])
        found[layer + "mlp.experts.down_proj"] = torch.stack(w2)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", ["mixtral_bf16", "mixtral_fp32"])
def test_same_bits_of_mixtral_outside_its_experts(folder: Path, run: str, case: str) -> None:
    """Of the experts too where a method looks at no more than a row. Masks are drawn in another order."""
    ours, theirs = both(folder, run, case)
    ours = fused(ours)
    assert ours.keys() == theirs.keys()
    if case not in DRAWN:
        assert_same_bits({n: x for n, x in ours.items() if case in BY_ROW or ".experts." not in n}, theirs, case)


@pytest.mark.parametrize("case", [case for case, written in CASES.items() if "models" in written])
@pytest.mark.parametrize("run", ["mixtral_bf16", "mixtral_fp32"])
def test_same_bits_of_mixtral_if_its_experts_were_fused(folder: Path, run: str, case: str) -> None:
    """mergekit's experts are another thing to merge, not merged otherwise: given the same tensors in the same order,
    the results are the same. Tensors that it converts have no name when it sorts, and follow each other as its hash
    table has them: here layer by layer, with three layers 2, 2, 0, 1, 1, 1, 2, 0, 0."""
    plan = plan_merge(parse_config(read_yaml(folder / run / f"{case}.yml")))
    planned = {tensor.name: tensor for tensor in plan.tensors}
    models = [fused(read_model(Path(label))) for label in plan.model_labels]
    theirs = read_model(folder / "mergekit" / run / case)
    generator = torch.Generator().manual_seed(SEED)
    converted = [name for name in models[0] if ".mlp." in name]
    converted.sort(
        key=lambda name: (name.split(".")[2], ["gate_up_proj", "down_proj", "weight"].index(name.split(".")[-1]))
    )
    found = {}
    for name in converted + sorted(theirs.keys() - converted):
        origin = name.replace("mlp.gate", "block_sparse_moe.gate")
        origin = origin.replace("mlp.experts.gate_up_proj", "block_sparse_moe.experts.0.w1.weight")
        tensor = planned[origin.replace("mlp.experts.down_proj", "block_sparse_moe.experts.0.w2.weight")]
        order = sorted(range(len(models)), key=lambda position: position != tensor.base)
        inputs = [models[tensor.sources[position].model][name] for position in order]
        names = tuple(map(str, range(len(inputs) - (tensor.base is not None))))
        subject = Subject(
            name, tuple(inputs[0].shape), tensor.parameters, names, SEED, torch.device("cpu"), tensor.base is not None
        )
        method = MergekitMerge(subject, tensor.operation, RUNS[run].stored, generator)
        found[name] = method.merge(0, [x.float().flatten() for x in inputs]).view(inputs[0].shape).to(RUNS[run].stored)
    assert_same_bits(found, theirs, case)
