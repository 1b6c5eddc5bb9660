"""What the documentation says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_fault_has_a_test_that_exists() -> None:
    """Each row of the table names at least one, and each of those is defined somewhere under tests/."""
    text = (ROOT / "docs" / "training.md").read_text()
    table = text.split("## What happens when", 1)[1]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    defined = {
        name for file in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(rows) > 15
    for row in rows:
        fault, happens, tests = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.findall(r"`(test_\w+)`", tests)
        assert fault
        assert happens
        assert named, row
        assert not [name for name in named if name not in defined], row
