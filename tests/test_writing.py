"""Conversations written by a model on a real server, which fails, is killed and is asked again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_tokenizer
from filelock import FileLock
from openai_server import Behaviour, Call, OpenAIServer, Refuse, Say, openai_server
from runs import run_program

from shine.cli.collect import load
from shine.config import RemoteConfig, SourceConfig
from shine.data.plans import WritingConfig
from shine.data.sources import read_source
from shine.data.writing import WritingReport, estimate, write_conversations
from shine.parsing import parse

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {
    "write": "WRITE {turns} {context}",
    "support": "SUPPORT {context} Q {question} A {answer}",
    "recall": "RECALL {question}",
}
REMOTE = RemoteConfig("m", attempts=2, first_wait=0.01, longest_wait=0.02, timeout=10)


def model(call: Call, attempt: int) -> Behaviour:
    """Writes three pairs about every context: one good, one that does not follow, one that everybody knows."""
    text = call.text
    if text.startswith("WRITE"):
        number = text.split("{number")[1].split("}")[0]
        pairs = [("Where is X", "in Arlow"), ("Who made X", "nobody"), ("What is X", "a stone")]
        written = [{"question": f"{question}{number}?", "answer": f" {answer} "} for question, answer in pairs]
        return Say(json.dumps({"pairs": written}), usage={"prompt_tokens": 100, "completion_tokens": 30})
    if text.startswith("SUPPORT"):
        return Say(json.dumps({"supported": "Who made" not in text}), usage={"prompt_tokens": 50, "completion_tokens": 5})
    return Say(
        json.dumps({"answer": "A stone." if "What is" in text else "unknown"}), usage={"prompt_tokens": 20, "completion_tokens": 4}
    )


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, behave: Any = model) -> Iterator[OpenAIServer]:
    with openai_server(behave) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def sources(folder: Path, count: int) -> dict[str, SourceConfig]:
    # Braces within a context are text, not marks of the prompt.
    lines = [json.dumps({"context": f"Text {{number{index}}} with {{question}} in it"}) for index in range(count)]
    (folder / "contexts.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    return {"mine": SourceConfig("jsonl", str(folder / "contexts.jsonl"))}


def writing(folder: Path, count: int = 5) -> WritingConfig:
    return WritingConfig(REMOTE, sources(folder, count), **PROMPTS)


def words(text: str) -> int:
    return len(text.split())


def write(config: WritingConfig, output: Path) -> WritingReport:
    return write_conversations(config, output, tokens=words)


def test_only_pairs_that_pass_both_checks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "new" / "conversations.json"
    with serving(monkeypatch) as server:
        report = write(writing(tmp_path), output)
    assert (report.contexts, report.pairs, report.kept, report.unsupported, report.known, report.unchecked) == (5, 15, 5, 5, 5, 0)
    assert report.failures == {"writing": 0, "support": 0, "recall": 0}
    # A context that comes twice is written about once; each pair is checked twice.
    assert len(server.calls) == 5 + 15 + 15
    assert (report.usage.prompt_tokens, report.usage.completion_tokens) == (5 * 100 + 15 * 70, 5 * 30 + 15 * 9)
    items = sorted(json.loads(output.read_text()), key=lambda item: item["context"])
    assert items == [
        {
            "context": f"Text {{number{index}}} with {{question}} in it",
            "conversations": [
                {"role": "user", "content": f"Where is X{index}?"},
                {"role": "assistant", "content": "in Arlow"},
            ],
            "contextlen": 6,
            "conversationlen": 5,
        }
        for index in range(5)
    ]
    own = list(read_source(SourceConfig("jsonl", f"{output}.jsonl")))
    assert sorted(example.context for example in own) == [item["context"] for item in items]
    published = list(read_source(SourceConfig("conversations", str(output))))
    assert [e.turns for e in published] == [e.turns for e in own]


def test_the_recall_check_does_not_see_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as server:
        write(writing(tmp_path, 1), tmp_path / "c.json")
    texts = [call.text for call in server.calls]
    context = "Text {number0} with {question} in it"
    assert texts[0] == f"WRITE 8 {context}"
    assert f"SUPPORT {context} Q Where is X0? A in Arlow" in texts
    assert sorted(text for text in texts if text.startswith("RECALL")) == [
        "RECALL What is X0?",
        "RECALL Where is X0?",
        "RECALL Who made X0?",
    ]


def test_failures_are_counted_kept_apart_and_asked_again_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(call: Call, attempt: int) -> Behaviour:
        if "{number2}" in call.text and call.text.startswith("WRITE"):
            return Say('{"pairs": []}')
        if call.text.startswith("SUPPORT") and "Where is X1" in call.text:
            return Refuse(500)
        return Say("I do not know") if call.text == "RECALL Where is X3?" else model(call, attempt)

    config, output = writing(tmp_path), tmp_path / "c.json"
    with serving(monkeypatch, failing):
        report = write(config, output)
    assert report.failures == {"writing": 1, "support": 1, "recall": 1}
    # What was not checked is not taken for good.
    assert (report.contexts, report.unchecked, report.kept) == (4, 2, 2)
    rows = [json.loads(line) for line in (tmp_path / "c.json.failures.jsonl").read_text().splitlines()]
    assert Counter(row["pass"] for row in rows) == {"writing": 1, "support": 1, "recall": 1}
    assert all(row["attempts"] == 2 and row["reason"] for row in rows)
    with serving(monkeypatch) as server:
        report = write(config, output)
    # The three that failed, and the checks of the context that had no pairs.
    assert len(server.calls) == 3 + 6
    assert (report.contexts, report.unchecked, report.kept) == (5, 0, 5)
    assert (tmp_path / "c.json.failures.jsonl").read_text() == ""
    # What once failed stays to be looked at.
    earlier = (tmp_path / "c.json.failures.earlier.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in earlier] == rows
    with serving(monkeypatch) as server:
        assert write(config, output).kept == 5
    assert server.calls == []


def test_two_runs_on_one_output_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "c.json"
    with serving(monkeypatch) as server, FileLock(f"{output}.lock"):
        with pytest.raises(ValueError, match=r"another process is writing .*c.json: wait until it has ended"):
            write(writing(tmp_path), output)
        assert server.calls == []


def test_what_failed_requests_cost_is_counted_in_this_run_and_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the sum of what the server itself says it charged."""
    charged: list[int] = []

    def failing(call: Call, attempt: int) -> Behaviour:
        if "{number2}" in call.text and call.text.startswith("WRITE"):
            said: Behaviour = Say('{"pairs": []}', usage={"prompt_tokens": 1000, "completion_tokens": 7})
        else:
            said = model(call, attempt)
        assert isinstance(said, Say)
        assert said.usage is not None
        charged.append(said.usage["prompt_tokens"])
        return said

    config, output = writing(tmp_path), tmp_path / "c.json"
    for _ in range(2):
        with serving(monkeypatch, failing):
            assert write(config, output).usage.prompt_tokens == sum(charged)
    # Two attempts in each of two runs.
    assert charged.count(1000) == 4
    with serving(monkeypatch):
        report = write(config, output)
    assert report.failures == {"writing": 0, "support": 0, "recall": 0}
    assert report.usage.prompt_tokens == sum(charged) + 100 + 3 * (50 + 20)


