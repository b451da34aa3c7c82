"""Training step of steep against transformers, on the CPU, in fp32, on the same documents: tokens/s and peak memory.

Three loops, each in a process of its own, from the same weights:
    steep    Engine.forward_backward and step on packed sequences
    packed   transformers with sdpa and torch's fused AdamW on the same packed sequences [B, L]; position ids begin anew
             with every document, from which transformers builds a mask that keeps documents apart
    padded   the same transformers loop on the same documents one per row, padded to the longest row of a batch
All clip the gradient norm at 1 and decay weights alike. Tokens are targets of the loss, the same in all. Writes
to a temporary folder only.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..data import PackedBatch

LOOPS = ("steep", "packed", "padded")
LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, (0.9, 0.95), 0.1, 1.0

# SmolLM2-135M.
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def run(
    model: str | Path | None = None,
    text: str | Path | None = None,
    *,
    seq_len: int = 512,
    sequences: int = 4,
    threads: int = 2,
    warmup: int = 1,
    steps: int = 5,
    loops: tuple[str, ...] = LOOPS,
) -> dict[str, Any]:
    """Measure the loops and return the figures.

    Args:
        model: Hugging Face folder; None: random weights of SmolLM2-135M's shape.
        text: documents to train on (any file that `read_documents` reads; needs `model` for its tokenizer); None:
            random tokens in documents of log-normal length, median 150.
        seq_len, sequences: size of the packed batch of one step.
        threads: of torch. warmup, steps: steps before the measured ones, and those.

    Raises:
        ValueError: `text` without `model`, or too little text for the batches.
    """
    if text is not None and model is None:
        raise ValueError("text needs a model folder, for its tokenizer")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(model) if model is not None else _random_model(Path(temporary, "model"))
        documents = _read_documents(text, path, seq_len) if text is not None else _random_documents(path, seq_len)
        packed = _pack(documents, seq_len, (warmup + steps) * sequences)
        np.savez(Path(temporary, "documents.npz"), **packed)  # type: ignore[arg-type]
        settings = {"seq_len": seq_len, "sequences": sequences, "warmup": warmup, "steps": steps, "threads": threads}
        results = {loop: _in_own_process(loop, path, Path(temporary, "documents.npz"), settings) for loop in loops}

    figures: dict[str, Any] = {
        "model": str(model) if model is not None else "random weights of SmolLM2-135M's shape",
        "text": str(text) if text is not None else "random tokens, document lengths log-normal with median 150",
        **settings,
        "documents": len(packed["length"]),
        "document_length_median": float(np.median(packed["length"])),
        "padding_when_packed": 1 - len(packed["tokens"]) / ((warmup + steps) * sequences * seq_len),
        **results,
    }
    for other in results.keys() - {"steep"} if "steep" in results else ():
        ours, theirs = results["steep"], results[other]
        figures[f"steep_against_{other}"] = {
            "tokens_per_second_ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
            "peak_rss_ratio": ours["peak_rss_bytes"] / theirs["peak_rss_bytes"],
            "peak_rss_without_imports_ratio": ours["peak_rss_without_imports_bytes"]
            / theirs["peak_rss_without_imports_bytes"],
            "first_loss_difference": abs(ours["losses"][0] - theirs["losses"][0]),
        }
    return figures


# --- documents and batches ---


def _random_model(folder: Path) -> Path:
    """A Hugging Face folder with random weights of SHAPE."""
    import torch

    from ..engine import Decoder, ModelConfig, SafetensorsWriter
    from ..engine.weights import hf_tensors

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    with torch.device("meta"):
        placements = hf_tensors(Decoder(ModelConfig.from_dict(SHAPE)))
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder, [(name, torch.float32, each.shape) for name, each in placements.items()]) as writer:
        for name, each in placements.items():
            norm = len(each.shape) == 1
            writer.write(name, torch.ones(each.shape) if norm else torch.randn(each.shape, generator=generator) * 0.02)
    return folder


def _random_documents(model: Path, seq_len: int) -> Iterator[np.ndarray]:
    """Without end; no longer than a sequence."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    generator = np.random.default_rng(0)
    while True:
        length = int(np.clip(generator.lognormal(np.log(150), 0.8), 2, seq_len))
        yield generator.integers(0, vocab_size, length)


