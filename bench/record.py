"""A benchmark record: figures together with what is needed to believe and repeat them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data.files import atomic_write, usable_cores, versions

PEERS = ("transformers", "lm-eval", "mergekit", "flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")


def record(benchmark: str, figures: dict[str, Any], out: str | Path | None = None) -> dict[str, Any]:
    """The record of one benchmark run as a dict, also published as JSON at `out` if given.

    Fields: benchmark, figures, device, versions, command, commit (with `+changes` if the checkout is not clean; None
    outside a checkout), created (UTC).
    """
    result = {
        "benchmark": benchmark,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["steep", *sys.argv[1:]]),
        "commit": _commit(),
        "device": device(),
        "versions": versions(*PEERS),
        "figures": figures,
    }
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, json.dumps(result, indent=2) + "\n")
    return result


def device() -> dict[str, Any]:
    """What the figures were measured on: processor, usable cores, memory in bytes, and the GPUs if there are any."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that holds this file."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
