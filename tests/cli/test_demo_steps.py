"""A run that is killed, repeated or changed does what is needed again, and nothing else."""

import json
from pathlib import Path

import pytest

from steep.cli.demo_steps import Steps


class Run:
    """A road of three tiny steps: `first` copies the input, `second` doubles it in a folder, `third` counts it."""

    def __init__(self, out: Path, source: Path) -> None:
        self.out, self.source = out, source
        self.done: list[str] = []
        self.said: list[str] = []
        self.factor = 2
        self.dies_in = ""

    def __call__(self) -> list[str]:
        self.done, self.said = [], []
        steps = Steps(self.out, 3, self.said.append, lambda: 4096)
        steps.run("first", self.first, inputs=[self.source], output=self.out / "first.txt", settings={})
        steps.run(
            "second",
            self.second,
            inputs=[self.out / "first.txt"],
            output=self.out / "second",
            settings={"factor": self.factor},
            resumes=True,
        )
        steps.run("third", self.third, inputs=[self.out / "second"], output=self.out / "third.txt", settings={})
        return self.done

    def first(self) -> None:
        self.act("first")
        (self.out / "first.txt").write_text(self.source.read_text())

    def second(self) -> None:
        folder = self.out / "second"
        folder.mkdir(exist_ok=True)
        partial = folder / "partial"
        self.act("second, resumed" if partial.exists() else "second")
        partial.write_text((self.out / "first.txt").read_text() * self.factor)
        if self.dies_in == "second":
            raise KeyboardInterrupt
        (folder / "manifest.json").write_text(json.dumps({"text": partial.read_text()}))

    def third(self) -> None:
        self.act("third")
        (self.out / "third.txt").write_text(str(len((self.out / "second" / "partial").read_text())))

    def act(self, name: str) -> None:
        self.done.append(name)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    source = tmp_path / "source.txt"
    source.write_text("abc")
    return Run(tmp_path / "out", source)


def test_finished_steps_are_skipped(run: Run) -> None:
    assert run() == ["first", "second", "third"]
    assert (run.out / "third.txt").read_text() == "6"
    assert run() == []
    assert all("done before" in line for line in run.said)


def test_changed_settings_redo_the_step_and_what_follows(run: Run) -> None:
    run()
    run.factor = 3
    assert run() == ["second", "third"]
    assert (run.out / "third.txt").read_text() == "9"


def test_changed_input_redoes_everything_behind_it(run: Run) -> None:
    run()
    run.source.write_text("abcd")
    assert run() == ["first", "second", "third"]


def test_an_equal_result_stops_the_redoing(run: Run) -> None:
    run()
    (run.out / "first.txt").unlink()
    assert run() == ["first"]  # it is what it was, so nothing behind it changes


def test_a_killed_step_goes_on_if_it_can_resume(run: Run) -> None:
    run.dies_in = "second"
    with pytest.raises(KeyboardInterrupt):
        run()
    run.dies_in = ""
    assert run() == ["second, resumed", "third"]


def test_what_a_killed_step_left_is_removed_if_its_inputs_changed(run: Run) -> None:
    run.dies_in = "second"
    with pytest.raises(KeyboardInterrupt):
        run()
    run.dies_in, run.factor = "", 5
    assert run() == ["second", "third"]
    assert (run.out / "third.txt").read_text() == "15"


def test_a_damaged_output_or_record_is_noticed(run: Run) -> None:
    run()
    (run.out / "third.txt").write_text("7")
    assert run() == ["third"]
    (run.out / "steps" / "third.json").write_text("{")
    assert run() == ["third"]
    assert (run.out / "third.txt").read_text() == "6"


def test_records_hold_time_and_memory(run: Run) -> None:
    run()
    record = json.loads((run.out / "steps" / "second.json").read_text())
    assert record["seconds"] >= 0
    assert record["peak_memory_bytes"] == 4096


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        Steps(tmp_path, 1, print, lambda: 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
