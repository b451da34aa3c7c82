"""Start-up self-test of the GPU backends of attention.py: none is used that hangs, crashes or disagrees.

Each candidate is tried in a process of its own, `python -m steep.kernels.attention_selftest NAME DEVICE`: a kernel
that never returns is killed with it, an illegal memory access spoils no one else's CUDA context, and a package that
aborts at import takes nothing along. There it must agree with `attention_reference` on small packed batches (GQA,
windows, cached keys, documents of one token and of none, head dimensions 64 and 128, views of a fused projection) and
give the same bits twice. The verdict is kept in the user's cache folder until a version, the GPU or this code changes,
and found there by the other ranks of a node, which wait for the first. May touch: that folder, child processes,
environment variables.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .attention import MODULES, attention_reference, load_backend

SECONDS = 300  # FlashAttention-4 compiles its kernels meanwhile
_PASSED = "steep: this attention backend passed its self-test"
_NO_DEVICE, _NO_IMPORT = 3, 4  # exit statuses: the child could not use the GPU at all; the package cannot be imported


# --- choice ----------------------------------------------------------------------------------------------------------


def select_backend(candidates: Sequence[str], device: torch.device) -> str:
    """The first candidate that is installed and passes; each that fails is named, with the reason, in a warning."""
    for name in candidates:
        if not _installed(name):
            continue
        complaint = _verdict(name, device)
        if complaint is None:
            return name
        warnings.warn(f"attention backend {name} is passed over: {complaint}", RuntimeWarning, stacklevel=2)
    raise RuntimeError(
        f"no attention backend works on {device}; the warnings above say why each was passed over "
        "(STEEP_ATTENTION=name takes one untested)"
    )


def _installed(name: str) -> bool:
    """Whether the backend's package is there, without importing any of it: that is left to the child."""
    if name not in MODULES:
        return True
    package, *inner = MODULES[name].split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    if inner:  # FlashAttention-4 lives in a folder of FlashAttention-2's package, alone or beside it
        return any(Path(folder, inner[0]).is_dir() for folder in spec.submodule_search_locations or ())
    return spec.origin is not None


def _verdict(name: str, device: torch.device) -> str | None:
    """None, or what is wrong with the backend: from the cache, else from a child that is started now."""
    with _cache_folder() as folder:
        versions = _versions(name, device)
        file = folder and folder / f"attention-{name}-{_digest(*versions.values())}.json"
        if file is not None:
            with suppress(OSError, ValueError, KeyError):
                return json.loads(file.read_text())["complaint"]
        status, complaint = _run_child(name, device)
        if status == _NO_DEVICE:  # a GPU that admits one process only, or is full: the test is run in this one
            return _guarded_self_test(name, device)
        if file is not None and status != _NO_IMPORT:  # a broken installation may be mended
            if complaint is not None:
                complaint += f" (kept in {file}; delete it to test again)"
            with suppress(OSError):
                temporary = file.with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps({"backend": name, **versions, "complaint": complaint}))
                os.replace(temporary, file)
        return complaint


@contextmanager
def _cache_folder() -> Iterator[Path | None]:
    """The user's cache folder, locked against the other ranks; None where there is no place for one."""
    import fcntl  # not on Windows, where no GPU backend runs

    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steep"
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "attention.lock", "a")  # noqa: SIM115 - closed below
    except (OSError, RuntimeError):
        yield None
        return
    with lock:
        with suppress(OSError):  # a file system without locks: every rank tests for itself
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _digest(*parts: str) -> str:
    sources = (Path(__file__).with_name(name) for name in ("attention.py", "attention_triton.py", Path(__file__).name))
    return hashlib.sha256("\0".join([*parts, *map(Path.read_text, sources)]).encode()).hexdigest()[:16]


def _versions(name: str, device: torch.device) -> dict[str, str]:
    """What a verdict depends on, besides the code here."""
    module = MODULES.get(name, "triton").partition(".")[0]
    distributions = sorted(set(importlib.metadata.packages_distributions().get(module, ())))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": " ".join(f"{package} {importlib.metadata.version(package)}" for package in distributions),
    }