def _read_documents(text: str | Path, model: Path, seq_len: int) -> Iterator[np.ndarray]:
    """Documents of a file, the long ones in parts no longer than a sequence."""
    from ..data import Document, load_tokenizer, read_documents

    tokenizer = load_tokenizer(model)
    for document in read_documents(text):
        if isinstance(document, Document):
            ids = tokenizer.encode(document.text)
            for start in range(0, len(ids), seq_len):
                if len(ids) - start > 1:
                    yield np.array(ids[start : start + seq_len])


def _pack(documents: Iterator[np.ndarray], seq_len: int, num_seqs: int) -> dict[str, np.ndarray]:
    """`num_seqs` packed sequences in random order: tokens of their documents end to end, length of each document, and
    the documents in each sequence. ValueError if there are too few documents."""
    from ..data import pack_best_fit

    chosen: list[np.ndarray] = []
    missing = int(num_seqs * seq_len * 1.05)  # a little more, as the last sequences of a packing are not full
    for document in documents:
        chosen.append(document)
        missing -= len(document)
        if missing <= 0:
            break
    index = pack_best_fit(np.array([len(document) for document in chosen]), seq_len)
    if index.num_seqs < num_seqs:
        raise ValueError(f"text: {index.num_seqs} sequences of {seq_len} tokens; the measurement needs {num_seqs}")
    order = np.random.default_rng(1).permutation(index.num_seqs)[:num_seqs]
    pieces = [index.doc[index.seq_ptr[seq] : index.seq_ptr[seq + 1]] for seq in order]
    return {
        "tokens": np.concatenate([chosen[doc] for docs in pieces for doc in docs]),
        "length": np.array([len(chosen[doc]) for docs in pieces for doc in docs]),
        "docs_in_sequence": np.array([len(docs) for docs in pieces]),
    }


def _steps(documents: Path, sequences: int) -> list[list[list[np.ndarray]]]:
    """The documents of every sequence of every step."""
    packed = np.load(documents)
    docs = np.split(packed["tokens"], np.cumsum(packed["length"])[:-1])
    starts = np.cumsum([0, *packed["docs_in_sequence"]])
    filled = [docs[start:end] for start, end in zip(starts[:-1], starts[1:])]
    return [filled[first : first + sequences] for first in range(0, len(filled), sequences)]


def _packed_batch(step: list[list[np.ndarray]], seq_len: int) -> PackedBatch:
    """As `BatchLoader` lays a batch out."""
    from ..data import IGNORE, PackedBatch

    tokens = np.zeros(len(step) * seq_len, np.int64)
    labels = np.full(len(step) * seq_len, IGNORE, np.int64)
    cu_seqlens, source_ids = [], []
    for nth, docs in enumerate(step):
        at = nth * seq_len
        for doc in docs:
            tokens[at : at + len(doc)] = doc
            labels[at : at + len(doc) - 1] = doc[1:]
            cu_seqlens.append(at)
            source_ids.append(0)
            at += len(doc)
        if at < (nth + 1) * seq_len:
            cu_seqlens.append(at)
            source_ids.append(-1)
    bounds = np.array([*cu_seqlens, len(tokens)], np.int32)
    positions = np.arange(len(tokens), dtype=np.int32) - np.repeat(bounds[:-1], np.diff(bounds))
    sources, num_valid = np.array(source_ids, np.int32), int((labels != IGNORE).sum())
    return PackedBatch(tokens, labels, positions, bounds, seq_len, sources, num_valid)


# --- the loops, each in its own process ---


