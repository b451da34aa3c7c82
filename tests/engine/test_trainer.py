"""Trainer: a whole run, exact resume after any interruption, refusals before anything is written."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from steep.engine import Engine, SafetensorsFolder, TrainingDiverged, parse_recipe, read_metrics, train
from steep.engine.checkpoint import list_checkpoints
from tests.engine.tiny_run import make_model, make_recipe, make_store, write_recipe
from tests.processes import forkserver

# What depends on the clock or the process, not on the run.
TIMED = ("tokens_per_second", "data_wait", "memory_bytes")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trainer")
    make_recipe(root)
    return root


@pytest.fixture
def root(prepared, tmp_path) -> Path:
    """Own copies of model and stores, so that paths differ and files may be changed."""
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def reference(prepared, tmp_path_factory) -> Path:
    """`out` of a run of 12 steps that nothing interrupted."""
    root = tmp_path_factory.mktemp("reference") / "run"
    shutil.copytree(prepared, root)
    train(parse_recipe(make_recipe(root)))
    return root / "out"


def assert_same_run(out: Path, reference: Path) -> None:
    """The same bits in weights and optimizer, the same metrics."""
    for name in ("model", "checkpoints/step-00000012"):
        ours, theirs = SafetensorsFolder(out / name), SafetensorsFolder(reference / name)
        assert ours.names == theirs.names
        different = [each for each in ours.names if not torch.equal(ours.get(each), theirs.get(each))]
        assert not different
    records = [
        [{key: value for key, value in record.items() if key not in TIMED} for record in read_metrics(run)]
        for run in (out / "metrics.jsonl", reference / "metrics.jsonl")
    ]
    assert records[0] == records[1]
    figures = [json.loads((run / "manifest.json").read_text())["figures"] for run in (out, reference)]
    assert figures[0] == figures[1]


def after_step(monkeypatch, step: int, action) -> None:
    """Call `action` inside optimizer step number `step` of this process."""
    steps = iter(range(1, 1000))
    original = Engine.step

    def wrapped(engine, lr, veto):
        result = original(engine, lr, veto)
        if next(steps) == step:
            action()
        return result

    monkeypatch.setattr(Engine, "step", wrapped)


def test_a_whole_run(reference):
    manifest = json.loads((reference / "manifest.json").read_text())
    assert manifest["figures"]["steps"] == 12
    assert manifest["figures"]["sequences"] == 48
    assert manifest["figures"]["skipped_steps"] == 0
    assert manifest["figures"]["validation_after"]["held_out"] < manifest["figures"]["validation_before"]["held_out"]
    assert any(path.endswith("base/model.safetensors") for path in manifest["inputs"])
    assert any(path.endswith("domain/manifest.json") for path in manifest["inputs"])

    trained = read_metrics(reference / "metrics.jsonl", "train")
    assert [record["step"] for record in trained] == list(range(1, 13))
    assert trained[-1]["tokens"] == manifest["figures"]["tokens"]
    assert trained[2]["lr"] == pytest.approx(3e-3)
    for record in trained:
        assert set(record["losses"]) == {"domain", "general"}
        low, high = sorted(record["losses"].values())
        assert low <= record["loss"] <= high
        assert "mfu" not in record
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
    assert [record["step"] for record in read_metrics(reference / "metrics.jsonl", "validation")] == [0, 6, 12]
    assert [path.name for path in list_checkpoints(reference / "checkpoints")] == ["step-00000012", "step-00000008"]
    assert (reference / "model" / "tokenizer.json").is_file()


def test_validation_loss_is_that_of_the_exported_model(reference):
    from steep.data import SequentialLoader

    loader = SequentialLoader(reference.parent / "held_out", 64, 2)
    engine = Engine.load(reference / "model")
    batches = [loader.batch_at(2 * (k * loader.num_batches // 4)) for k in range(4)]  # 8 sequences, evenly spread
    nll = sum(engine.eval_nll(batch).nll.item() for batch in batches)
    last = read_metrics(reference / "metrics.jsonl", "validation")[-1]
    assert last["counts"]["held_out"] == sum(batch.num_valid for batch in batches)
    assert last["losses"]["held_out"] == pytest.approx(nll / last["counts"]["held_out"], rel=1e-6)


def test_a_finished_run_is_left_alone(reference):
    before = (reference / "manifest.json").read_bytes()
    manifest = train(parse_recipe(make_recipe(reference.parent)))
    assert manifest == json.loads(before)
    assert (reference / "manifest.json").read_bytes() == before


def train_quietly(values: dict) -> None:
    torch.set_num_threads(1)
    train(parse_recipe(values))


def test_killed_at_thirty_moments_the_run_is_the_same_to_the_bit(root, reference):
    """SIGKILL, again and again: wherever the process is, and while a checkpoint or an export is half-written;
    then to the end. Processes are forked from a server that has imported everything, so a kill costs a second."""
    out = root / "out"
    values = make_recipe(root, checkpoint={"every": 1, "keep": 2, "background": True}, export={"every": 2})
    moments, hits = random.Random(4), 0

    def half_written() -> set[Path]:
        return {path for folder in (out, out / "checkpoints", out / "exports") for path in folder.glob(".*")}

    for kill in range(30):
        if (out / "manifest.json").is_file():  # the run came to its end between two kills: once more from the start
            assert_same_run(out, reference)
            shutil.rmtree(out)
        before = half_written()
        process = forkserver().Process(target=train_quietly, args=(values,))
        process.start()
        if kill % 2:
            process.join(moments.uniform(0.0, 1.5))
        else:  # as soon as a folder is being written, or a little later
            deadline = time.monotonic() + 20
            while process.is_alive() and time.monotonic() < deadline:
                if half_written() - before:
                    time.sleep(moments.uniform(0.0, 0.01))
                    hits += 1
                    break
        process.kill()
        process.join()
        assert not (out / "model").exists() or (out / "model" / "manifest.json").is_file()
    assert hits > 5
    train(parse_recipe(values))
    assert_same_run(out, reference)
    assert not list(out.rglob(".*"))


def test_termination_finishes_the_step_and_resumes_bitwise(root, reference, monkeypatch):
    recipe = parse_recipe(make_recipe(root))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    after_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as exit:
        train(recipe)
    assert exit.value.code == 0  # a scheduler is to queue it again
    assert list_checkpoints(root / "out" / "checkpoints")[0].name == "step-00000005"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (root / "out" / "model").exists()
    train(recipe)
    shutil.rmtree(root / "out" / "checkpoints" / "step-00000008")
    assert_same_run(root / "out", reference)


def test_second_interrupt_acts_at_once(root, monkeypatch):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_step(monkeypatch, 2, interrupt_twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            train(parse_recipe(make_recipe(root)))
    finally:
        signal.signal(signal.SIGINT, before)


def test_damaged_checkpoint_falls_back_to_the_one_before(root, reference, monkeypatch, capsys):
    recipe = parse_recipe(make_recipe(root))
    after_step(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(recipe)
    newest = root / "out" / "checkpoints" / "step-00000010"
    (newest / "model.safetensors").write_bytes(b"cut")
    train(recipe)
    output = capsys.readouterr().out.replace("\n", "")
    assert "step-00000010 is damaged and not used" in output
    assert "step-00000008" in output
    assert_same_run(root / "out", reference)


def test_bf16_resumes_bitwise_too(root, monkeypatch):
    changes = {"precision": "bfloat16", "export": {"dtype": "bfloat16"}, "steps": 6, "schedule": {"lr": 3e-3}}
    straight = make_recipe(root, **changes, out=str(root / "straight"))
    stopped = make_recipe(root, **changes, out=str(root / "stopped"))
    train(parse_recipe(straight))
    after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(parse_recipe(stopped))
    train(parse_recipe(stopped))
    states = [SafetensorsFolder(root / name / "checkpoints" / "step-00000006") for name in ("straight", "stopped")]
    assert any("remainder" in name for name in states[0].names)
    assert all(torch.equal(states[0].get(name), states[1].get(name)) for name in states[0].names)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"master": "none", "moments": "8bit"}, "recompute": "selective"},
        {"optimizer": {"in_backward": True, "max_grad_norm": None}, "batch": {"sequences": 4}},
        {"optimizer": {"offload": True}, "recompute": "full", "float8": "rowwise"},
    ],
)
def test_what_saves_memory_trains_and_resumes(root, monkeypatch, changes):
    values = {"precision": "bfloat16", "steps": 8, "schedule": {"lr": 1e-2}, "export": {"dtype": "bfloat16"}, **changes}
    train(parse_recipe(make_recipe(root, **values, out=str(root / "straight"))))
    losses = [record["loss"] for record in read_metrics(root / "straight" / "metrics.jsonl", "train")]
    assert losses[-1] < losses[0] - 0.5
    stopped = parse_recipe(make_recipe(root, **values, out=str(root / "stopped")))
    after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(stopped)
    train(stopped)
    states = [SafetensorsFolder(root / name / "checkpoints" / "step-00000008") for name in ("straight", "stopped")]
    assert all(torch.equal(states[0].get(name), states[1].get(name)) for name in states[0].names)


def interrupted(root: Path, monkeypatch) -> dict:
    """A run stopped after step 5; the values of its recipe."""
    values = make_recipe(root)
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(parse_recipe(values))
    return values


def test_resume_refuses_what_would_change_the_run(root, monkeypatch):
    values = interrupted(root, monkeypatch)
    changes = [
        ({"steps": 14}, r"steps \(was 12, now 14\)"),
        ({"schedule": {**values["schedule"], "lr": 1e-3}}, r"schedule\.lr \(was 0\.003, now 0\.001\)"),
        ({"batch": {"sequences": 4, "micro_batches": 1}}, r"batch\.micro_batches .*; batch\.sequences"),
        ({"optimizer": {"eps": 1e-6}}, r"optimizer\.eps"),
        ({"data": {**values["data"], "seed": 8}}, r"data\.seed \(was 7, now 8\)"),
        ({"data": {**values["data"], "packing": "concat"}}, r"data\.packing"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            train(parse_recipe({**values, **change}))

    shutil.rmtree(root / "general")
    make_store(root / "general", root / "base", seed=9)
    with pytest.raises(ValueError, match=r"data \(the stores hold other tokens\)"):
        train(parse_recipe(values))


def test_resume_refuses_another_model(root, monkeypatch):
    values = interrupted(root, monkeypatch)
    config = root / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"model \(.*base holds other files\)"):
        train(parse_recipe(values))


def test_resume_allows_reporting_and_appended_phases(root, reference, monkeypatch):
    values = interrupted(root, monkeypatch)
    phases = [{"start": 40, "weights": {"general": 1}}]
    again = {**values, "data": {**values["data"], "phases": phases}, "checkpoint": {"every": 3}, "log": {"every": 2}}
    manifest = train(parse_recipe(again))
    ours, theirs = (read_metrics(out / "metrics.jsonl", "train") for out in (root / "out", reference))
    assert [record for record in ours if record["step"] <= 5] == [
        {**record, **{key: mine[key] for key in TIMED}} for record, mine in zip(theirs[:5], ours)
    ]
    assert set(ours[-1]["losses"]) == {"general"}
    assert manifest["config"]["recipe"]["data"]["phases"] == phases


def test_exports_and_lengths(root):
    values = make_recipe(root, export={"every": 1, "dtype": "bfloat16"}, batch={"sequences": 2, "micro_batches": 3})
    values["schedule"] = {"kind": "constant", "lr": 1e-3}
    del values["steps"]
    manifest = train(parse_recipe({**values, "tokens": 64 * 6 + 1}))  # 6 sequences of 64 are one step
    assert manifest["figures"]["steps"] == 2
    for name in ("exports/step-00000001", "exports/step-00000002", "model"):
        folder = SafetensorsFolder(root / "out" / name)
        assert {folder.dtype(tensor) for tensor in folder.names} == {torch.bfloat16}
        assert json.loads((root / "out" / name / "manifest.json").read_text())["provenance"]["step"] in (1, 2)

    from steep.data import BatchLoader

    recipe = parse_recipe({**values, "epochs": 0.5, "out": str(root / "epochs"), "export": {}})
    sequences = sum(packing.num_seqs for packing in BatchLoader.from_config(recipe.data, 2).packings)
    assert train(recipe)["figures"]["steps"] == -(-sequences // 2 // 6)


def poison_steps(monkeypatch, bad: set[int], factor: float = float("nan")) -> None:
    """Put NaN, or another value, into the gradient of these steps of this process."""
    steps = iter(range(1, 1000))
    original = Engine.step

    def wrapped(engine, lr, veto):
        if next(steps) in bad:
            next(engine.decoder.parameters()).grad[0, 0] = factor
        return original(engine, lr, veto)

    monkeypatch.setattr(Engine, "step", wrapped)


def test_bad_steps_are_skipped_and_counted(root, monkeypatch):
    poison_steps(monkeypatch, {2, 3, 7})
    manifest = train(parse_recipe(make_recipe(root, max_consecutive_skips=3, log={"every": 4})))
    assert manifest["figures"]["skipped_steps"] == 3
    records = read_metrics(root / "out" / "metrics.jsonl", "train")
    assert [record["skipped"] for record in records] == [2, 1, 0]
    assert all(record["loss"] < 6 for record in records)
    skips = read_metrics(root / "out" / "metrics.jsonl", "skip")
    assert [(record["step"], record["reason"]) for record in skips] == [(n, "not finite") for n in (2, 3, 7)]
    assert [record["samples"] for record in skips] == [[4, 7], [8, 11], [24, 27]]
    assert SafetensorsFolder(root / "out/checkpoints/step-00000012").get("optimizer.step").item() == 9


def test_spikes_are_skipped_and_leave_no_trace(root, monkeypatch):
    """A finite but absurd gradient is skipped, also right after a resume: what the guard knows is in the checkpoint."""
    values = make_recipe(root, spikes={"factor": 6.0, "min_steps": 3}, checkpoint={"every": 1, "keep": 2})
    with monkeypatch.context() as patch:
        poison_steps(patch, {5}, 1e4)
        after_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(parse_recipe(values))
    poison_steps(monkeypatch, {1, 2}, 1e4)  # steps 7 and 8 of the run
    assert train(parse_recipe(values))["figures"]["skipped_steps"] == 3
    skips = read_metrics(root / "out" / "metrics.jsonl", "skip")
    assert [(record["step"], record["reason"]) for record in skips] == [(n, "spike") for n in (5, 7, 8)]
    assert SafetensorsFolder(root / "out/checkpoints/step-00000012").get("spikes.accepted").item() == 9


def test_many_bad_steps_in_a_row_stop_the_run(root, monkeypatch):
    poison_steps(monkeypatch, {6, 7, 8})
    with pytest.raises(TrainingDiverged, match=r"step 8: 3 steps in a row were skipped .* norm of nan"):
        train(parse_recipe(make_recipe(root, max_consecutive_skips=3)))
    assert [path.name for path in list_checkpoints(root / "out" / "checkpoints")] == ["step-00000004"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.sources.0.store": "nowhere"}, "nowhere"),
        ({"data.validation.0.store": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
        ({"data.seq_len": 256}, r"data\.seq_len: 256 is longer than .*max_position_embeddings, 128"),
        ({"schedule.warmup_steps": 13}, "13 warm-up steps do not fit into a run of 12 steps"),
        ({"data.sources.0.max_epochs": 0.1}, "source 'domain': .*max_epochs is 0.1"),
        ({"device": "cuda"}, "device: cuda, but torch sees no GPU"),
        ({"model": "{root}/small"}, "ids, the model's vocabulary 200"),
        ({"model": "{root}/other"}, "made with another tokenizer"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(root, change, message):
    if "cuda" in change.values() and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    make_model(root / "small", vocab_size=200)
    make_model(root / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = root / "other" / name
        file.write_text(file.read_text().replace("</s>", "<eos>"))
    values = make_recipe(root)
    for path, value in change.items():
        *parents, last = path.split(".")
        node = values
        for key in parents:
            node = node[int(key) if key.isdecimal() else key]
        node[last] = value.format(root=root) if isinstance(value, str) else value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(parse_recipe(values))
    assert not (root / "out").exists()


def test_a_folder_with_other_things_is_refused(root):
    (root / "out").mkdir()
    (root / "out" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is not empty and holds no training run"):
        train(parse_recipe(make_recipe(root)))
    assert [path.name for path in (root / "out").iterdir()] == ["thesis.tex"]


def module(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "steep.engine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_module_reports_mistakes_in_one_line(root):
    several = module(write_recipe(root), WORLD_SIZE="3", RANK="0")
    assert several.returncode == 2
    assert several.stderr == (
        "steep: batch.micro_batches: 2 micro batches over 3 processes; allowed: a multiple of 3, as every process "
        "takes as many as any other\n"
    )
    wrong = module(write_recipe(root), "stpes=3")
    assert wrong.returncode == 2
    assert "stpes: unknown key; did you mean 'steps'?" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert module().returncode == 2