def _run_child(name: str, device: torch.device) -> tuple[int | None, str | None]:
    """(exit status, or None where it had to be killed; None if the backend passed, else what went wrong)."""
    command = [sys.executable, "-P", "-m", __spec__.name, name, str(device)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as log:
        # A session of its own: whatever the child starts is killed with it.
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return None, f"no result within {SECONDS} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                child.wait(10)
        log.seek(0)
        lines = log.read().decode(errors="replace").split("\n")
    if _PASSED in lines:
        return 0, None
    if child.returncode < 0:
        return child.returncode, f"the process that tried it was killed by {signal.Signals(-child.returncode).name}"
    said = next((line for line in reversed(lines) if line.strip()), f"exit status {child.returncode}")
    return child.returncode, said.strip()


# --- test ------------------------------------------------------------------------------------------------------------


_CASES = [  # head_dim, window, cached keys
    *((128, None, 0), (128, None, 9), (128, 1, 9), (128, 100, 0), (128, 100, 9)),
    *((64, None, 0), (64, 100, 9)),
]


def self_test(backend: Callable[..., torch.Tensor], device: torch.device) -> str | None:
    """None, or what is wrong with the backend on small packed batches."""
    for head_dim, window, cached in _CASES:
        complaint = _disagreement(backend, device, head_dim, window, cached)
        if complaint is not None:
            return f"{complaint} (head_dim {head_dim}, window {window}, {cached} cached keys)"
    return None


def _guarded_self_test(name: str, device: torch.device) -> str | None:
    try:
        return self_test(load_backend(name), device)
    except Exception as error:  # whatever a foreign package throws, the next backend is asked
        return f"{type(error).__name__}: {error}"


def _disagreement(
    backend: Callable[..., torch.Tensor], device: torch.device, head_dim: int, window: int | None, cached: int
) -> str | None:
    # One document is longer than any backend's tiles, so that sums run over several of them: in the same order?
    queries = torch.tensor([1, 37, 390, 70, 1, 0, 0])
    keys = queries + torch.tensor([0, 1, 1, 1, 1, 0, 0]) * cached
    cu_q, cu_k = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int().to(device) for n in (queries, keys))
    rows_q, rows_k = int(queries.sum()), int(keys.sum())
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, head_dim, generator=generator).bfloat16().to(device)

    if cached:
        q, (k, v) = random(rows_q, 4), random(rows_k, 4).split([2, 2], 1)
    else:
        q, k, v = random(rows_q, 8).split([4, 2, 2], 1)
    do, scale = random(rows_q, 4), head_dim**-0.5

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return backend(q, k, v, cu_q, cu_k if cached else None, 400, 400, window, scale)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_reference(q, k, v, cu_q, cu_k, window, scale)

    first, second = (_with_gradients(run, do, q, k, v) for _ in range(2))
    expected = _with_gradients(reference, *(x.float() for x in (do, q, k, v)))
    for name, got, again, want in zip(("o", "dq", "dk", "dv"), first, second, expected):
        error = ((got.float() - want).norm() / want.norm().clamp(min=1.0)).item()
        if not error < 0.02:
            return f"{name} differs from the reference by {error:.2g}"
        if not torch.equal(got, again):
            return f"{name} differs between two runs"
    return None


def _with_gradients(
    function: Callable[..., torch.Tensor], do: torch.Tensor, *inputs: torch.Tensor
) -> list[torch.Tensor]:
    with torch.enable_grad():
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        o = function(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def main(name: str, device: str) -> None:
    """The child: prints that the backend passed, or ends with what is wrong as the last line."""
    signal.alarm(SECONDS + 10)  # should the parent be gone by then
    try:
        torch.ones(1, device=device).add_(1).cpu()
    except RuntimeError:
        sys.exit(_NO_DEVICE)
    try:
        complaint = self_test(load_backend(name), torch.device(device))
    except torch.OutOfMemoryError:
        sys.exit(_NO_DEVICE)
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(_NO_IMPORT)
    if complaint is not None:
        sys.exit(complaint)
    print(f"\n{_PASSED}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
