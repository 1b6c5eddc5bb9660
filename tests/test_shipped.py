"""The CPU world that is shipped, and the demo that shows it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from shine.data.worlds import World, guess_rate
from shine.zoo import ASSETS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shipped_files_are_small() -> None:
    assert sum(file.stat().st_size for file in (ASSETS / "cpu-world").rglob("*") if file.is_file()) < 20e6


def test_knowledge_travels_through_the_weights(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On unseen contexts SHINE answers far beyond guessing; Only Question does not. (All 200 contexts: docs/results.md.)"""
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    scores = demo.score("test", 120)
    kinds = [turn.kind for example in World(seed=3000).examples(120) for turn in example.turns]
    guess = sum(map(guess_rate, kinds)) / len(kinds)
    assert guess <= 20
    assert abs(scores["only_question"]["em"] - guess) <= 5
    assert scores["shine"]["em"] >= 80
    assert scores["shine"]["contexts_encoded"] == 120


@pytest.mark.slow
def test_the_readme_has_the_figures_of_this_code(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 200 contexts, single questions and conversations; a tenth of a point is one answer of 987."""
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    found = {door: demo.score(door, 200) for door in ("test", "test_pwc")}
    titles = {"Only Question": "only_question", "In-Context": "in_context", "**SHINE**": "shine"}
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = {cells[0]: cells[1:] for cells in rows if len(cells) == 3 and cells[0] in titles}
    assert set(shown) == set(titles)
    for title, method in titles.items():
        for door, text in zip(found, shown[title], strict=True):
            assert float(text.strip("*")) == pytest.approx(found[door][method]["em"], abs=0.31), (title, door)


def test_the_demo_runs_to_its_report(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "SHORT", {"pretrain": 3, "mqa": 3, "1qa": 3})
    monkeypatch.setattr(demo, "DOORS", {"test_pretrain": 4, "test_pwc": 4, "test": 4})
    demo.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["methods"]) == {"shine", "in_context", "only_question"}
    assert all(set(scores) == {"em", "f1"} for scores in report["methods"].values())
    assert report["seconds"] > 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
