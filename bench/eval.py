"""`steep bench eval`: few-shot multiple choice against lm-evaluation-harness' `hf` backend, on the same prompts.

Both score the same texts with the same weights in fp32 and the same number of threads, tokenising included, loading
not; the harness with batch sizes 1 and 8, of which the faster counts. Rounds of all contenders alternate.
"""

from __future__ import annotations

import csv
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..eval import Encoder, Item, Request, Scorer, load_model, load_tasks
from ..eval.scorer import prefix_tree, tree_tokens

SUBJECTS = ("anatomy", "clinical_knowledge", "college_biology")
BATCH_SIZES = (1, 8)

Scores = list[tuple[float, bool]]


def run(
    model: str | Path, mmlu: str | Path | None = None, *, num_fewshot: int = 5, limit: int = 16, rounds: int = 2
) -> dict[str, Any]:
    """Time both on the first `limit` questions of three MMLU subjects.

    Args:
        mmlu: folder with dev/ and test/ csv files; else questions of random words with the lengths of MMLU's.

    Returns: items, items_per_s and seconds (every round) of each contender, speedup (best round against best round of
        the faster batch size), largest difference of a log-likelihood, items with another most likely choice,
        tokens that each runs through the model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if mmlu is None:
            write_synthetic_mmlu(Path(temporary))
        names = [f"mmlu_{subject}:{temporary if mmlu is None else mmlu}" for subject in SUBJECTS]
        examples = [task.examples(limit) for task in load_tasks(names, num_fewshot)]
    items = [[example.item for example in own if example.item] for own in examples]
    decoder, tokenizer, _ = load_model(model)
    scorer = Scorer(decoder, tokenizer)
    encoder = Encoder(tokenizer, scorer.max_length, "lmeval")
    contenders: dict[str, Callable[[], Scores]] = {"steep": lambda: _steep(scorer, encoder, items)}
    for batch_size in BATCH_SIZES:
        contenders[f"lm_eval batch_size={batch_size}"] = _lm_eval(model, items, batch_size)

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    scores: dict[str, Scores] = {}
    for _ in range(rounds):
        for name, score in contenders.items():
            begin = time.perf_counter()
            scores[name] = score()
            seconds[name].append(time.perf_counter() - begin)

    count = sum(map(len, items))
    best = {name: min(times) for name, times in seconds.items()}
    rival = min((name for name in contenders if name != "steep"), key=lambda name: best[name])
    pairs = [(ours[0], theirs[0]) for ours, theirs in zip(scores["steep"], scores[rival])]
    places = [len(item.choices) for own in items for item in own]
    return {
        "data": "synthetic" if mmlu is None else "mmlu " + ", ".join(SUBJECTS),
        "num_fewshot": num_fewshot,
        "items": count,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "items_per_s": {name: count / time_ for name, time_ in best.items()},
        "rival": rival,
        "speedup": best[rival] / best["steep"],
        "max_abs_difference": max(abs(ours - theirs) for ours, theirs in pairs),
        "items_with_another_choice": _disagreements(pairs, places),
        "model_tokens": {  # without padding; the harness runs each distinct input once
            "steep": sum(tree_tokens(prefix_tree(_requests(encoder, own))) for own in items),
            "lm_eval": sum(tree_tokens(prefix_tree(_requests(encoder, own), share=False)) for own in items),
        },
    }


def _steep(scorer: Scorer, encoder: Encoder, items: list[list[Item]]) -> Scores:
    scores: Scores = []
    for own in items:  # task by task, as `evaluate` does
        scores += scorer.loglikelihood(_requests(encoder, own))
    return scores


def _requests(encoder: Encoder, items: list[Item]) -> list[Request]:
    return [request for item in items for request in encoder.choices(item.context, item.continuations)]


def _lm_eval(model: str | Path, items: list[list[Item]], batch_size: int) -> Callable[[], Scores]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=batch_size)
    instances = [
        Instance("loglikelihood", {}, (item.context, continuation), place)
        for own in items
        for item in own
        for place, continuation in enumerate(item.continuations)
    ]
    return lambda: theirs.loglikelihood(instances, disable_tqdm=True)


def _disagreements(pairs: list[tuple[float, float]], places: list[int]) -> int:
    different, start = 0, 0
    for count in places:
        ours, theirs = zip(*pairs[start : start + count])
        different += ours.index(max(ours)) != theirs.index(max(theirs))
        start += count
    return different


def write_synthetic_mmlu(folder: Path, seed: int = 0) -> None:
    """csv files like MMLU's, of random English words: questions of 8 to 60 words, choices of 1 to 12."""
    draw = random.Random(seed)
    words = ["the", "patient", "has", "a", "of", "liver", "heart", "which", "is", "true", "about", "fever", "pressure"]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    for split, count in (("dev", 5), ("test", 64)):
        (folder / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with open(folder / split / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["question", *(f"choice{i}" for i in range(4)), "answer"])
                for _ in range(count):
                    choices = [text(1, 12) for _ in range(4)]
                    writer.writerow([text(8, 60) + "?", *choices, draw.randrange(4)])
