"""``inference.ipynb``, run from top to bottom by a kernel of its own, on the shipped model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from shine.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "inference.ipynb"


@pytest.fixture(scope="module")
def executed() -> Any:
    """The notebook after a run on a CPU."""
    notebook = nbformat.read(NOTEBOOK, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}}
        ).execute()
    return notebook


def printed(notebook: Any) -> list[str]:
    """What the cells say: text they print, pages they show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    assert all(output.output_type in ("stream", "execute_result") for output in outputs), "a cell failed"
    return [output.get("text") or output["data"]["text/markdown"] for output in outputs]


def tables(page: str) -> list[list[str]]:
    """The rows of a page's tables, without heads."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0] not in ("question", "---")]


def test_it_runs_and_the_weights_know_the_context(executed: Any) -> None:
    said = printed(executed)
    assert [line.partition(" → ")[2] for line in said[0].splitlines()] == ["baker", "Selkirk", "May"]
    strengths = dict(line.split() for line in said[1].splitlines())
    assert strengths["1.0"] == "baker" != strengths["off"]
    assert said[2].strip() == "baker"
    mine, rows = tables(said[3]), tables(said[4])
    assert [cells[1] for cells in mine] == [cells[2] for cells in mine] == ["mouse", "farmer", "Arlow", "piano", "noodles"]
    assert len(rows) == 19
    assert all(right == in_context for _, right, _, in_context, _ in rows)
    assert sum(right == shine for _, right, shine, _, _ in rows) >= 15
    assert sum(right == only for _, right, _, _, only in rows) <= 5


def test_what_is_stored_is_what_a_run_says(executed: Any) -> None:
    """The outputs in the file are those of this code, without a trace of the machine that made them."""
    stored = nbformat.read(NOTEBOOK, 4)
    assert printed(stored) == printed(executed)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "stderr" not in text
    assert "/tmp" not in text
    assert str(ROOT) not in text


def test_the_command_shows_the_same_page(executed: Any, tmp_path: Path) -> None:
    page = tmp_path / "answers.md"
    main(["converse", "cpu-world", str(ROOT / "examples" / "conversations_cpu_world.jsonl"), "--output", str(page)])
    assert page.read_text(encoding="utf-8") == printed(executed)[4]
