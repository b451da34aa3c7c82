"""Merging against mergekit on synthetic Qwen2 models: wall time, processor time and peak memory of whole processes.

Both programs get the same YAML (bf16 in, bf16 out, mergekit's defaults) and the same files; they take turns with a
plain copy of the same bytes: every input read, as much written as the result has, made durable. Inputs are in the page
cache as far as memory allows. Models are written to a temporary folder and removed.

Floor of a merge: bytes in / read rate + bytes out / write rate, which the copy measures, or, on p processors, 1 / p of
the work: SHA-256 of all bytes in and out, conversions, arithmetic.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.files import usable_cores
from ..engine.safetensors_io import SafetensorsFolder, SafetensorsWriter

# hidden, intermediate, layers, heads, key-value heads, vocabulary, head tied to the embedding
SIZES = {
    "0.03B": (512, 1408, 6, 8, 4, 8_192, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
}
_WEIGHTS = {"a": {"weight": 0.7}, "b": {"weight": 0.3}}
_THINNED = {name: entry | {"density": 0.5} for name, entry in _WEIGHTS.items()}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"models": {"base": {"weight": 1}, "a": {"weight": 1}, "b": {"weight": 1}}},
    "slerp": {
        "base_model": "base",
        "models": {"base": {}, "a": {}},
        "parameters": {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}]},
    },
    "task_arithmetic": {"base_model": "base", "models": _WEIGHTS},
    "ties": {"base_model": "base", "models": _THINNED},
    "dare_ties": {"base_model": "base", "models": _THINNED},
    "della": {"base_model": "base", "models": _THINNED},
}
STEEP = "import sys; from steep.merge import merge; merge(sys.argv[1], sys.argv[2])"
COPY = """
import os, sys
buffer = memoryview(bytearray(1 << 24))
with open(sys.argv[1], "wb", buffering=0) as out:
    for number, file in enumerate(sys.argv[2:]):
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                if file.startswith(sys.argv[2].rsplit("/", 1)[0] + "/"):
                    out.write(buffer[:count])
    os.fsync(out.fileno())
"""


def run(
    size: str = "1.5B",
    methods: tuple[str, ...] = tuple(CONFIGS),
    repeats: int = 1,
    folder: str | Path | None = None,
    peer: bool = True,
) -> dict[str, Any]:
    """Time both programs and the copy.

    Args:
        size: one of SIZES.
        methods: of linear (3 models), slerp (2), task_arithmetic, ties, dare_ties and della (base + 2, density 0.5).
        repeats: rounds of copy, steep, mergekit; the fastest of each counts, all are returned.
        folder: where the models are written, four times the size in bf16; default: the system's temporary folder.
        peer: whether mergekit takes part.

    Returns:
        {"size", "values", "cores", methods: {method: {program: {"seconds": [...], "cpu_seconds": [...],
        "peak_rss_bytes", "peak_anonymous_bytes"}, "load": [...], "of_copy", "of_mergekit"}}}. peak_rss counts pages of
        mapped files too (mergekit maps its inputs), peak_anonymous does not; both sampled every 50 ms. `load` is the
        system's load average before each round: other work on the machine shows in it.
    """
    if size not in SIZES:
        raise ValueError(f"size: {size!r}; allowed: {', '.join(SIZES)}")
    if unknown := [method for method in methods if method not in CONFIGS]:
        raise ValueError(f"methods: {unknown[0]!r}; allowed: {', '.join(CONFIGS)}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="steep-bench-merge-") as temporary:
        root = Path(temporary)
        values = write_models(root, size)
        figures = {method: _compare(root, method, repeats, peer) for method in methods}
    return {"size": size, "values": values, "cores": usable_cores(), "methods": figures}


def _compare(root: Path, method: str, repeats: int, peer: bool) -> dict[str, Any]:
    path, models = _write_config(root, method)
    out = root / "out"
    files = [str(file) for model in models for file in SafetensorsFolder(model).files]
    mergekit = [
        sys.executable,
        "-m",
        "mergekit.scripts.run_yaml",
        "--no-copy-tokenizer",
        "--quiet",
        str(path),
        str(out),
    ]
    programs = {
        "copy": [sys.executable, "-c", COPY, str(out), *files],
        "steep": [sys.executable, "-c", STEEP, str(path), str(out)],
    } | ({"mergekit": mergekit} if peer else {})
    found: dict[str, Any] = {
        name: {"seconds": [], "cpu_seconds": [], "peak_rss_bytes": 0, "peak_anonymous_bytes": 0} for name in programs
    }
    found["load"] = []
    for _ in range(repeats):
        found["load"].append(round(os.getloadavg()[0], 2))
        for name, command in programs.items():
            _read_through(files)
            seconds, cpu_seconds, resident, anonymous = _measure(command)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            os.sync()
            entry = found[name]
            entry["seconds"].append(round(seconds, 2))
            entry["cpu_seconds"].append(round(cpu_seconds, 2))
            entry["peak_rss_bytes"] = max(entry["peak_rss_bytes"], resident)
            entry["peak_anonymous_bytes"] = max(entry["peak_anonymous_bytes"], anonymous)
    best = {name: min(found[name]["seconds"]) for name in programs}
    found["of_copy"] = round(best["steep"] / best["copy"], 2)
    if peer:
        found["of_mergekit"] = round(best["steep"] / best["mergekit"], 3)
    return found


def _write_config(root: Path, method: str) -> tuple[Path, list[Path]]:
    """The YAML of a method, and the folders of the models that it reads, the base or the first model first."""
    written = CONFIGS[method]
    names = list(dict.fromkeys([*([written["base_model"]] if "base_model" in written else []), *written["models"]]))
    config = {"merge_method": method, "dtype": "bfloat16"} | written
    config["models"] = [
        {"model": str(root / name), "parameters": parameters} for name, parameters in written["models"].items()
    ]
    if "base_model" in config:
        config["base_model"] = str(root / config["base_model"])
    path = root / f"{method}.yml"
    path.write_text(yaml.safe_dump(config))
    return path, [root / name for name in names]


def _measure(command: list[str]) -> tuple[float, float, int, int]:
    """Wall seconds, processor seconds, peak resident bytes and peak anonymous bytes of a process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        resident = anonymous = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            memory = _memory(process.pid)
            resident, anonymous = max(resident, memory["VmHWM"]), max(anonymous, memory["RssAnon"])
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise RuntimeError(f"{' '.join(command[:4])}: exit code {process.returncode}\n{text[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, resident, anonymous


def _memory(pid: int) -> dict[str, int]:
    """Peak resident and present anonymous bytes. Not ru_maxrss, which a child process inherits from its parent."""
    found = {"VmHWM": 0, "RssAnon": 0}  # a process that has just ended has none
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found


def _read_through(files: list[str]) -> None:
    buffer = memoryview(bytearray(1 << 24))
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def write_models(root: Path, size: str) -> int:
    """base, a and b, bf16 in shards; a and b differ from the base in 70 % of the elements. The number of values."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[size]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    shapes = _shapes(hidden, intermediate, layers, hidden // heads * kv_heads, vocabulary, tied)
    specs = [(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    for number, name in enumerate(("base", "a", "b")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        with SafetensorsWriter(root / name, specs, max_shard_bytes=min(values, 5_000_000_000)) as writer:
            for index, (tensor, shape) in enumerate(shapes.items()):
                _write_tensor(writer, tensor, torch.Size(shape).numel(), index, number)
    return values


def _shapes(
    hidden: int, intermediate: int, layers: int, kv: int, vocabulary: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden,),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (hidden, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (vocabulary, hidden)}


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
