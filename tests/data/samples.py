"""Texts and files that the data tests share."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXTS = [
    "Der Patient klagt über Schmerzen in der Brust und Atemnot seit gestern.",
    "The patient was given aspirin; the electrocardiogram showed no change.",
    "Le médecin a prescrit un traitement de 500 mg par jour pendant 10 jours.",
    "Blutdruck 120/80 mmHg, Puls 72/min, Temperatur 36,8 °C — unauffällig 👍.",
    "def f(x):\n    return x ** 2\n",
    "血圧は正常です。",
]


def many_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of very different lengths, one of a single character and one of some 20,000 among them."""
    random = np.random.default_rng(seed)
    texts = [" ".join(TEXTS[i] for i in random.integers(len(TEXTS), size=random.integers(1, 20))) for _ in range(count)]
    return [f"{number} {text}" for number, text in enumerate(texts)] + ["x", TEXTS[0] * 300]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path
