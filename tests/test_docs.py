"""What the documentation says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from shine.cli.collect import load

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


def test_every_data_set_has_a_whole_row() -> None:
    """As configs/source/ and the catalogue of downloads have it; a length that nobody measured says so."""
    text = (ROOT / "docs" / "data.md").read_text()
    lines = [line for line in text.split("| source | get it |", 1)[1].split("\n\n", 1)[0].splitlines() if line.startswith("| `")]
    table = {cells[0].strip("`"): cells[1:] for line in lines if (cells := [cell.strip() for cell in line.strip("|").split(" | ")])}
    catalogue = load(ROOT / "configs" / "downloads.yaml")["data"]
    files = sorted((ROOT / "configs" / "source").glob("*.yaml"))
    assert sorted(table) == [file.stem for file in files]
    for file in files:
        get, repository, folder, *others = table[file.stem]
        assert len(others) == 5
        assert all(others)
        name = "msmarco" if file.stem.startswith("msmarco_v") else file.stem
        if name in catalogue:
            assert get == f"`sh scripts/download_data.sh {name}`"
            assert repository == f"`{catalogue[name]['repository']}`"
            assert folder == f"`{yaml.safe_load(file.read_text())['path'].replace('${oc.env:SHINE_DATA,data}', 'data')}`"
            assert all("not measured" in cell or re.search(r"\d", cell) or cell == "–" for cell in others[2:])
        else:
            assert file.stem in ("folder", "jsonl", "stories", "worlds")
