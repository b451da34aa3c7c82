"""The OBO parser, the split by term, and who is related to whom, on a small hand-made ontology."""

import pytest

from steep.cli.demo_ontology import Relatives, in_sentence, is_held_out, ontology_version, parse_obo

OBO = """format-version: 1.2
data-version: hp/releases/2025-01-16

[Term]
id: T:1
name: All

[Term]
id: T:2
name: Nail anomaly
def: "Any anomaly of the \\"nail\\",\\n in short." [https://example.org, PMID:1]
synonym: "Nail defect" EXACT []
synonym: "nail anomaly" EXACT layperson []
synonym: "NA" EXACT abbreviation []
synonym: "Digit anomaly" BROAD []
synonym: "Bad nails" EXACT layperson [https://example.org]
is_a: T:1 ! All

[Term]
id: T:3
name: Pitted nail
def: "Small pits." []
is_a: T:2 {source="x"} ! Nail anomaly

[Term]
id: T:4
name: Ridged nail
is_a: T:2 ! Nail anomaly

[Term]
id: T:5
name: Old nail
is_a: T:2
is_obsolete: true

[Term]
id: T:6
name: Hair anomaly
is_a: T:1 ! All

[Term]
id: T:7
name: White hair
is_a: T:6 ! Hair anomaly

[Term]
id: T:8
name: Deeply pitted nail
is_a: T:3
is_a: T:2

[Typedef]
id: part_of
name: part of
"""


def test_terms_are_read_with_escapes_and_exact_synonyms_only() -> None:
    terms, obsolete = parse_obo(OBO)
    assert list(terms) == ["T:1", "T:2", "T:3", "T:4", "T:6", "T:7", "T:8"]
    assert obsolete == 1
    nail = terms["T:2"]
    assert nail.definition == 'Any anomaly of the "nail", in short.'
    assert nail.synonyms == ("Nail defect", "Bad nails")
    assert nail.parents == ("T:1",)
    assert terms["T:3"].parents == ("T:2",)
    assert (terms["T:4"].definition, terms["T:4"].synonyms) == ("", ())
    assert ontology_version(OBO) == "hp/releases/2025-01-16"
    assert ontology_version("format-version: 1.2\n") == "unknown"


@pytest.mark.parametrize(
    ("stanza", "message"),
    [
        ("[Term]\nid: T:1\n", "lacks id or name"),
        ("[Term]\nname: x\n", "lacks id or name"),
        ("[Term]\nid: T:1\nname: x\ndef: unquoted text\n", "T:1: not a quoted string"),
    ],
)
def test_damaged_stanzas_are_refused(stanza: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_obo(stanza)


def test_near_terms_are_siblings_then_cousins_and_never_kin() -> None:
    relatives = Relatives(parse_obo(OBO)[0])
    assert relatives.ancestors("T:8") == {"T:1", "T:2", "T:3"}
    near = relatives.near("T:3")  # sibling T:4; T:8 is its child; cousin T:7; T:6 is its aunt, not a cousin
    assert near == ["T:4", "T:7"]
    assert set(relatives.near("T:8")) == {"T:4", "T:7"}  # T:3 is its parent as well as its sibling


def test_split_depends_on_the_id_alone_and_holds_out_a_tenth() -> None:
    ids = [f"HP:{number:07d}" for number in range(20_000)]
    held_out = [identity for identity in ids if is_held_out(identity)]
    assert 0.09 < len(held_out) / len(ids) < 0.11
    assert held_out[:3] == ["HP:0000007", "HP:0000023", "HP:0000043"]


@pytest.mark.parametrize(
    ("name", "inside"),
    [("Renal cyst", "renal cyst"), ("IgA deficiency", "IgA deficiency"), ("X-linked", "X-linked"), ("ADHD", "ADHD")],
)
def test_names_inside_a_sentence(name: str, inside: str) -> None:
    assert in_sentence(name) == inside
