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

    with Progress(console=_stderr(), transient=True) as bar:
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
) -> None:
    """Continual pre-training by a recipe; resumes where it was. The same as `python -m steep.engine` (for torchrun)."""
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
    model: Annotated[Path | None, typer.Option(help="Model folder; else random weights of SmolLM2's shape.")] = None,
    text: Annotated[Path | None, typer.Option(help="Documents (needs --model); else generated ones.")] = None,
) -> None:
    """Training step against a transformers loop on the same packed tokens: tokens/s and peak memory."""
    from ..bench import train
    from ..bench.record import record

    _print_json(record("train", train.run(model, text), out))


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
