"""`steep bench data`: tokenising against the raw library on the same cores, and packing a million documents.

Both sides encode the same text with the same tokenizer and the same number of cores, in turns. The raw library has the
texts in memory and hands out lists of ids, nothing else; steep starts its processes, reads and parses the files, hashes
them, and writes, hashes and fsyncs a published token store.
"""

from __future__ import annotations

import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.packing import pack_best_fit, pack_concat
from ..data.readers import Document, read_documents
from ..data.tokenize import tokenize_files
from ..data.tokenizer import load_tokenizer

TEXT_BYTES = 64_000_000
REPEATS = 5
PACKED_DOCS = 1_000_000


def run(
    model: str | Path | None = None,
    files: Sequence[str | Path] = (),
    text_bytes: int = TEXT_BYTES,
    cores: int | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Figures of tokenising (MB of UTF-8 text per second of wall clock) and of packing (seconds).

    Args:
        model: folder with a tokenizer; by default a byte-level BPE of 32,000 tokens trained on the text itself.
        files: the text; by default the sources of Python's standard library, over and over up to `text_bytes`.
        cores: how many either side may use; default all usable ones.
        repeats: the median counts, minimum and maximum are given.
    """
    cores = cores or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="steep-bench-") as scratch:
        texts = [text for file in files for text in _texts(file)] or _standard_library(text_bytes)
        folder = Path(model) if model is not None else _train_tokenizer(Path(scratch) / "tokenizer", texts)
        tokenizing = _bench_tokenizing(texts, folder, Path(scratch), cores, repeats)
    return {"tokenizing": tokenizing, "packing": _bench_packing(repeats)}


def _bench_tokenizing(texts: list[str], folder: Path, scratch: Path, cores: int, repeats: int) -> dict[str, Any]:
    file = scratch / "text.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encode = _raw_encode(folder, cores)
    stores = (scratch / f"store-{number}" for number in range(repeats))
    raw: list[float] = []
    steep: list[float] = []
    for _ in range(repeats):
        raw.append(megabytes / _seconds(lambda: _encode_all(encode, texts)))
        steep.append(megabytes / _seconds(lambda: tokenize_files([file], folder, next(stores), workers=cores)))
    return {
        "library": load_tokenizer(folder).library,
        "cores": cores,
        "documents": len(texts),
        "text_megabytes": megabytes,
        "raw_library_mb_per_s": _spread(raw),
        "steep_mb_per_s": _spread(steep),
        "steep_over_raw": statistics.median(steep) / statistics.median(raw),
        "steep_over_raw_pairs": [ours / theirs for ours, theirs in zip(steep, raw)],
    }


def _raw_encode(folder: Path, cores: int) -> Callable[[list[str]], object]:
    """The library's own fastest way to encode a list of texts to lists of ids on so many cores."""
    if (folder / "tokenizer.json").is_file():
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if cores > 1 else "false"
        os.environ["RAYON_NUM_THREADS"] = str(cores)
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda batch: [item.ids for item in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda batch: processor.encode(batch, num_threads=cores)


def _encode_all(encode: Callable[[list[str]], object], texts: list[str]) -> None:
    for start in range(0, len(texts), 1000):
        encode(texts[start : start + 1000])


def _bench_packing(repeats: int) -> dict[str, Any]:
    """Log-normal lengths with a mean of about 900 tokens, as web text has; a few thousand times longer at the tail."""
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, PACKED_DOCS).astype(np.int64) + 1
    figures: dict[str, Any] = {"documents": len(lengths), "mean_tokens": float(lengths.mean())}
    for seq_len in (2048, 4096, 32768):
        index = pack_best_fit(lengths, seq_len)
        figures[f"best_fit_{seq_len}"] = {
            "seconds": _spread([_seconds(partial(pack_best_fit, lengths, seq_len)) for _ in range(repeats)]),
            "padding_percent": index.stats()["padding_percent"],
        }
    stats = pack_concat(lengths, 4096).stats()
    figures["concat_4096_docs_cut_unnecessarily_percent"] = 100 * stats["docs_cut_unnecessarily"] / len(lengths)
    return figures


def _texts(file: str | Path) -> list[str]:
    return [item.text for item in read_documents(file) if isinstance(item, Document)]


def _standard_library(text_bytes: int) -> list[str]:
    """Python's own sources as documents: real text that is on every machine."""
    sources = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip() and "\0" not in text:
                sources.append(text)
    texts: list[str] = []
    size = 0
    while size < text_bytes:
        text = sources[len(texts) % len(sources)]
        texts.append(text)
        size += len(text.encode())
    return texts


def _train_tokenizer(folder: Path, texts: list[str]) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts[:500], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
