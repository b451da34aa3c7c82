"""Carrying out merges: tensors stream from the inputs through a method into new model folders.

Tensors are merged side by side by a few threads (stream.py); memory is threads x (inputs + a few) x piece, whatever
the size of the models. The same threads hash the input files, a little behind the reading, so that every byte comes
from the disk once; another one makes what is written durable while the merge goes on. Several merges of the same models
(a sweep) share one reading. A merge that was interrupted is gone on with by the same command (journal.py): finished
tensors are checked against their hashes, not made again. An output is published by one rename.

Numerics: inputs are read in the dtype of their files, all arithmetic is float32, and the result is rounded once, to
`out_dtype`, else `dtype`, else the dtype of the donor's tensor. mergekit instead casts inputs and weights to `dtype`
when it loads them and computes in it, which under `dtype: bfloat16` rounds several times; with float32 both agree.
`compat: mergekit-0.1.5` is for results that must be mergekit's own (compat.py): whole tensors, one after another.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.files import atomic_write, check_absent, hash_inputs, sha256_json, usable_cores, versions
from ..engine.safetensors_io import SafetensorsWriter
from .compat import EXACT, MergekitMerge, draw_order, draws, promoted
from .config import parse_config, read_yaml
from .input_hashes import TrailingHashes
from .journal import Journal, journaled_folder, reserved_bytes
from .manifest import tensor_record, write_records
from .method_table import METHODS
from .plan import FLOATS, MergePlan, TensorPlan, plan_merge
from .stream import Equal, Input, Merged, Target, merge_tensor
from .tensor_merge import ROW, Subject, Sums, TensorMerge

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
MAX_WORKERS = {"cpu": 16, "cuda": 4}
SYNC_BYTES = 256 << 20  # written between two rounds of making it durable


@dataclass(frozen=True)
class Output:
    """One merge to carry out: the plan, the folder to create, the configuration as written and the files it is from."""

    plan: MergePlan
    out: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...] = ()


def merge(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    device: str = "cpu",
    *,
    compat: str | None = None,
    allow_not_finite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    chunk_elements: int | None = None,
    workers: int | None = None,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merge models as a mergekit YAML says and publish the result as a Hugging Face folder with `merge.json`.

    Args:
        config: path of the YAML; or its content as a mapping, whose relative paths count from the current folder.
        out: folder to create; it must not exist or be empty.
        device: where the arithmetic runs: cpu, cuda or cuda:N.
        compat: "mergekit-0.1.5": as the key of that name in the configuration, which it replaces.
        allow_not_finite: NaN and infinity in an input pass through, and the record says where, instead of an error.
        max_shard_bytes: size at which a further weight file is begun.
        chunk_elements: elements of a tensor held at once, rounded up to a multiple of 4096.
        workers: threads; default: the cores there are, at most 16; on a GPU 4; under `compat` always 1.
        log: called with lines for a person: donors, notes and warnings, before the work and after it.
        progress: called with (bytes of output done, bytes in all).

    Returns:
        The content of `merge.json`: configuration, seed, mode, donors, licences, hashes of inputs, time and memory, and
        for every output tensor its sha256, resolved parameters and figures (norms, relative norms of task vectors,
        cosines); `figures.layers` has the same figures by layer.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: before anything is written, for everything that headers tell.
        ValueError: naming file and tensor, for NaN or infinite inputs, or a result that `dtype` cannot hold.
        OSError: too little space, found before the merge begins as far as the system can say.
    """
    output = _output(config, Path(out), compat)
    return execute(
        [output],
        device,
        allow_not_finite=allow_not_finite,
        max_shard_bytes=max_shard_bytes,
        chunk_elements=chunk_elements,
        workers=workers,
        log=log,
        progress=progress,
    )[0]


