"""docs/merging.md: its table of methods is that of the code."""

import re
from pathlib import Path

from steep.merge.method_table import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "merging.md"


def test_the_table_has_every_method_with_its_parameters() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*)\|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    written = {name: {entry.strip() for entry in entries.split(",") if entry.strip()} for name, entries in rows}
    expected = {
        name: {key + "!" * (default is None) for key, default in (method.shared | method.per_model).items()}
        for name, method in METHODS.items()
    }
    assert written == expected
