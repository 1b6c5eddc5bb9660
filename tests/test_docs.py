"""What the documentation says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

import adapters
import pytest
import sums
import yaml

from shine import Shine
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
        name = {"msmarco_v1": "msmarco", "msmarco_v2": "msmarco", "squad_unseen": "squad"}.get(file.stem, file.stem)
        if name in catalogue:
            assert get == f"`sh scripts/download_data.sh {name}`"
            assert repository == f"`{catalogue[name]['repository']}`"
            assert folder == f"`{yaml.safe_load(file.read_text())['path'].replace('${oc.env:SHINE_DATA,data}', 'data')}`"
            assert all("not measured" in cell or re.search(r"\d", cell) or cell == "–" for cell in others[2:])
        else:
            assert file.stem in ("folder", "gaps", "jsonl", "recitations", "stories", "worlds")


# Inputs plus outputs of all linears of one layer, times the layers: q, k, v, o, then gate, up, down.
SUMS = {
    "cpu-world": 5376,
    "smollm2-135m": 30 * ((576 + 576) + 2 * (576 + 192) + (576 + 576) + 3 * (576 + 1536)),
    "Qwen3-0.6B": 28 * ((1024 + 2048) + 2 * (1024 + 1024) + (2048 + 1024) + 3 * (1024 + 3072)),
    "Qwen3-1.7B": 28 * ((2048 + 2048) + 2 * (2048 + 1024) + (2048 + 2048) + 3 * (2048 + 6144)),
    "Qwen3-8B": 36 * ((4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 12288)),
}


def test_the_sizes_of_adapters_follow_from_the_shapes() -> None:
    """Each row of the table, by hand; what was run says so."""
    text = (ROOT / "docs" / "adapters.md").read_text().split("## Size, time, memory", 1)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]
    assert {row[0] for row in rows} == set(SUMS)
    for name, rank, values, half, single, _, tokens, seconds, peak, how in rows:
        assert int(values.replace(",", "")) == SUMS[name] * int(rank)
        for shown, width in ((half, 2), (single, 4)):
            number, unit = shown.split()
            size = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
            assert abs(size / (width * SUMS[name] * int(rank)) - 1) < 0.01
        assert (how == "computed") == (tokens == seconds == peak == "—")
        assert how == "run" or name.startswith("Qwen3")


def test_the_table_is_what_its_program_computes() -> None:
    text = (ROOT / "docs" / "adapters.md").read_text()
    assert adapters.table([adapters.computed("Qwen3-0.6B", 16)]).splitlines()[-1] in text.splitlines()


@pytest.mark.parametrize(
    ("page", "number", "printed", "saved"),
    [
        ("README.md", 1, "", 1),
        ("docs/adapters.md", 1, "Selkirk", 1),
        ("docs/adapters.md", 2, "[('notes', 2, None), ('people', 1, None)]\n4\n", 1),
        ("docs/adapters.md", 3, "Selkirk", 0),
    ],
)
def test_the_python_of_the_pages_runs(
    page: str,
    number: int,
    printed: str,
    saved: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = (ROOT / page).read_text().split("```python\n")[number].split("```", 1)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.startswith(printed)
    assert len(list(tmp_path.glob("adapters/*"))) == saved


def test_sums_are_scored_by_their_program() -> None:
    """A slice of it: single contexts are known, sums of several are not, and the mean is better than the sum."""
    shine = Shine.from_pretrained("cpu-world", device="cpu")
    one, three = (sums.score(shine, contexts=6, joined=joined) for joined in (1, 3))
    assert one.questions == three.questions > 20
    assert one.sum == one.mean > 0.7 * one.questions
    assert three.sum < three.mean < one.mean
    first, _, *rows = sums.table([one, three]).splitlines()
    assert first == "| contexts joined | 1 | 3 |"
    assert rows == [f"| the sum | {one.sum} | {three.sum} |", f"| the mean (`strength` one over the number) | | {three.mean} |"]