def test_the_estimate_says_what_is_left_and_grows_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, output = writing(tmp_path, 40), tmp_path / "c.json"
    ahead = estimate(config, output)
    usage = ahead.usage
    assert (ahead.contexts, ahead.checks) == (40, 0)
    # A context is read once to write and once for each pair; its 37 or 38 characters are about nine tokens.
    assert usage.prompt_tokens > 40 * 9 * (1 + config.turns)
    more = estimate(replace(config, turns=16), output).usage
    assert more.prompt_tokens > 1.5 * usage.prompt_tokens
    assert more.completion_tokens == 2 * usage.completion_tokens
    with serving(monkeypatch):
        write(replace(config, sources=sources(tmp_path, 30)), output)
    ahead = estimate(writing(tmp_path, 40), output)
    assert (ahead.contexts, ahead.checks) == (10, 0)


def test_the_estimate_of_a_resumed_run_counts_the_checks_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(call: Call, attempt: int) -> Behaviour:
        lost = call.text.startswith("RECALL") or "Where is X1" in call.text
        return Refuse(400) if lost else model(call, attempt)

    config, output = writing(tmp_path, 4), tmp_path / "c.json"
    with serving(monkeypatch, unchecked):
        write(config, output)
    ahead = estimate(config, output)
    # Four contexts of three pairs each: none recalled, and one support check lost.
    assert (ahead.contexts, ahead.checks) == (0, 12 + 1)
    # Each recall reads its prompt of 17 characters and a pair; the support check its prompt of 41 and the context of 36.
    assert ahead.usage.prompt_tokens == 12 * (5 + 60) + (11 + 60 + 9)
    assert ahead.usage.completion_tokens == 12 * 20 + 10
    with serving(monkeypatch) as server:
        write(config, output)
    assert len(server.calls) == ahead.checks
    done = estimate(config, output)
    assert (done.contexts, done.checks, done.usage.prompt_tokens, done.usage.completion_tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize("change", ["model", "write", "support", "recall", "turns"])
def test_a_journal_of_another_configuration_is_refused(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, output = writing(tmp_path, 1), tmp_path / "c.json"
    with serving(monkeypatch):
        write(config, output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if change == "model":
        other = replace(config, remote=replace(REMOTE, model="other"))
    else:
        other = replace(config, **{change: 7 if change == "turns" else f"{PROMPTS[change]}!"})
    with serving(monkeypatch) as server:
        for start in (lambda: write(other, output), lambda: estimate(other, output)):
            with pytest.raises(ValueError, match=r"c.json.written.jsonl was kept with another model.*choose another --output"):
                start()
        assert server.calls == []
        # Patience, and what a server is told beside, may change.
        patient = replace(config, remote=replace(REMOTE, attempts=5, options={"max_tokens": 9}))
        assert write(patient, output).kept == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_context_that_left_the_sources_is_neither_checked_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(call: Call, attempt: int) -> Behaviour:
        return model(call, attempt) if call.text.startswith("WRITE") else Refuse(400)

    output = tmp_path / "c.json"
    with serving(monkeypatch, unchecked):
        write(writing(tmp_path, 3), output)
    with serving(monkeypatch) as server:
        report = write(writing(tmp_path, 2), output)
    assert len(server.calls) == 2 * 3 * 2
    assert (report.contexts, report.pairs, report.kept) == (2, 6, 2)
    contexts = sorted(item["context"] for item in json.loads(output.read_text()))
    assert contexts == [f"Text {{number{index}}} with {{question}} in it" for index in range(2)]


def script(folder: Path, server: OpenAIServer, *more: str, count: int = 12) -> tuple[list[str], dict[str, str]]:
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text('{"model_type": "qwen3"}')
    remote = {"model": "m", "concurrency": 2, "attempts": 3, "first_wait": 0.01, "prompt_price": 1000.0}
    source = {"kind": "jsonl", "path": sources(folder, count)["mine"].path}
    (folder / "config.yaml").write_text(yaml.safe_dump({"remote": remote, "sources": {"mine": source}, **PROMPTS}))
    command = [sys.executable, str(ROOT / "generate_data" / "generate_conversations.py"), "--config", str(folder / "config.yaml")]
    command += ["--output", str(folder / "out" / "c.json"), "--tokenizer", str(folder / "tokenizer"), *more]
    return command, {**os.environ, **server.environment, "PYTHONPATH": str(ROOT)}


def test_the_script_writes_checks_and_says_what_it_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch) as server:
        command, _ = script(tmp_path, server, "--yes", count=3)
        assert run_program("generate_data/generate_conversations.py", *command[2:]) == 0
        assert len(server.calls) == 3 + 9 + 9
        # Once more: nothing is left to ask.
        assert run_program("generate_data/generate_conversations.py", *command[2:]) == 0
        assert len(server.calls) == 3 + 9 + 9
    out = capsys.readouterr().out
    assert out.count(" at the prices given for m\n") == 2
    assert out.count("3 contexts, 9 pairs written: 3 kept, 3 not supported by their context, 3 known without it") == 2
    # At 1000 a million tokens read.
    assert f"{3 * 100 + 9 * 50 + 9 * 20:,} tokens read, {3 * 30 + 9 * 5 + 9 * 4} written, cost 0.93" in out
    items = json.loads((tmp_path / "out" / "c.json").read_text())
    assert [message["content"][:10] for item in items for message in item["conversations"]] == ["Where is X", "in Arlow"] * 3
    # One token a byte, which all of these characters are.
    assert all(item["contextlen"] == len(item["context"]) for item in items)


@pytest.mark.slow
def test_a_killed_script_goes_on_where_it_was(tmp_path: Path) -> None:
    def slowly(call: Call, attempt: int) -> Behaviour:
        answer = model(call, attempt)
        assert isinstance(answer, Say)
        return Say(answer.text, seconds=0.1)

    with openai_server(slowly) as server:
        command, environment = script(tmp_path, server, "--yes")
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while len(server.calls) < 20:
            time.sleep(0.02)
            assert process.poll() is None
        process.kill()
        process.wait()
        first = len(server.calls)
        assert not (tmp_path / "out" / "c.json").exists()
        journal = tmp_path / "out" / "c.json.supported.jsonl"
        with journal.open("ab") as file:
            file.write(b'{"id": "torn')
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        # Nothing is asked twice but what was under way when it was killed.
        assert 12 + 36 + 36 <= len(server.calls) <= 12 + 36 + 36 + 2
        assert len(server.calls) > first
    assert "12 contexts, 36 pairs written: 12 kept" in done.stdout
    assert len(json.loads((tmp_path / "out" / "c.json").read_text())) == 12


@pytest.mark.slow
def test_the_script_asks_before_it_spends(tmp_path: Path) -> None:
    with openai_server(model) as server:
        command, environment = script(tmp_path, server)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 2
    assert "12 contexts to write about, 0 checks of earlier pairs: about" in done.stdout
    assert "at the prices given for m\n" in done.stdout
    assert "start with --yes" in done.stderr
    assert server.calls == []


def test_the_shipped_configuration_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(WritingConfig, load(ROOT / "configs" / "conversations.yaml"))
    assert config.turns == 8
    with pytest.raises(ValueError, match=r"'recall' must hold \{question\}"):
        replace(config, recall="Answer.")
