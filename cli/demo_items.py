"""Multiple-choice questions of `steep demo`: a definition is given, its term is to be told from near relatives.

The question is the definition with every word blanked that occurs in any of the four names, so that copying does not
help. Wrong answers are siblings or cousins of the right one, and are trained on, or not, as the right one is: else a
name that the model has merely met more often would look right or wrong for that reason. Pure functions of their input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from .demo_ontology import Relatives, Term, as_sentence, in_sentence, rank

BLANK = "___"
QUESTION = "This is called"  # the model continues with a name; training text says so in the same words
CHOICES = 4
MIN_REMAINING, MAX_WORDS = 6, 60  # content words left in a question; words in a definition

_FUNCTION_WORDS = frozenset(
    {"a", "an", "and", "are", "as", "at", "be", "but", "by", "can", "for", "from", "has", "have", "in", "into", "is"}
    | {"it", "its", "may", "not", "of", "on", "or", "over", "per", "than", "that", "the", "to", "which", "with"}
)


@dataclass(frozen=True)
class Item:
    """One question, to be continued by one of `choices`: `gold` is the right one's place, `choice_ids` their terms."""

    id: str
    question: str
    choices: tuple[str, ...]
    gold: int
    choice_ids: tuple[str, ...]


def content_words(text: str) -> list[str]:
    """Lower-case words of a text that carry meaning: letters and digits, function words left out."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _FUNCTION_WORDS]


def betrays(word: str, hint: str) -> bool:
    """Whether a word gives a hint away: equal to it, a part of it or around it, or of the same stem.

    A stem is what remains of the shorter word without its last three letters, at least four ("dysplasia" and
    "dysplastic"). Words of up to three letters give away only themselves and their plural.
    """
    short, long = sorted((word, hint), key=len)
    if len(short) < 4:
        return long in (short, short + "s")
    return short in long or long.startswith(short[: max(4, len(short) - 3)])


def blank_out(definition: str, names: Iterable[str]) -> tuple[str, int]:
    """The definition with every word blanked that betrays one of the names, and how many content words remain."""
    hints = {word for name in names for word in content_words(name)}
    remaining = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal remaining
        word = match[0].lower()
        if word in _FUNCTION_WORDS:
            return match[0]
        if any(betrays(word, hint) for hint in hints):
            return BLANK
        remaining += 1
        return match[0]

    text = re.sub(r"[A-Za-z0-9]+", replace, definition)
    return re.sub(rf"{BLANK}(?:[\s,/-]*{BLANK})+", BLANK, text), remaining


def make_items(
    relatives: Relatives, candidates: Sequence[str], pool: Set[str], count: int
) -> tuple[list[Item], Counter[str]]:
    """The first `count` candidates that make a question, choices drawn from `pool`, right answers evenly on A to D.

    Returns:
        The items, and an account of the candidates looked at: "kept", and the rest by reason.

    Raises:
        ValueError: fewer than `count` candidates make a question.
    """
    items: list[Item] = []
    account: Counter[str] = Counter()
    for identity in candidates:
        if len(items) == count:
            break
        # The place of the right answer cycles through a hashed order of A to D: balanced, yet with no visible pattern.
        block, place = divmod(len(items), CHOICES)
        gold = sorted(range(CHOICES), key=lambda letter: rank(f"{block} {letter}"))[place]
        item = _make_item(relatives, identity, pool, gold)
        account["kept" if isinstance(item, Item) else item] += 1
        if isinstance(item, Item):
            items.append(item)
    if len(items) < count:
        raise ValueError(f"{len(items)} questions from {len(candidates)} terms, {count} wanted: {dict(account)}")
    return items, account


def _make_item(relatives: Relatives, identity: str, pool: Set[str], gold: int) -> Item | str:
    """The question about a term, or the reason why there is none."""
    term: Term = relatives.terms[identity]
    if len(term.definition.split()) > MAX_WORDS:
        return "definition too long"
    near = [relatives.terms[other] for other in relatives.near(identity) if other in pool]
    # Names of like length: else length alone tells them apart.
    near = [other for other in near if 0.5 <= len(other.name) / len(term.name) <= 2]
    wrong = near[: CHOICES - 1]
    if len(wrong) < CHOICES - 1:
        return "too few near terms"
    choices = [*wrong[:gold], term, *wrong[gold:]]
    question, remaining = blank_out(term.definition, [choice.name for choice in choices])
    if remaining < MIN_REMAINING:
        return "too little left after blanking"
    if any(synonym.lower() in question.lower() for synonym in term.synonyms):
        return "synonym in the definition"
    return Item(
        identity,
        f"{as_sentence(question)} {QUESTION}",
        tuple(in_sentence(choice.name) for choice in choices),
        gold,
        tuple(choice.id for choice in choices),
    )
