"""What an evaluation finds in its folder: its own beginning, which it goes on with, or another's results, which it keeps."""

from __future__ import annotations

import ast
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluation import evaluation_config, write_examples

import shine
from shine.cli.main import main
from shine.config import EvaluationConfig, FineTuningConfig, SourceConfig
from shine.evaluation.results import PLAN_FILE, PREDICTIONS_FILE, SUMMARY_FILE, TIMINGS_FILE, ResultFolder
from shine.evaluation.run import CODE, evaluate

PACKAGE = Path(shine.__file__).parent
CANNOT_CHANGE_AN_ANSWER = {
    "config parsing": "the plan holds their values",
    "checkpoint fingerprint released files hub manifest": "the plan holds the weights that these read, and the backbone they found",
    "data/sources data/examples data/splits data/tally": "the plan holds the examples that these make",
    "data/gaps data/stories data/worlds pieces": "likewise: what examples are invented of, or made of texts",
    "data/grouping data/table": "how samples to train on are laid out",
    "adapter_files provenance": "adapters on disk, which an evaluation neither reads nor writes",
    "evaluation": "only the name of the room",
    "devices": "what is computed on; the plan holds the type that follows",
    "host_memory": "what is done with memory that is free again",
    "training/distributed training/provenance": "which rank computes, and what is noted of the machine",
    "evaluation/results evaluation/scores evaluation/statistics evaluation/tables": "made anew from the predictions each time",
}
"""Modules that an evaluation loads, and why a change of them asks for no new predictions."""


