"""The judge, against a real server on loopback that misbehaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_server import Behaviour, Call, Hang, Refuse, Say, Send, openai_server

from shine.config import RemoteConfig
from shine.evaluation.judge import judge
from shine.evaluation.results import PREDICTIONS_FILE

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
