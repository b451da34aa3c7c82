"""The `steep` command: parse, call, print.

Only typer is imported here; each command imports what it runs, so that `steep --help` answers at once. A user's mistake
(ValueError, a missing or existing file, a missing extra) ends in one line on stderr and exit status 2, no traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

app = typer.Typer(
    name="steep",
    help="Steep open language models in a domain: corpus, continual pre-training, merging, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
import_app = typer.Typer(help="Bring a model of another format into a Hugging Face folder.", no_args_is_help=True)
data_app = typer.Typer(help="Text to token stores.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks that write JSON records.", no_args_is_help=True)
app.add_typer(import_app, name="import")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

ModelFolder = Annotated[Path, typer.Argument(help="Hugging Face model folder.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where the result is published.")]
RecordOption = Annotated[Path | None, typer.Option("--out", help="Also publish the JSON record here.")]


def main() -> None:
    """Entry point: run the command line, turning a user's mistake into one line."""
    try:
        app()
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        print(f"steep: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"steep: {error}", file=sys.stderr)
        sys.exit(1)


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal; called with (bytes done, bytes in all)."""
    from rich.progress import Progress

    console = _stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@app.command()
def demo(
    out: OutOption = Path("demo-out"),
) -> None:
    """The whole road on a real small model: import, pack, train, merge, evaluate, report. Resumes finished steps."""
    from .demo import run_demo

    run_demo(out)


@import_app.command("gguf")
def import_gguf_command(
    file: Annotated[Path, typer.Argument(help="The GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
) -> None:
    """Dequantise a GGUF file into a Hugging Face folder, with its tokenizer and chat template."""
    from ..engine.gguf import import_gguf

    import_gguf(file, out)
    print(out)


@data_app.command("tokenize")
def tokenize(
    files: Annotated[list[Path], typer.Argument(help="jsonl, jsonl.zst, jsonl.gz, parquet or txt.")],
    model: Annotated[Path, typer.Option(help="Folder with the tokenizer.")],
    out: OutOption,
    text_field: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    workers: Annotated[int, typer.Option(help="Processes, 0: one per core. The result is the same.")] = 0,
    eos: Annotated[str, typer.Option(help="Ends every document: yes (the model's EOS), no, or a token.")] = "yes",
    bos: Annotated[str, typer.Option(help="Begins it: auto (as the tokenizer does by itself), yes or no.")] = "auto",
) -> None:
    """Text files to a token store, with an account of every document."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from ..data import tokenize_files

    words = {"yes": True, "no": False}
    if bos not in ("auto", *words):
        raise ValueError(f"--bos: {bos!r} given, allowed are auto, yes, no")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=_stderr()) as display:
        task = display.add_task("starting")
        manifest = tokenize_files(
            files,
            model,
            out,
            text_field=text_field,
            bos=words.get(bos, "auto"),
            eos=words.get(eos, eos),
            workers=workers or None,
            progress=lambda docs, tokens: display.update(task, description=f"{docs:,} documents, {tokens:,} tokens"),
        )
    _print_json(manifest["figures"])


@data_app.command("inspect")
def inspect(
    store: Annotated[Path, typer.Argument(help="Token store.")],
    seq_len: Annotated[int | None, typer.Option(help="Also pack at this sequence length and report.")] = None,
    doc: Annotated[int | None, typer.Option(help="Also show how this document begins.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder with the tokenizer, if it has moved since.")] = None,
) -> None:
    """What a token store holds, and how it would pack."""
    from ..data.inspect import inspect_store

    _print_json(inspect_store(store, seq_len=seq_len, doc=doc, tokenizer_folder=model))