def _in_own_process(loop: str, model: Path, documents: Path, settings: dict[str, Any]) -> dict[str, Any]:
    threads = str(settings["threads"])
    command = [sys.executable, "-m", "steep.bench.train", loop, str(model), str(documents), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise RuntimeError(f"the loop {loop!r} ended with status {finished.returncode}")
    return json.loads(finished.stdout.splitlines()[-1])


def _measure(loop: str, model: Path, documents: Path, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(settings["threads"])
    start = {"steep": _steep_loop, "packed": _packed_loop, "padded": _padded_loop}[loop]
    if loop == "steep":
        from ..engine import Engine  # noqa: F401 (memory of imports)
    else:
        from transformers import AutoModelForCausalLM  # noqa: F401
    imports = _peak_rss()
    steps = _steps(documents, settings["sequences"])
    train_step = start(model, settings)
    losses, seconds = [], []
    for step in steps:
        began = time.perf_counter()
        losses.append(train_step(step))
        seconds.append(time.perf_counter() - began)
    tokens = [sum(len(doc) - 1 for docs in step for doc in docs) for step in steps]
    rates = [count / each for count, each in zip(tokens, seconds)][settings["warmup"] :]
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_each": rates,
        "peak_rss_bytes": _peak_rss(),
        "peak_rss_without_imports_bytes": _peak_rss() - imports,
        "losses": losses,
    }


def _peak_rss() -> int:
    """Of this process. On Linux not ru_maxrss, which a child inherits from the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


TrainStep = Callable[[list[list[np.ndarray]]], float]


def _steep_loop(model: Path, settings: dict[str, Any]) -> TrainStep:
    from ..engine import AdamWConfig, Engine

    config = AdamWConfig(betas=BETAS, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
    engine = Engine.load(model, dtype="float32", optimizer=config)

    def train_step(step: list[list[np.ndarray]]) -> float:
        batch = _packed_batch(step, settings["seq_len"])
        sums = engine.forward_backward(batch, batch.num_valid)
        engine.step(LR)
        return sums.nll.item() / batch.num_valid

    return train_step


def _transformers(model: Path) -> tuple[Any, Callable[[], None]]:
    """A transformers model, and what clips its gradients and steps its optimizer."""
    import torch
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").train()
    groups = [
        {"params": [p for p in hf.parameters() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in hf.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def finish_step() -> None:
        torch.nn.utils.clip_grad_norm_(hf.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return hf, finish_step


def _packed_loop(model: Path, settings: dict[str, Any]) -> TrainStep:
    import torch

    hf, finish_step = _transformers(model)

    def train_step(step: list[list[np.ndarray]]) -> float:
        batch = _packed_batch(step, settings["seq_len"])
        shape = (settings["sequences"], settings["seq_len"])
        # transformers shifts labels itself, so a label stands at its own token
        labels = np.roll(batch.labels, 1)
        loss = hf(
            input_ids=torch.from_numpy(batch.tokens).view(shape),
            position_ids=torch.from_numpy(batch.positions).long().view(shape),
            labels=torch.from_numpy(labels).view(shape),
            use_cache=False,
        ).loss
        loss.backward()
        finish_step()
        return loss.item()

    return train_step


def _padded_loop(model: Path, settings: dict[str, Any]) -> TrainStep:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    hf, finish_step = _transformers(model)

    def train_step(step: list[list[np.ndarray]]) -> float:
        docs = [torch.from_numpy(doc) for docs in step for doc in docs]
        docs = [docs[i] for i in np.random.default_rng(2).permutation(len(docs))]
        num_valid = sum(len(doc) - 1 for doc in docs)
        total = 0.0
        for first in range(0, len(docs), settings["sequences"]):
            rows = docs[first : first + settings["sequences"]]
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            loss = hf(
                input_ids=pad_sequence(rows, batch_first=True),
                attention_mask=mask,
                labels=pad_sequence(rows, batch_first=True, padding_value=-100),
                num_items_in_batch=num_valid,
                use_cache=False,
            ).loss
            loss.backward()
            total += loss.item()
        finish_step()
        return total

    return train_step


if __name__ == "__main__":
    name, model_folder, documents_file, settings_json = sys.argv[1:]
    print(json.dumps(_measure(name, Path(model_folder), Path(documents_file), json.loads(settings_json))))
