"""The medical ontology of `steep demo`: OBO text to terms, their relatives, and the split by term.

Pure functions of their input; knows the Python standard library only.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One term of the ontology: `synonyms` are exact ones, `parents` the ids it `is_a`, `definition` may be empty."""

    id: str
    name: str
    definition: str
    synonyms: tuple[str, ...]
    parents: tuple[str, ...]


# Abbreviations, spellings and plurals name the same thing without saying anything new.
_SYNONYM_TYPES = ("", "layperson")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(.*)')


def parse_obo(text: str) -> tuple[dict[str, Term], int]:
    """The terms of an OBO 1.2 file by id, in file order, and how many more are obsolete and left out.

    Raises:
        ValueError: a [Term] stanza without id or name, or a definition or synonym that is not a quoted string.
    """
    terms: dict[str, Term] = {}
    obsolete = 0
    for stanza in re.split(r"\n\s*\n", text):
        lines = stanza.strip().splitlines()
        if not lines or lines[0].strip() != "[Term]":
            continue
        tags: dict[str, list[str]] = defaultdict(list)
        for line in lines[1:]:
            tag, _, value = line.partition(":")
            tags[tag].append(value.strip())
        if not tags["id"] or not tags["name"]:
            raise ValueError(f"OBO: a [Term] stanza lacks id or name: {' | '.join(lines)[:80]!r}")
        if tags["is_obsolete"] == ["true"]:
            obsolete += 1
            continue
        identity, name = tags["id"][0], tags["name"][0]
        terms[identity] = Term(
            identity,
            name,
            _quoted(identity, tags["def"][0])[0] if tags["def"] else "",
            _exact_synonyms(identity, name, tags["synonym"]),
            tuple(value.split("!")[0].split()[0] for value in tags["is_a"]),
        )
    return terms, obsolete


def _quoted(identity: str, value: str) -> tuple[str, str]:
    """A quoted OBO string, unescaped, and what follows it up to its list of references."""
    match = _QUOTED.match(value)
    if match is None:
        raise ValueError(f"OBO: {identity}: not a quoted string: {value[:60]!r}")
    text = re.sub(r"\\(.)", lambda escape: {"n": " ", "t": " ", "W": " "}.get(escape[1], escape[1]), match[1])
    return " ".join(text.split()), match[2].split("[")[0].strip()


def _exact_synonyms(identity: str, name: str, values: Iterable[str]) -> tuple[str, ...]:
    synonyms: dict[str, str] = {}
    for value in values:
        synonym, kind = _quoted(identity, value)
        scope, _, synonym_type = kind.partition(" ")
        if scope == "EXACT" and synonym_type in _SYNONYM_TYPES and synonym.lower() != name.lower():
            synonyms.setdefault(synonym.lower(), synonym)
    return tuple(synonyms.values())


def ontology_version(text: str) -> str:
    """The `data-version` of an OBO header, which the HPO licence asks to be shown; "unknown" where there is none."""
    match = re.search(r"^data-version: (.+)$", text, re.MULTILINE)
    return match[1].strip() if match else "unknown"


def as_sentence(text: str) -> str:
    """A definition with its full stop."""
    return text if text.endswith((".", "!", "?")) else text + "."


def in_sentence(name: str) -> str:
    """ "Renal cyst" -> "renal cyst", for use inside a sentence; "IgA deficiency" and "X-linked" keep their capitals.

    A name that begins with a person's is lowered too: nothing in the ontology tells it from others.
    """
    first = name.split()[0]
    return name[0].lower() + name[1:] if len(first) > 1 and first[1:].islower() and "-" not in first[:2] else name


def rank(identity: str) -> int:
    """A number in [0, 2**64) from the SHA-256 of a name: the only source of "random" order in the demo."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big")


def is_held_out(identity: str) -> bool:
    """One term in ten is never trained on. A function of the term's id alone."""
    return rank(identity) % 10 == 0


class Relatives:
    """Who is above, below and beside whom, by `is_a`."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self.terms = terms
        self.children: dict[str, list[str]] = defaultdict(list)
        for term in terms.values():
            for parent in term.parents:
                self.children[parent].append(term.id)

    def ancestors(self, identity: str) -> set[str]:
        """Ids of everything that the term is a kind of, itself left out."""
        found: set[str] = set()
        waiting = list(self.terms[identity].parents)
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += self.terms[parent].parents if parent in self.terms else ()
        return found

    def near(self, identity: str) -> list[str]:
        """Ids that could be mistaken for this one: siblings first, then cousins, each group in hashed order.

        The term's own ancestors and descendants are left out: they would be right answers too.
        """
        parents = self.terms[identity].parents
        grandparents = [above for parent in parents if parent in self.terms for above in self.terms[parent].parents]
        siblings = [child for parent in parents for child in self.children[parent]]
        cousins = [child for above in grandparents for aunt in self.children[above] for child in self.children[aunt]]
        above = self.ancestors(identity)
        near: dict[str, None] = {}
        for group in (siblings, cousins):
            for other in sorted(set(group), key=lambda other: rank(f"{identity} {other}")):
                if other != identity and other not in above and identity not in self.ancestors(other):
                    near[other] = None
        return list(near)
