"""Questions: nothing in them gives the answer away, they are balanced, and the same every time."""

from collections import Counter

import pytest

from steep.cli.demo_items import BLANK, CHOICES, QUESTION, betrays, blank_out, content_words, make_items
from steep.cli.demo_ontology import Relatives, Term


@pytest.mark.parametrize(
    ("word", "hint", "does"),
    [
        ("cysts", "cyst", True),
        ("dysplastic", "dysplasia", True),
        ("hypokalemia", "kalemia", True),
        ("ear", "ear", True),
        ("ears", "ear", True),
        ("early", "ear", False),
        ("renal", "reniform", False),
        ("kidney", "renal", False),
        ("iga", "igg", False),
    ],
)
def test_betrays(word: str, hint: str, does: bool) -> None:
    assert betrays(word, hint) is does
    assert betrays(hint, word) is does


def test_blanks_words_of_all_names_and_nothing_else() -> None:
    text, remaining = blank_out(
        "Multiple cysts of the kidney, or a dysplastic kidney-cyst, in both lobes.", ["Renal cyst", "Kidney dysplasia"]
    )
    assert text == f"Multiple {BLANK} of the {BLANK}, or a {BLANK}, in both lobes."
    assert remaining == 3


def ontology(families: int = 12, children: int = 6) -> Relatives:
    """Terms with pronounceable, distinct names: word number n of family f."""
    terms = {"R": Term("R", "Root", "", (), ())}
    for f in range(families):
        terms[f"F{f}"] = Term(f"F{f}", f"Family {f}", "", (), ("R",))
        for n in range(children):
            name = f"{'bcdfghklmnpr'[f]}{'aeiouy'[n]}{'tvzxq'[f % 5]}oid lesion"
            definition = f"The {name} makes one, two, three, four, five, six or seven spots."
            terms[f"T{f}.{n}"] = Term(f"T{f}.{n}", name.capitalize(), definition, ("Spotted thing",), (f"F{f}",))
    return Relatives(terms)


def leaves(relatives: Relatives) -> list[str]:
    return [identity for identity in relatives.terms if identity.startswith("T")]


def test_items_are_balanced_deterministic_and_drawn_from_the_pool() -> None:
    relatives = ontology()
    pool = set(leaves(relatives))
    items, account = make_items(relatives, sorted(pool), pool, 40)
    assert len(items) == account["kept"] == 40
    assert Counter(item.gold for item in items) == dict.fromkeys(range(CHOICES), 10)
    assert [item.gold for item in items[:8]] != [0, 1, 2, 3, 0, 1, 2, 3]
    assert make_items(relatives, sorted(pool), pool, 40) == (items, account)
    for item in items:
        assert item.choice_ids[item.gold] == item.id
        assert len(set(item.choices)) == CHOICES
        assert set(item.choice_ids) <= pool
        assert item.question.endswith(f". {QUESTION}")


def test_no_choice_leaks_into_its_question() -> None:
    relatives = ontology()
    pool = set(leaves(relatives))
    for item in make_items(relatives, sorted(pool), pool, 20)[0]:
        words = content_words(item.question.removesuffix(QUESTION))
        for choice in item.choices:
            assert not [word for word in words for hint in content_words(choice) if betrays(word, hint)]


def test_what_makes_no_question_is_counted_by_reason() -> None:
    relatives = ontology(families=2, children=6)
    relatives.terms["T0.0"] = Term("T0.0", "Batoid lesion", "word " * 61, (), ("F0",))
    relatives.terms["T0.1"] = Term("T0.1", "Betoid lesion", "A betoid lesion.", (), ("F0",))
    relatives.terms["T0.2"] = Term(
        "T0.2", "Bitoid lesion", "Some spotted thing of one or two or three or four parts.", ("Spotted thing",), ("F0",)
    )
    pool = set(leaves(relatives))
    items, account = make_items(relatives, sorted(pool), pool, 9)
    assert len(items) == 9
    assert account == {
        "definition too long": 1,
        "too little left after blanking": 1,
        "synonym in the definition": 1,
        "kept": 9,
    }
    with pytest.raises(ValueError, match="9 questions from 12 terms, 10 wanted"):
        make_items(relatives, sorted(pool), pool, 10)
    with pytest.raises(ValueError, match="'too few near terms': 11"):
        make_items(relatives, sorted(pool), {"T0.0", "T0.1"}, 1)