@app.command(context_settings={"ignore_unknown_options": False})
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. schedule.lr=1e-5")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it will take, load nothing, train nothing.")] = False,
    gpu: Annotated[str | None, typer.Option(help="With --plan: h100, h200, a100, ...; else the one here.")] = None,
    gpus: Annotated[int, typer.Option(help="With --plan: how many.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="With --plan: how many in one machine.")] = 8,
) -> None:
    """Continual pre-training by a recipe; resumes where it was. The same as `python -m steep.engine` (for torchrun)."""
    if plan:
        from ..engine.plan_report import plan_command
        from ..engine.recipe import load_recipe

        plan_command(load_recipe(recipe, overrides or []), gpu=gpu, gpus=gpus, gpus_per_node=gpus_per_node)
        return
    if gpu is not None:
        raise ValueError("--gpu names a GPU to plan for: give --plan too (device=cuda trains on one)")
    from ..engine.__main__ import main as run

    run([str(recipe), *(overrides or [])])


class _MergeGroup(typer.core.TyperGroup):
    """`steep merge CONFIG OUT` beside the commands of `steep merge`: what is no command's name begins a merge."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


merge_app = typer.Typer(
    help="Merge models by a mergekit YAML: steep merge CONFIG OUT. A file named as a command: ./NAME.",
    cls=_MergeGroup,
    no_args_is_help=True,
)
app.add_typer(merge_app, name="merge")


Compat = Annotated[
    str | None, typer.Option(help="mergekit-0.1.5: its results bit for bit, with its roundings and random masks.")
]


@merge_app.command("run")
def merge(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML, unchanged.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    sweep: Annotated[
        str | None,
        typer.Option(help="KEY=A,B,C: a merge for each, in OUT/KEY=A and so on. KEY: t, models.0.parameters.weight."),
    ] = None,
    allow_not_finite: Annotated[bool, typer.Option(help="Let NaN and infinity in a model pass through.")] = False,
    compat: Compat = None,
) -> None:
    """Merge models. Everything is checked before the first byte is written; the same command goes on if interrupted."""
    import yaml

    from .. import merge as merging

    options: dict[str, Any] = {"device": device, "allow_not_finite": allow_not_finite, "log": print}
    options["compat"] = compat
    key, equals, values = (sweep or "=").partition("=")
    if sweep and not (key and equals and values):
        raise ValueError(f"--sweep: {sweep!r} given, expected KEY=A,B,C")
    with _progress("merging") as options["progress"]:
        if sweep:
            results = merging.sweep(config, out, key, [yaml.safe_load(value) for value in values.split(",")], **options)
        else:
            results = [merging.merge(config, out, **options)]
    for result in results:
        _print_json(result["figures"])


@merge_app.command("plan")
def merge_plan(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML, unchanged.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also check the place where the result shall lie.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="A line for every tensor, not for every kind.")] = False,
    compat: Compat = None,
) -> None:
    """What a merge would do, from headers alone: every tensor, donor and parameter, or every error."""
    from rich.console import Console

    from ..merge.plan_view import plan_file, show_plan

    console = Console(width=None if sys.stdout.isatty() else 200)
    for part in show_plan(plan_file(config, out, compat), every_tensor=tensors):
        console.print(part)


@merge_app.command("diff")
def merge_diff(
    a: Annotated[Path, typer.Argument(help="Hugging Face model folder.")],
    b: Annotated[Path, typer.Argument(help="Another of the same shape.")],
    base: Annotated[Path | None, typer.Option(help="Also compare both with this one: norms, cosine.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Publish all figures as JSON here.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="A line for every tensor.")] = False,
) -> None:
    """How two models differ: norms, cosines, equal elements, distances in ulps, by role, layer and tensor."""
    from rich.console import Console

    from ..data.files import atomic_write
    from ..merge.diff import diff, show_diff

    found = diff(a, b, base)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for part in show_diff(found, every_tensor=tensors):
        console.print(part)
    if out is not None:
        atomic_write(out, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


@merge_app.command("report")
def merge_report(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML, unchanged.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file.")] = Path("merge-report.html"),
    result: Annotated[Path | None, typer.Option(help="The merged model, if there is one: its figures too.")] = None,
    figures: Annotated[Path | None, typer.Option("--json", help="Also publish the figures here.")] = None,
) -> None:
    """What a merge does, as heat maps: task vectors, cosines, conflicts, losses by rounding; alarm if no siblings."""
    from ..merge.report import report_file

    found = report_file(config, out, result, figures)
    for alarm in found["alarms"]:
        what = "is no sibling" if alarm["whole"] else f"has {len(alarm['tensors'])} matrices that are no siblings"
        print(f"alarm: model {alarm['model']} ({alarm['label']}) {what} of the base")
    print(out)


@merge_app.command("verify")
def merge_verify(
    folder: Annotated[Path, typer.Argument(help="A merged model.")],
    config: Annotated[Path | None, typer.Option(help="The YAML it was made by, instead of its own record.")] = None,
    forward: Annotated[bool, typer.Option("--forward", help="Also load it and run a short text.")] = False,
    chunks: Annotated[int, typer.Option(min=1, help="Random pieces recomputed of every tensor.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Which pieces.")] = 0,
) -> None:
    """Check a merge: hashes, structure, finiteness, and values recomputed in float64 by other code."""
    from ..merge.verify import verify_merge

    _print_json(verify_merge(folder, config=config, forward=forward, chunks=chunks, seed=seed))


@merge_app.command("search")
def merge_search(
    config: Annotated[Path, typer.Argument(help="YAML: merge, space, strategy, objectives, choose, budget.")],
    out: Annotated[Path, typer.Argument(help="Folder for journal, record and the best model.")],
    budget: Annotated[int | None, typer.Option(help="Evaluations at most, instead of the YAML's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Search strength, density, method by evaluation results, in memory; the best is written and confirmed."""
    from rich.console import Console

    from ..eval import task_objective
    from ..merge.search import search
    from ..merge.search_view import show_search

    record = search(config, out, budget=budget, device=device, task_objective=task_objective, log=print)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for part in show_search(record):
        console.print(part)


@app.command("eval")
def evaluate(
    model: ModelFolder,
    tasks: Annotated[str, typer.Option(help="Separated by commas: NAME:DATA, as mmlu:FOLDER, or a task's YAML file.")],
    out: OutOption,
    limit: Annotated[int | None, typer.Option(help="Only the first N documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question; else the task's own.")] = None,
    mode: Annotated[str, typer.Option(help="clean, or lmeval: lm-evaluation-harness with its known faults.")] = "clean",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Evaluate a model on tasks and publish every figure with its rows."""
    if mode not in ("clean", "lmeval"):
        raise ValueError(f"--mode: {mode!r} given, allowed are clean, lmeval")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype: {dtype!r} given, allowed are float32, bfloat16")
    import torch

    from ..eval import evaluate as run

    result = run(
        model,
        tasks.split(","),
        limit=limit,
        out=out,
        mode="clean" if mode == "clean" else "lmeval",
        num_fewshot=num_fewshot,
        dtype=getattr(torch, dtype),
        device=device,
    )
    _print_json(result["figures"])


@app.command()
def generate(
    model: ModelFolder,
    prompts: Annotated[Path, typer.Option(help='jsonl with "prompt" (plain text) or "messages" (chat) per line.')],
    out: OutOption,
    max_new_tokens: Annotated[int, typer.Option(help="Limit per answer.")] = 256,
) -> None:
    """Greedy answers to prompts, as jsonl with stop reason and length."""
    from ..eval.generation import generate_file

    generate_file(model, prompts, out, max_new_tokens=max_new_tokens)
    print(out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with figures.json, as `steep demo` writes it.")],
    out: OutOption,
) -> None:
    """Render a self-contained HTML report from a folder's figures."""
    from ..eval.report import render_report

    render_report(folder, out)
    print(out)


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="A model folder or any artefact that steep wrote.")]) -> None:
    """Check an artefact: checksums, structure, finiteness."""
    from ..engine.verify import verify as run

    _print_json(run(path))


