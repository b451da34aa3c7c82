"""Publishing: whole or not at all, also when the process is killed or the disk is full."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from steep.data.files import (
    atomic_folder,
    atomic_write,
    hash_inputs,
    make_manifest,
    read_manifest,
    sha256_file,
    sha256_json,
    write_manifest,
)


def run_python(code: str, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, text=True, **options
    )


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic_write(target, "old")
    atomic_write(target, "neü")
    assert target.read_bytes() == "neü".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    atomic_write(target, b"old")
    code = """
        import resource, signal, sys
        from steep.data.files import atomic_write
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            atomic_write(sys.argv[1], bytes(5000))
        except OSError as error:
            print(type(error).__name__)
    """
    process = run_python(code, str(target))
    assert process.communicate()[0].strip() == "OSError"
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_atomic_folder_publishes_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "store"
    with atomic_folder(target) as folder:
        (folder / "part").write_text("1")
        assert not target.exists()
    assert (target / "part").read_text() == "1"
    with pytest.raises(FileExistsError, match="store: already exists"), atomic_folder(target):
        raise AssertionError("the block must not run")


def test_atomic_folder_vanishes_on_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), atomic_folder(tmp_path / "store") as folder:
        (folder / "part").write_text("1")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_replace(tmp_path: Path) -> None:
    target = tmp_path / "store"
    for content in ("1", "2"):
        with atomic_folder(target, replace=True) as folder:
            (folder / content).write_text(content)
    assert [entry.name for entry in target.iterdir()] == ["2"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_killed_writer_publishes_nothing_and_is_cleaned_up_after(tmp_path: Path) -> None:
    code = """
        import sys, time
        from steep.data.files import atomic_folder
        with atomic_folder(sys.argv[1]) as folder:
            (folder / "part").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    target = tmp_path / "store"
    process = run_python(code, str(target))
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_folder(target) as folder:
        (folder / "part").write_text("whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_temporaries_of_living_processes_stay(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "store") as first:
        atomic_write(tmp_path / "other", "x")
        with atomic_folder(tmp_path / "store") as second:
            (second / "a").touch()
        assert first.exists()
        os.rmdir(first)
        first.mkdir()
        (tmp_path / "store" / "a").unlink()


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(tmp_path / "store"):
        raise AssertionError("the block must not run")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == expected
    assert hash_inputs([tmp_path]) == {str(tmp_path / "a"): {"sha256": expected, "bytes": 3}}
    assert sha256_json({"b": 1, "a": "ü"}) == sha256_json(json.loads('{"a": "\\u00fc", "b": 1}'))
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_manifest_round_trip_and_errors(tmp_path: Path) -> None:
    write_manifest(tmp_path, make_manifest("token-store", config={"seq_len": 8}, figures={"tokens": 3}))
    manifest = read_manifest(tmp_path, "token-store")
    assert manifest["config"] == {"seq_len": 8}
    assert manifest["versions"]["python"]
    with pytest.raises(ValueError, match="kind is 'token-store', expected 'merge'"):
        read_manifest(tmp_path, "merge")
    with pytest.raises(FileNotFoundError, match="not a finished artefact"):
        read_manifest(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest.json: is a JSON list"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(tmp_path)