@pytest.fixture
def config(tiny_backbone_folder: str, tmp_path: Path) -> EvaluationConfig:
    write_examples(tmp_path / "mine.jsonl")
    return evaluation_config(tiny_backbone_folder, tmp_path, methods=("only_question", "in_context"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without those below it and the lock."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != ".lock"}


def test_an_evaluation_goes_on_with_what_a_kill_left(config: EvaluationConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of a run, with a line that a kill cut short, is gone on with to the same bytes, and nothing is set aside."""
    evaluate(config)
    folder = Path(config.output)
    file = folder / PREDICTIONS_FILE
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.unlink()
    (folder / "predictions.part-0000.jsonl").write_bytes(b"".join(lines[:4]))
    (folder / "predictions.part-0003.jsonl").write_bytes(b"".join(lines[4:8]) + lines[8][:20])
    capsys.readouterr()
    evaluate(config)
    assert "goes on with" in capsys.readouterr().out
    assert file.read_bytes() == whole
    assert not list(folder.glob("predictions.part-*"))
    assert not (folder / "abandoned").exists()


@pytest.mark.parametrize("change", [{"max_new_tokens": 3}, {"resume": False}], ids=["another key", "begun again"])
def test_another_evaluation_keeps_the_results_that_it_finds(
    change: dict[str, Any], config: EvaluationConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file, byte for byte, with what a judge said of them; the reader is told where, in one line, and can report on it."""
    evaluate(config)
    folder = Path(config.output)
    (folder / "judge-someone-01234567.jsonl").write_text("{}\n")
    before = contents(folder)
    assert {PREDICTIONS_FILE, SUMMARY_FILE, TIMINGS_FILE, PLAN_FILE} < set(before)
    capsys.readouterr()
    evaluate(replace(config, **change))
    (kept,) = (folder / "abandoned").iterdir()
    said = [line for line in capsys.readouterr().out.splitlines() if "begins again" in line]
    assert said == [f"begins again: the evaluation that was in {folder} is in {kept}"]
    assert contents(kept) == before
    assert not list(folder.glob("judge-*")), "what a judge said of other answers is not said of these"
    assert main(["report", str(folder), str(kept), "--output", str(folder / "report")]) == 0


def test_each_evaluation_that_gives_way_has_a_folder_of_its_own(config: EvaluationConfig) -> None:
    """Also an unfinished one, and several within one second."""
    folder = Path(config.output)
    append = ResultFolder.append

    def stopping(self: ResultFolder, *args: Any) -> None:
        append(self, *args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultFolder, "append", stopping)
        for most in (1, 2, 3):
            with pytest.raises(KeyboardInterrupt):
                evaluate(replace(config, max_new_tokens=most))
    evaluate(config)
    kept = sorted((folder / "abandoned").iterdir())
    plans = [json.loads((place / PLAN_FILE).read_text())["config"]["max_new_tokens"] for place in kept]
    assert sorted(plans) == [1, 2, 3]
    assert all((place / "predictions.part-0000.jsonl").read_bytes() for place in kept)


def test_a_kill_while_results_are_set_aside_loses_none(config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each of the moves in turn: whatever is not yet moved is set aside by the next start, not overwritten."""
    evaluate(config)
    folder = Path(config.output)
    before = contents(folder)
    rename, other = Path.rename, replace(config, max_new_tokens=2)

    def once(self: Path, target: Path) -> Path:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", once)
        for _ in range(len(before) - 1):
            moved: list[Path] = []
            with pytest.raises(KeyboardInterrupt):
                evaluate(other)
    evaluate(other)
    found = {name: text for place in (folder / "abandoned").iterdir() for name, text in contents(place).items()}
    assert found == before


def test_predictions_of_other_code_are_not_gone_on_with(
    config: EvaluationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is scored by one rule is not mixed with what was scored by another."""
    file = tmp_path / "metrics.py"
    file.write_text("one rule")
    monkeypatch.setattr("shine.evaluation.run.CODE", (file,))
    evaluate(config)
    evaluate(config)
    assert "goes on with 4 of 4 batches" in capsys.readouterr().out
    file.write_text("another rule")
    evaluate(config)
    assert "begins again" in capsys.readouterr().out


def test_predictions_of_another_library_are_not_gone_on_with(
    config: EvaluationConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(config)
    monkeypatch.setattr("shine.evaluation.run.version", lambda name: "0.1" if name == "rouge" else importlib.metadata.version(name))
    evaluate(config)
    assert "begins again" in capsys.readouterr().out


def test_other_lessons_ask_for_other_predictions(
    config: EvaluationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of conversations that fine-tuning learns from has the name that it had, and other content."""
    lessons = tmp_path / "lessons.jsonl"
    lessons.write_bytes((tmp_path / "mine.jsonl").read_bytes())
    tuning = FineTuningConfig(source=SourceConfig(kind="jsonl", path=str(lessons)), conversations=(1,), epochs=(1,), rank=2)
    tuned = replace(config, methods=("fine_tuning",), fine_tuning=tuning)
    evaluate(tuned)
    lessons.write_text(lessons.read_text().replace('["Ada"]', '["Eve"]'))
    evaluate(tuned)
    assert "begins again" in capsys.readouterr().out


def imports(name: str) -> Iterator[str]:
    """The modules of ours that one imports, also within its functions."""
    for node in ast.walk(ast.parse(_file(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "shine":
            module = str(node.module).replace(".", "/").removeprefix("shine").removeprefix("/")
            inner = [f"{module}/{alias.name}".removeprefix("/") for alias in node.names]
            yield from (place for place in (module, *inner) if place and _file(place).exists())


def _file(name: str) -> Path:
    return PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"


def test_code_that_can_change_an_answer_counts() -> None:
    """All that an evaluation imports, and what that imports: each counts, or stands here with the reason why it need not."""
    loaded, ahead = set(), ["evaluation/run"]
    while ahead:
        name = ahead.pop()
        if name not in loaded:
            loaded.add(name)
            ahead += imports(name)
    loaded = {"data/sources" if name.startswith("data/sources/") else name for name in loaded}
    counted = {str(file.relative_to(PACKAGE).with_suffix("")) for file in CODE}
    excused = {name for names in CANNOT_CHANGE_AN_ANSWER for name in names.split()}
    assert all(file.exists() for file in CODE)
    assert not counted & excused
    assert loaded == counted | excused
