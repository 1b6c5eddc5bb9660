"""The judge, against a real server on loopback that misbehaves."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai_server import Behaviour, Call, Hang, Refuse, Say, Send, openai_server

from shine.cli.main import main
from shine.config import RemoteConfig
from shine.evaluation import report
from shine.evaluation.judge import judge
from shine.evaluation.report import Run
from shine.evaluation.results import PREDICTIONS_FILE

ROOT = Path(__file__).resolve().parent.parent
PATIENT = RemoteConfig(model="grader/1", concurrency=3, attempts=2, timeout=0.5, first_wait=0.01, longest_wait=0.05)


def write_answers(folder: Path, answers: list[str]) -> None:
    rows = [
        {"source": "s", "method": "shine", "id": f"c{n}", "turn": 0, "question": "Who?", "answers": ["Ada"], "prediction": answer}
        for n, answer in enumerate(answers)
    ]
    (folder / PREDICTIONS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_of(call: Call) -> str:
    return call.text.split("<answer>\n")[1].split("\n</answer>")[0]


def verdict(call: Call, attempt: int) -> Behaviour:
    return Say(json.dumps({"correct": answer_of(call) == "Ada", "reason": "looked"}))


def run(folder: Path, behave: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[Call]]:
    with openai_server(behave) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        summary = judge(folder, PATIENT, say=lambda text: None)
        assert server.most_at_once <= PATIENT.concurrency
        return summary, server.calls


def test_a_failed_call_is_no_wrong_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """429, 500, a hanging server and broken JSON, once or for ever; what never came is failed, and asked for again later."""
    write_answers(tmp_path, ["Ada", "Bo", "busy", "broken", "hangs", "mute"])

    def behave(call: Call, attempt: int) -> Behaviour:
        match answer_of(call), attempt:
            case "busy", 1:
                return Refuse(429)
            case "broken", 1:
                return Say('{"correct": "perhaps"}')
            case "hangs", _:
                return Hang()
            case "mute", _:
                return Refuse(500) if attempt == 1 else Send(b"{")
        return verdict(call, attempt)

    summary, calls = run(tmp_path, behave, monkeypatch)
    found = summary["sources"]["s"]["shine"]
    assert (found["judged"], found["failed"], found["correct"]) == (4, 2, 25.0)
    assert summary["judge"] == "grader/1"
    assert len(summary["prompt_sha256"]) == 64
    assert calls[0].messages[0] == {"role": "system", "content": summary["prompt"]}
    again, calls = run(tmp_path, verdict, monkeypatch)
    assert sorted(map(answer_of, calls)) == ["hangs", "mute"]
    assert again["sources"]["s"]["shine"] | {"interval": None} == {"judged": 6, "failed": 0, "correct": 100 / 6, "interval": None}
    _, calls = run(tmp_path, verdict, monkeypatch)
    assert calls == []


def test_another_prompt_or_other_answers_are_judged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answers(tmp_path, ["Ada", "Bo"])
    run(tmp_path, verdict, monkeypatch)
    write_answers(tmp_path, ["Ada", "Cy"])
    _, calls = run(tmp_path, verdict, monkeypatch)
    assert [answer_of(call) for call in calls] == ["Cy"]
    with openai_server(verdict) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        judge(tmp_path, PATIENT, prompt="Be strict.", say=lambda text: None)
        assert len(server.calls) == 2
    assert len(list(tmp_path.glob("judge-grader-1-*.json"))) == 2


def test_only_answers_can_be_judged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no predictions\.jsonl; name the output folder"):
        judge(tmp_path, PATIENT, say=lambda text: None)
    for text in ("", '{"source": "s", "method": "shine", "id": "c", "task": "complete", "prediction": "Ada"}\n'):
        (tmp_path / PREDICTIONS_FILE).write_text(text)
        with pytest.raises(ValueError, match="holds no answers to questions; name the output folder"):
            judge(tmp_path, PATIENT, say=lambda text: None)


def test_a_judgement_that_was_killed_goes_on(tmp_path: Path) -> None:
    """By a signal that nothing can catch, in the midst: what was said stays, nothing is asked twice, and the sum is the same."""
    write_answers(tmp_path, ["Ada"] * 4 + ["Bo"] * 8)
    command = [sys.executable, "-m", "shine.cli.main", "judge", str(tmp_path), "--model", "grader/1", "--concurrency", "1"]

    def slowly(call: Call, attempt: int) -> Behaviour:
        return Say(json.dumps({"correct": answer_of(call) == "Ada", "reason": "looked"}), seconds=0.05)

    with openai_server(slowly) as server:
        environment = {**os.environ, **server.environment}
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while len(server.calls) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        assert process.poll() is None
        process.kill()
        process.wait()
        (file,) = tmp_path.glob("judge-*.jsonl")
        kept = sum(line.endswith(b"\n") for line in file.read_bytes().splitlines(keepends=True))
        assert 2 <= kept < 12
        assert not list(tmp_path.glob("judge-*.json"))
        before = len(server.calls)
        assert subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
        assert len(server.calls) - before == 12 - kept
    (summary,) = (json.loads(place.read_text()) for place in tmp_path.glob("judge-*.json"))
    found = summary["sources"]["s"]["shine"]
    assert (found["judged"], found["failed"], found["correct"]) == (12, 0, pytest.approx(100 / 3))


def test_the_command_judges_and_the_page_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its flags reach the server; the table on the console and the report's two tables have the shares, counted by hand."""
    said = {"shine": ["Ada", "Ada", "Bo"], "in_context": ["Ada", "Bo", "mute"]}
    values = {"source": "s", "turn": 0, "question": "Who?", "answers": ["Ada"]}
    rows = [
        {**values, "method": method, "id": f"c{n}", "prediction": answer}
        for method, answers in said.items()
        for n, answer in enumerate(answers)
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / PREDICTIONS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "strict.txt").write_text("Be strict.")

    def behave(call: Call, attempt: int) -> Behaviour:
        return Refuse(500) if answer_of(call) == "mute" else verdict(call, attempt)

    with openai_server(behave) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        flags = [
            "--prompt",
            str(tmp_path / "strict.txt"),
            "--options",
            '{"temperature": 0.5}',
            "--attempts",
            "1",
            "--concurrency",
            "2",
        ]
        assert main(["judge", str(folder), "--model", "grader/1", *flags]) == 0
        assert len(server.calls) == 6
        assert all(call.messages[0]["content"] == "Be strict." for call in server.calls)
        assert all(call.body["temperature"] == 0.5 for call in server.calls)
        assert server.most_at_once <= 2
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["s", "SHINE", "66.7"] in [cells[:3] for cells in shown]
    assert any(cells[:3] == ["s", "In-Context", "50.0"] and cells[-2:] == ["2", "1"] for cells in shown)
    summary = json.loads(next(folder.glob("judge-*.json")).read_text())
    run = Run("run", {}, rows, [summary])
    page = list(report._judge_tables([run]))
    digest = hashlib.sha256(b"Be strict.").hexdigest()[:8]
    assert any(line.startswith(f"| run | grader/1 | {digest} | s | SHINE | 66.7 [") and line.endswith("| 3 | 0 |") for line in page)
    assert any("| In-Context | 50.0 [" in line and line.endswith("| 2 | 1 |") for line in page)
    # On c0 and c1, which are judged for both: two right against one.
    assert any("| SHINE − In-Context | +50.0 [+0.0, +100.0] | 2 |" in line for line in page)
    assert summary["differences"]["s"]["shine - in_context"]["value"] == 50.0
