"""docs/training.md and its Slurm script: every key exists, the table is what the plan says, the script runs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from steep.bench.models import MODELS
from steep.engine.config import ModelConfig
from steep.engine.gpus import find_gpu
from steep.engine.optimizer import AdamWConfig
from steep.engine.plan import Job, memory
from steep.engine.recipe import TrainRecipe

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "training.md").read_text()
SCRIPT = DOCS / "examples" / "train.slurm"

LEAST = AdamWConfig(master="none", moments="8bit", in_backward=True, max_grad_norm=None)
LEAST_TEXT = "selective, `master=none`, `moments=8bit`, `in_backward`"
ROWS = [  # model, GPU, options in words, the job
    ("qwen2.5-7b", "h200", "none", Job(16384)),
    ("qwen2.5-7b", "h200", "none", Job(16384, 4)),
    ("qwen2.5-7b", "h100", "selective", Job(8192, recompute="selective")),
    ("qwen2.5-7b", "h100", "none", Job(8192, 4, gpus=8)),
    ("mistral-small-24b", "h200", LEAST_TEXT, Job(8192, recompute="selective", optimizer=LEAST)),
    ("mistral-small-24b", "h200", "none, `offload`", Job(8192, optimizer=AdamWConfig(offload=True))),
    ("mistral-small-24b", "h100", "selective", Job(8192, 4, recompute="selective", gpus=8)),
    (
        *("mixtral-8x7b", "h100", "full, `moments=8bit`"),
        Job(8192, recompute="full", optimizer=AdamWConfig(moments="8bit"), gpus=8),
    ),
    ("mixtral-8x7b", "h100", "selective", Job(8192, 2, recompute="selective", gpus=16)),
    ("mixtral-8x7b", "h200", "selective", Job(8192, 4, recompute="selective", gpus=8)),
]


def table() -> str:
    names = ["weights", "optimizer state", "gradients", "activations", "all", "there is"]
    lines = [
        f"| model | GPUs | recompute and optimizer | tokens x micro batches a GPU | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for model, name, words, job in ROWS:
        gpu = find_gpu(name)
        needed = memory(ModelConfig.from_dict(MODELS[model]), job, gpu)
        kinds = needed.kinds
        sizes = [kinds[each] for each in names[:4]] + [needed.total, gpu.memory]
        cells = [model, f"{job.gpus} {name}", words, f"{job.tokens} x {job.micro_batches}"]
        lines.append(f"| {' | '.join(cells + [f'{size / 1e9:.0f}' for size in sizes])} |")
    return "\n".join(lines)


def test_the_table_is_what_the_plan_says():
    shown = TEXT.split("<!-- plan: begin -->\n")[1].split("\n<!-- plan: end -->")[0]
    assert shown.split("\n\n")[1] == table()


def lookup(key: str) -> object:
    """The field that a key such as parallel.replicas names."""
    model: type[BaseModel] = TrainRecipe
    field = None
    for part in key.split("."):
        field = model.model_fields[part]  # KeyError: no such key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return field


def test_every_key_in_the_docs_exists():
    words = re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", " ".join(re.findall(r"`([^`\n]+)`", TEXT)))
    keys = {word for word in words if word.split(".")[0] in TrainRecipe.model_fields and word != "model"}
    assert len(keys) > 20
    for key in keys - {"steps", "data", "out"}:
        lookup(key)
    tables = set(re.findall(r"^\| `([a-z_.]+)`", TEXT, re.MULTILINE)) | set(
        re.findall(r"^\| `([a-z_.]+)=", TEXT, re.MULTILINE)
    )
    assert len(tables) == 11
    for key in tables:
        lookup(key)
    for key, default in re.findall(r"^\| `([a-z_.]+)` \| (\S+) \|", TEXT, re.MULTILINE):
        assert str(lookup(key).default).removesuffix(".0").lower() == default
    with pytest.raises(KeyError):
        lookup("parallel.shards")


# --- the Slurm script ---


def test_the_script_is_valid():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    text = SCRIPT.read_text()
    assert all(f"--nodes {count}" in TEXT for count in (1, 2, 8))
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", text, re.MULTILINE)


# What Slurm and torchrun do, as far as the script needs it: srun starts one task, scancel signals it, torchrun starts
# one process that ends a moment after the signal, as a checkpoint takes time.
WAIT = "wait $!; status=$?; while kill -0 $! 2>/dev/null; do wait $!; status=$?; done; exit $status"
STUBS = {
    "scontrol": 'if [[ $1 == show ]]; then echo node1; else echo "$@" >> "$LOG"; fi',
    "srun": f'shift; "$@" & echo $! > "$LOG.task"; {WAIT}',
    "scancel": 'kill -USR1 "$(cat "$LOG.task")"',
    "torchrun": f'echo "torchrun $*" >> "$LOG"; "$PYTHON" "$LOG.worker" & {WAIT}',
}
WORKER = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    open(os.environ["LOG"], "a").write("checkpoint\\n")
    sys.exit(int(os.environ["STATUS"]))
signal.signal(signal.SIGUSR1, stop)
open(os.environ["LOG"] + ".up", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_whose_time_is_up_checkpoints_and_is_queued_again(tmp_path, status):
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    log = tmp_path / "log"
    Path(f"{log}.worker").write_text(WORKER)
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "STATUS": str(status)},
        "PYTHON": sys.executable,
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"},
    }
    command = ["bash", SCRIPT, "recipe.yaml", "schedule.lr=1e-5"]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path)
    while not Path(f"{log}.up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == status
    lines = log.read_text().splitlines()
    assert "--nnodes 2 --nproc-per-node 8" in lines[0]
    assert lines[0].endswith("-m steep.engine recipe.yaml schedule.lr=1e-5")
    assert lines[1] == "checkpoint"
    assert lines[2:] == (["requeue 7"] if status == 0 else [])