@bench_app.command("train")
def bench_train(
    out: RecordOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model folder (CPU), or qwen2.5-7b, mistral-7b, mistral-small-24b, mixtral-8x7b (GPU)."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Documents (needs a model folder); else generated ones.")] = None,
    gpu_check: Annotated[bool, typer.Option("--gpu-check", help="All targets of one GPU, in 8 minutes.")] = False,
    scale: Annotated[str, typer.Option(help="full, or tiny: the same code on a small shape, on a CPU too.")] = "full",
    seq_len: Annotated[int, typer.Option(help="Tokens of a packed sequence.")] = 8192,
    sequences: Annotated[int, typer.Option(help="Packed sequences of a step.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps that are measured.")] = 8,
    recompute: Annotated[str, typer.Option(help="none, selective or full.")] = "none",
    float8: Annotated[str | None, typer.Option(help="rowwise or blockwise.")] = None,
    optimizer: Annotated[list[str] | None, typer.Option(help="key=value, e.g. moments=8bit; repeatable.")] = None,
) -> None:
    """Training step against transformers on the same packed tokens: tokens/s, MFU, memory, phases."""
    from ..bench import train, train_gpu
    from ..bench.models import MODELS
    from ..bench.record import record

    if gpu_check:
        figures = train_gpu.check(scale=scale)
    elif model in MODELS:
        case = train_gpu.Case(
            model, seq_len=seq_len, sequences=sequences, steps=steps, recompute=recompute, float8=float8,
            optimizer=train_gpu.optimizer_options(optimizer or ()),
        )  # fmt: skip
        figures = train_gpu.run(case, scale=scale)
    else:
        figures = train.run(model, text)
    _print_json(record("train", figures, out))


