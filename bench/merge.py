"""Merging against mergekit on synthetic llama models: wall time and peak memory of whole processes.

Both programs get the same YAML (bf16 in, bf16 out, mergekit's defaults) and the same files, which are in the page cache
before each run as far as memory allows; they take turns. Models are written to a temporary folder and removed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ..engine.safetensors_io import SafetensorsWriter

# hidden, intermediate, layers, heads, key-value heads, vocabulary; heads not tied
SIZES = {
    "0.03B": (512, 1408, 6, 8, 4, 8_192),
    "0.3B": (1024, 2816, 20, 16, 4, 32_000),
    "1.5B": (1536, 8960, 28, 12, 2, 100_000),
    "7B": (4096, 14336, 32, 32, 8, 32_000),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": {"base": {"weight": 1}, "a": {"weight": 1}, "b": {"weight": 1}}},
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": {"base": {}, "a": {}},
        "parameters": {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}]},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": {"a": {"weight": 0.7}, "b": {"weight": 0.3}},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": {"a": {"weight": 0.7, "density": 0.5}, "b": {"weight": 0.3, "density": 0.5}},
    },
}
STEEP = "import sys; from steep.merge import merge; merge(sys.argv[1], sys.argv[2])"
PROGRAMS = {
    "mergekit": [sys.executable, "-m", "mergekit.scripts.run_yaml", "--no-copy-tokenizer", "--quiet"],
    "steep": [sys.executable, "-c", STEEP],
}


def run(
    size: str = "0.3B",
    methods: tuple[str, ...] = tuple(CONFIGS),
    repeats: int = 1,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Time both programs.

    Args:
        size: one of SIZES.
        methods: of linear (3 models), slerp (2), task_arithmetic and ties (base + 2, density 0.5).
        repeats: runs per program; the fastest counts, all are returned.
        folder: where the models are written, four times the size in bf16; default: the system's temporary folder.

    Returns:
        {"size", "values", methods: {method: {program: {"seconds": [...], "peak_rss_bytes", "peak_anonymous_bytes"},
        "speedup", "memory_ratio"}}}. peak_rss counts pages of mapped files too (mergekit maps its inputs);
        peak_anonymous does not, and is sampled every 50 ms.
    """
    if size not in SIZES:
        raise ValueError(f"size: {size!r}; allowed: {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="steep-bench-merge-") as temporary:
        root = Path(temporary)
        values = _write_models(root, SIZES[size])
        figures = {method: _compare(root, method, repeats) for method in methods}
    return {"size": size, "values": values, "threads": torch.get_num_threads(), "methods": figures}


def _compare(root: Path, method: str, repeats: int) -> dict[str, Any]:
    config = CONFIGS[method] | {"dtype": "bfloat16"}
    config["models"] = [
        {"model": str(root / name), "parameters": parameters} for name, parameters in CONFIGS[method]["models"].items()
    ]
    if "base_model" in config:
        config["base_model"] = str(root / config["base_model"])
    path = root / f"{method}.yml"
    path.write_text(yaml.safe_dump(config))
    found: dict[str, Any] = {name: {"seconds": [], "peak_rss_bytes": 0, "peak_anonymous_bytes": 0} for name in PROGRAMS}
    for _ in range(repeats):
        for name, command in PROGRAMS.items():
            _read_through(root)
            out = root / "out"
            seconds, resident, anonymous = _measure([*command, str(path), str(out)])
            subprocess.run(["rm", "-r", str(out)], check=True)
            found[name]["seconds"].append(round(seconds, 2))
            found[name]["peak_rss_bytes"] = max(found[name]["peak_rss_bytes"], resident)
            found[name]["peak_anonymous_bytes"] = max(found[name]["peak_anonymous_bytes"], anonymous)
    theirs, ours = found["mergekit"], found["steep"]
    found["speedup"] = round(min(theirs["seconds"]) / min(ours["seconds"]), 2)
    found["memory_ratio"] = round(ours["peak_anonymous_bytes"] / theirs["peak_anonymous_bytes"], 3)
    return found


def _measure(command: list[str]) -> tuple[float, int, int]:
    """Wall seconds, peak resident bytes and peak anonymous bytes of a process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        anonymous = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, _anonymous_bytes(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{text[-2000:]}")
    return seconds, usage.ru_maxrss * 1024, anonymous


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # a process that has just ended


def _read_through(root: Path) -> None:
    for file in sorted(root.glob("*/*.safetensors")):
        with open(file, "rb") as stream:
            while stream.read(1 << 24):
                pass


def _write_models(root: Path, size: tuple[int, ...]) -> int:
    """base, a and b: bf16 in two shards or more; a and b differ from the base in 70 % of the elements."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    kv = hidden // heads * kv_heads
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
            }.items()
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    specs = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    for number, name in enumerate(("base", "a", "b")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        with SafetensorsWriter(root / name, specs, max_shard_bytes=values) as writer:
            for index, (tensor, shape) in enumerate(shapes.items()):
                _write_tensor(writer, tensor, torch.Size(shape).numel(), index, number)
    return values


def _write_tensor(writer: SafetensorsWriter, name: str, numel: int, index: int, model: int) -> None:
    step = 1 << 22
    for lo in range(0, numel, step):
        count = min(step, numel - lo)
        values = 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(hash((index, lo, 0))))
        if model:
            generator = torch.Generator().manual_seed(hash((index, lo, model)))
            delta = 1e-3 * torch.randn(count, generator=generator)
            values += delta * (torch.rand(count, generator=generator) < 0.7)
        writer.write_range(name, lo, values.bfloat16())