def sweep(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    key: str,
    values: Sequence[Any],
    *,
    compat: str | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Merge the same models once for each value of one key, from one reading of the inputs.

    Args:
        config: as for `merge`.
        out: folder in which the outputs are created, one for each value: `lambda=0.5`.
        key: place in the configuration, with dots: `parameters.lambda`, `models.1.parameters.weight`; a parameter of
            the whole merge needs no more than its name.
        values: what the key is set to.
        compat, options: as for `merge`.
    """
    written, files, folder = _read(config, compat)
    path = key.split(".") if "." in key else ["parameters", key]
    outputs = []
    for value in values:
        changed = with_value(written, path, value)
        place = Path(out) / f"{path[-1]}={value}"
        plan = plan_merge(parse_config(changed, f"{key}={value}"), folder, out=place)
        outputs.append(Output(plan, place, changed, files))
    if len({output.out for output in outputs}) < len(outputs):
        raise ValueError(f"{key}: a value is given twice: {', '.join(map(str, values))}")
    return execute(outputs, **options)


def _output(config: str | Path | Mapping[str, Any], out: Path, compat: str | None) -> Output:
    written, files, folder = _read(config, compat)
    where = str(files[0]) if files else "merge configuration"
    return Output(plan_merge(parse_config(written, where), folder, out=out), out, written, files)


def _read(
    config: str | Path | Mapping[str, Any], compat: str | None
) -> tuple[dict[str, Any], tuple[Path, ...], Path | None]:
    """The configuration as written, its file if it is from one, and the folder that paths count from."""
    over = {} if compat is None else {"compat": compat}
    if isinstance(config, Mapping):
        return {**config, **over}, (), None
    return read_yaml(config) | over, (Path(config),), Path(config).resolve().parent


def with_value(written: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a configuration in which one place holds another value."""
    changed = copy.deepcopy(dict(written))
    place: Any = changed
    for depth, step in enumerate(path):
        here = ".".join(path[: depth + 1])
        if isinstance(place, list) and not (step.isdigit() and int(step) < len(place)):
            raise ValueError(f"{here}: expected a number below {len(place)}, found {step!r}")
        if not isinstance(place, dict | list):
            raise ValueError(f"{here}: there is no such place in the configuration")
        at: Any = int(step) if isinstance(place, list) else step
        if depth == len(path) - 1:
            place[at] = value
        else:
            place = place[at] if isinstance(place, list) else place.setdefault(at, {})
    return changed


@dataclass
class _Work:
    """An output while it is made. `records` and `sums` fill up with its finished tensors."""

    output: Output
    journal: Journal
    writer: SafetensorsWriter
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    taken_over: int = 0

    def __post_init__(self) -> None:
        config = self.output.plan.config
        self.compat = config.compat is not None
        self.draws = self.compat and draws(config.merge_method)
        self.generator = torch.Generator().manual_seed(config.random_seed)  # of masks under `compat`

    def finish(self, tensor: TensorPlan, inputs: Sequence[Input], merged: Merged) -> None:
        models = [source.model for source in inputs]
        record = tensor_record(tensor, merged.sha256, models, merged.sums, self.output.plan.config)
        record |= merged.figures
        if merged.not_finite:
            record["not_finite"] = merged.not_finite
        sums = [[*pair, value] for pair, value in merged.sums.items()]
        self.journal.add(tensor.name, {"record": record, "sums": sums})
        self._done(tensor.name, record, merged.sums)

    def take_over(self, tensor: TensorPlan, chunk: int) -> bool:
        """Whether an earlier process finished the tensor, and it still has the hash that it had."""
        entry = self.journal.finished.get(tensor.name)
        if entry is None or self.draws:  # what comes after it depends on what it draws
            return False
        digest, buffer = hashlib.sha256(), torch.empty(min(chunk, tensor.numel), dtype=tensor.dtype)
        for lo in range(0, tensor.numel, chunk):
            values = self.writer.read_into(tensor.name, lo, buffer[: min(chunk, tensor.numel - lo)])
            digest.update(values.view(torch.uint8).numpy().data)
        if digest.hexdigest() != entry["record"]["sha256"]:
            return False
        self.writer.adopt(tensor.name)
        self._done(tensor.name, entry["record"], {(i, j): value for i, j, value in entry["sums"]})
        self.taken_over += 1
        return True

    def _done(self, name: str, record: dict[str, Any], sums: Sums) -> None:
        self.records[name], self.sums[name] = record, sums


def execute(
    outputs: Sequence[Output],
    device: str = "cpu",
    *,
    allow_not_finite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    chunk_elements: int | None = None,
    workers: int | None = None,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Carry out merges that are planned, as `merge` does one: what they read from the same tensors is read once.

    Returns and raises as `merge`, with one `merge.json` for each output. Outputs are published when all are finished.
    """
    log = log or (lambda line: None)
    started = time.monotonic()
    where = find_device(device)
    for output in outputs:
        check_absent(output.out)
        for line in output.plan.summary():
            log(line)
    _check_space(outputs)
    compat = any(output.plan.config.compat for output in outputs)
    if compat and where.type != "cpu":
        raise ValueError(f"device: {device!r}; compat is bit parity on a CPU: allowed: cpu")
    chunk, workers = chunk_size(chunk_elements, where), 1 if compat else worker_count(workers, where)
    weights, others = _input_files(outputs)
    before = {file: _stamp(file) for file in (*weights, *others)}

    with ExitStack() as stack:
        works = [stack.enter_context(_begun(output, before, max_shard_bytes, log)) for output in outputs]
        threads = torch.get_num_threads() if compat else 1  # mergekit's sums depend on it
        stack.enter_context(torch_threads(threads))
        hashes = stack.enter_context(TrailingHashes(weights))
        run = _Run(works, where, chunk, workers, allow_not_finite, hashes, progress)
        with _syncing([work.writer for work in works]):
            run.all()
        if changed := [str(file) for file, stamp in before.items() if _stamp(file) != stamp]:
            raise ValueError(f"{', '.join(changed)}: changed during the merge")
        inputs = {str(file): hashes.of(file) for file in weights} | hash_inputs(others)
        results = []
        for work in works:
            if work.journal.finished and work.taken_over:
                log(f"{work.output.out}: {work.taken_over} tensors were finished by an earlier run")
            config = work.output.plan.config
            about = {"seed": config.random_seed, "mode": config.compat or EXACT, "taken_over": work.taken_over}
            about |= {"execution": {"device": str(where), "threads": workers * threads, "chunk_elements": chunk}}
            result = _complete(work, inputs, time.monotonic() - started, about)
            for line in result["warnings"][len(work.output.plan.warnings) :]:
                log(f"warning: {line}")
            results.append(result)
    return results


@contextmanager
def _begun(
    output: Output, stamps: Mapping[Path, Any], max_shard_bytes: int, log: Callable[[str], None]
) -> Iterator[_Work]:
    """An output's folder with its weight files, new or as an interrupted process left it; published at the end."""
    plan = output.plan
    identity = {"merge": sha256_json([
        plan.config_json,
        [
            [tensor.name, str(tensor.dtype), tensor.shape, tensor.operation, tensor.parameters, tensor.base]
            + [[source.model, source.name] for source in tensor.sources]
            for tensor in plan.tensors
        ],
        {str(file): stamp for file, stamp in stamps.items() if file not in output.files},
        plan.model_labels,
        [str(file) for _, file in plan.carried],
        [plan.config.random_seed, plan.model_names, max_shard_bytes, versions()],
        plan.config.compat and [plan.config.compat, torch.get_num_threads()],
    ])}  # fmt: skip
    with journaled_folder(output.out, identity) as journal:
        if journal.dropped:
            log(f"{output.out}: the beginning of another merge lay there and was removed")
        specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors]
        with SafetensorsWriter(journal.folder, specs, max_shard_bytes, resume=True) as writer:
            yield _Work(output, journal, writer)


def _complete(work: _Work, inputs: Mapping[str, Any], seconds: float, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write all that lies beside the weights, and the records."""
    plan, folder = work.output.plan, work.journal.folder
    work.writer.close()
    write_beside(plan, folder)
    names = [tensor.name for tensor in plan.tensors]
    return write_records(
        folder,
        plan,
        {name: work.records[name] for name in names},
        work.sums,
        [file.name for file in work.writer.files],
        inputs=inputs,
        config=work.output.config,
        seconds=seconds,
        **about,
    )


def write_beside(plan: MergePlan, folder: Path) -> None:
    """The small files of the result: configuration, tokenizer and what is carried along."""
    atomic_write(folder / "config.json", json.dumps(plan.config_json, indent=2, ensure_ascii=False) + "\n")
    for name, text in plan.written.items():
        atomic_write(folder / name, text)
    for donor, file in plan.carried:
        target = folder / file.relative_to(donor)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


class _Run:
    """The tensors of all outputs through a pool of threads."""

    def __init__(
        self,
        works: Sequence[_Work],
        device: torch.device,
        chunk: int,
        workers: int,
        allow_not_finite: bool,
        hashes: TrailingHashes,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.works, self.device, self.chunk, self.workers = works, device, chunk, workers
        self.allow_not_finite, self.hashes, self.progress = allow_not_finite, hashes, progress
        self.done = 0
        self.total = sum(_bytes(tensor) for work in works for tensor in work.output.plan.tensors)

    def all(self) -> None:
        """Take over what is finished, merge the rest, hash what is left of the inputs."""
        with ThreadPoolExecutor(self.workers, "steep-merge") as pool:
            try:
                pairs = [(work, tensor) for work in self.works for tensor in work.output.plan.tensors]
                finished = list(pool.map(lambda pair: pair[0].take_over(pair[1], self.chunk), pairs))
                self._report(sum(_bytes(tensor) for (_, tensor), yes in zip(pairs, finished) if yes))
                jobs = {pool.submit(self._merge, group): group for group in self._groups()}
                for job in as_completed(jobs):
                    job.result()
                    self._report(sum(_bytes(tensor) for _, tensor in jobs[job]))
                for _ in pool.map(self.hashes.finish, self.hashes.files):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _report(self, more: int) -> None:
        self.done += more
        if self.progress and more:
            self.progress(self.done, self.total)

    def _groups(self) -> list[list[tuple[_Work, TensorPlan]]]:
        """What is to be made from the same inputs, together; in the order of the files, but giants first, lest one is
        left over at the end for a single thread."""
        groups: dict[Any, list[tuple[_Work, TensorPlan]]] = {}
        for work in self.works:
            for tensor in work.output.plan.tensors:
                if tensor.name not in work.records:
                    sources = tuple(
                        (work.output.plan.model_labels[source.model], source.name) for source in tensor.sources
                    )
                    rows = tensor.sources[0].rows  # arranged vocabularies are an output's own
                    groups.setdefault((tensor.name, sources, tensor.base, id(rows)), []).append((work, tensor))
        if any(work.compat for work in self.works):
            return sorted(groups.values(), key=_draw_order)
        left = sum(_bytes(tensor) for group in groups.values() for _, tensor in group)
        giant = left / (4 * self.workers)
        return sorted(groups.values(), key=lambda group: sum(_bytes(tensor) for _, tensor in group) < giant)

    def _merge(self, group: Sequence[tuple[_Work, TensorPlan]]) -> None:
        work, tensor = group[0]
        inputs = tensor_inputs(work.output.plan, tensor)
        alike: dict[tuple[str, str], list[tuple[_Work, Target]]] = {}
        for work, tensor in group:
            target = self._target(work, tensor)
            alike.setdefault((target.method.vectors, target.method.pieces), []).append((work, target))
        for members in alike.values():
            targets = [target for _, target in members]
            found = merge_tensor(inputs, targets, self.device, self.chunk, self.allow_not_finite)
            for (work, target), merged in zip(members, found):
                work.finish(target.tensor, inputs, merged)
        for source in inputs:
            self.hashes.advance(source.folder.file_of(source.name), *source.folder.span(source.name))

    def _target(self, work: _Work, tensor: TensorPlan) -> Target:
        method = tensor_method(work.output.plan, tensor, self.device, work.generator)
        return Target(tensor, method, lambda lo, values: work.writer.write_range(tensor.name, lo, values))


def tensor_inputs(plan: MergePlan, tensor: TensorPlan) -> list[Input]:
    """What a tensor is made of, the base first."""
    order = sorted(range(len(tensor.sources)), key=lambda position: position != tensor.base)
    sources = [tensor.sources[position] for position in order]
    return [Input(plan.models[source.model], source.name, source.model) for source in sources]


def tensor_method(
    plan: MergePlan, tensor: TensorPlan, device: torch.device, generator: torch.Generator | None = None
) -> TensorMerge:
    """The method that makes a tensor, with its parameters; compat needs the `generator` that it draws masks from."""
    subject = Subject(
        name=tensor.name,
        shape=tensor.shape,
        parameters=tensor.parameters,
        models=tuple(
            plan.model_names[source.model] for position, source in enumerate(tensor.sources) if position != tensor.base
        ),
        seed=plan.config.random_seed,
        device=device,
        based=tensor.base is not None,
    )
    if tensor.operation == "equal":
        return Equal(subject)
    if plan.config.compat:
        assert generator is not None
        stored = [plan.models[source.model].dtype(source.name) for source in tensor.sources]
        compute = FLOATS[plan.config.dtype] if plan.config.dtype else promoted(stored)
        return MergekitMerge(subject, tensor.operation, compute, generator)
    return METHODS[tensor.operation].carry_out(subject)


def _draw_order(group: Sequence[tuple[_Work, TensorPlan]]) -> tuple[str, str]:
    _, tensor = group[0]
    return draw_order([source.name for source in tensor.sources], tensor.name)


@contextmanager
def _syncing(writers: Sequence[SafetensorsWriter]) -> Iterator[None]:
    """Make what is written durable from time to time, beside the merge, so that little is left to do at its end."""
    over = threading.Event()
    failures: list[OSError] = []

    def sync() -> None:
        synced = 0
        while not over.wait(0.1):
            written = sum(writer.bytes_written for writer in writers)
            if written - synced >= SYNC_BYTES:
                synced = written
                try:
                    for writer in writers:
                        writer.sync()
                except OSError as error:
                    failures.append(error)
                    return

    thread = threading.Thread(target=sync, name="steep-sync")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]


def _check_space(outputs: Sequence[Output]) -> None:
    """Refuse to begin what will not fit, as far as the system says."""
    needed: dict[int, int] = {}
    free: dict[int, int] = {}
    for output in outputs:
        parent = next(path for path in output.out.resolve().parents if path.exists())
        volume = parent.stat().st_dev
        size = sum(_bytes(tensor) for tensor in output.plan.tensors)
        needed[volume] = needed.get(volume, 0) + size - reserved_bytes(output.out)
        free[volume] = shutil.disk_usage(parent).free
        if needed[volume] > free[volume]:
            text = f"{needed[volume] / 1e9:.2f} GB are needed, {free[volume] / 1e9:.2f} GB are free"
            raise OSError(errno.ENOSPC, text, str(output.out))


def _input_files(outputs: Sequence[Output]) -> tuple[list[Path], list[Path]]:
    """The files whose hashes say what went in: weight files, and small ones."""
    files: dict[Path, None] = dict.fromkeys(file for output in outputs for file in output.files)
    files |= dict.fromkeys(file for output in outputs for file in output.plan.input_files)
    read = {file for output in outputs for model in output.plan.models for file in model.files}
    return [file for file in files if file in read], [file for file in files if file not in read]


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _bytes(tensor: TensorPlan) -> int:
    return tensor.numel * tensor.dtype.itemsize


def chunk_size(elements: int | None, device: torch.device) -> int:
    """Elements of a tensor held at once: as asked for, rounded up to a multiple of ROW, or what suits the device."""
    return -(-(elements or CHUNK_ELEMENTS[device.type]) // ROW) * ROW


def worker_count(workers: int | None, device: torch.device) -> int:
    """Threads: as asked for, or one for each core up to what suits the device."""
    return workers or min(MAX_WORKERS[device.type], usable_cores())


def find_device(name: str) -> torch.device:
    if name.split(":")[0] not in CHUNK_ELEMENTS:
        raise ValueError(f"device: {name!r}; allowed: {', '.join(CHUNK_ELEMENTS)}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r}, but torch finds no CUDA device here")
    return torch.device(name)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """One thread for each torch operation while tensors are merged side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