@bench_app.command("plan")
def bench_plan(out: RecordOption = None) -> None:
    """Memory as `steep train --plan` predicts it against what training steps take, on a CPU, for three sizes."""
    from ..bench import plan
    from ..bench.record import record

    _print_json(record("plan", plan.run(), out))


@bench_app.command("ranks")
def bench_ranks(
    out: RecordOption = None,
    model: Annotated[Path | None, typer.Option(help="Model folder; else random weights of SmolLM2's shape.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    sequences: Annotated[int, typer.Option(help="Of 512 tokens, of each process in each step.")] = 4,
) -> None:
    """CPU processes that train one model together, against as many that train alone: what sharding costs."""
    from ..bench import ranks as bench
    from ..bench.record import record

    _print_json(record("ranks", bench.run(model, ranks=ranks, sequences=sequences), out))


@bench_app.command("data")
def bench_data(
    out: RecordOption = None,
    model: Annotated[Path | None, typer.Option(help="Folder with the tokenizer; else one made for it.")] = None,
    files: Annotated[list[Path] | None, typer.Argument(help="Text; else the standard library's sources.")] = None,
) -> None:
    """Tokenising against the raw library, and packing a million documents."""
    from ..bench import data
    from ..bench.record import record

    _print_json(record("data", data.run(model, files or ()), out))


@bench_app.command("eval")
def bench_eval(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    out: RecordOption = None,
    mmlu: Annotated[Path | None, typer.Option(help="Folder with MMLU's dev/ and test/ csv files.")] = None,
) -> None:
    """5-shot multiple choice against lm-evaluation-harness: items/s and equality of the scores."""
    from ..bench import eval as bench
    from ..bench.record import record

    _print_json(record("eval", bench.run(model=model, mmlu=mmlu), out))


@bench_app.command("kernels")
def bench_kernels(
    out: RecordOption = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw a PNG here.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Also put the table between the marks in this file.")] = None,
    from_record: Annotated[Path | None, typer.Option("--from", help="Use this record; measure nothing.")] = None,
    minutes: Annotated[float, typer.Option(help="On a GPU: measure what fits in this time.")] = 8.0,
) -> None:
    """Every kernel against eager torch, torch.compile and the peers installed, on a GPU if there is one."""
    from ..bench import kernel_report, kernels
    from ..bench.record import record

    result = json.loads(from_record.read_text()) if from_record else record("kernels", kernels.run(minutes), out)
    if plot is not None:
        kernel_report.plot(result, plot)
    if readme is not None:
        kernel_report.update_readme(result, readme)
    _print_json(result)


@bench_app.command("sm90")
def bench_sm90(out: RecordOption = None) -> None:
    """Compile every Triton kernel for Hopper, GPU or not: registers, spills, shared memory, wide loads, wgmma."""
    from ..bench import sm90, sm90_cases
    from ..bench.record import record

    result = record("sm90", sm90.run(sm90_cases.cases()), out)
    _print_json(result)
    if result["figures"]["faults"]:
        raise ValueError("; ".join(result["figures"]["faults"]))


@bench_app.command("merge")
def bench_merge(
    out: RecordOption = None,
    size: Annotated[str, typer.Option(help="0.03B, 0.5B, 1.5B or 7B.")] = "1.5B",
    methods: Annotated[str | None, typer.Option(help="Separated by commas; else all that are measured.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of copy, steep, mergekit.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Where the models are written for the time.")] = None,
    peer: Annotated[bool, typer.Option(help="Measure mergekit too.")] = True,
) -> None:
    """Merging against mergekit and a plain copy of the same bytes: time and peak memory."""
    from ..bench import merge
    from ..bench.record import record

    chosen = tuple(methods.split(",")) if methods else tuple(merge.CONFIGS)
    _print_json(record("merge", merge.run(size, chosen, repeats, folder, peer), out))
