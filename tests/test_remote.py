"""Asking a model on a real HTTP server that fails in every way it can, and the journal that keeps what it said."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from openai_server import Behaviour, Call, Hang, OpenAIServer, Refuse, Reset, Say, Send, completion, openai_server

from shine.config import RemoteConfig
from shine.journal import Journal
from shine.remote import Reply, Request, Usage, ask, json_reader

QUICK = RemoteConfig("m", attempts=3, timeout=5.0, first_wait=0.02, longest_wait=0.1)


@dataclass(frozen=True)
class Verdict:
    good: bool
    why: str = ""


GOOD = '{"good": true, "why": "it is"}'


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, behave: Callable[[Call, int], Behaviour]) -> Iterator[OpenAIServer]:
    with openai_server(behave) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def request(name: str) -> Request:
    return Request(name, [{"role": "user", "content": name}])


def one(config: RemoteConfig = QUICK) -> Reply[Verdict]:
    (reply,) = ask([request("r")], json_reader(Verdict), config=config)
    assert reply.id == "r"
    return reply


FAULTS: dict[str, Behaviour] = {
    "rate limit": Refuse(429),
    "rate limit with a pause": Refuse(429, retry_after="0.05"),
    "server error": Refuse(500),
    "bad gateway": Refuse(502),
    "overloaded": Refuse(503, retry_after="0"),
    "request timeout": Refuse(408),
    "reset": Reset(),
    "body that ends early": Send(completion(GOOD)[:-40], missing=40),
    "body that is no JSON": Send(completion(GOOD)[:-40]),
    "body of another kind": Send(b"<html>busy</html>", kind="text/html"),
    "body that is a list": Send(b"[]"),
    "empty body": Send(b""),
    "no choices": Send(b'{"id": "x", "choices": []}'),
    "null choices": Send(b'{"id": "x", "choices": null}'),
    "no message": Send(b'{"id": "x", "choices": [{"index": 0}]}'),
    "null content": Send(b'{"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": null}}]}'),
    "answer cut short": Say('{"good": tr'),
    "answer of another schema": Say('{"verdict": true}'),
    "answer of another type": Say('{"good": "perhaps"}'),
    "answer in prose": Say("Yes, it is good."),
    "empty answer": Say(""),
    "open think block": Say('<think>It may be {"good": true}'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_asked_again(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, lambda call, attempt: FAULTS[fault] if attempt < 3 else Say(GOOD)) as server:
        reply = one()
    assert (reply.value, reply.failure, reply.attempts) == (Verdict(True, "it is"), None, 3)
    assert len(server.calls) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_pass_is_a_failure_with_its_reason_and_no_value(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The others of the batch are not touched by it.
    def behave(call: Call, attempt: int) -> Behaviour:
        return FAULTS[fault] if call.text == "bad" else Say(GOOD)

    names = ["a", "bad", "b", "c"]
    with serving(monkeypatch, behave) as server:
        replies = {reply.id: reply for reply in ask(map(request, names), json_reader(Verdict), config=QUICK)}
    assert sorted(replies) == sorted(names)
    assert [replies[name].value for name in names] == [Verdict(True, "it is"), None, *[Verdict(True, "it is")] * 2]
    bad = replies["bad"]
    assert bad.failure
    assert bad.attempts == 3
    assert sum(call.text == "bad" for call in server.calls) == 3


@pytest.mark.parametrize("drip", [False, True])
def test_a_server_that_does_not_finish_is_given_up(drip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, lambda call, attempt: Hang(drip) if attempt == 1 else Say(GOOD)):
        start = time.monotonic()
        reply = one(replace(QUICK, timeout=0.3))
        assert time.monotonic() - start < 3
    assert (reply.value, reply.attempts) == (Verdict(True, "it is"), 2)
    with serving(monkeypatch, lambda call, attempt: Hang(drip)):
        assert one(replace(QUICK, timeout=0.2, attempts=1)).failure == "no answer within 0.2 s"


def test_no_server_at_all_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, lambda call, attempt: Say(GOOD)):
        pass
    reply = one()
    assert reply.attempts == 3
    assert reply.failure is not None
    assert "Connection error" in reply.failure


FINAL: dict[str, tuple[Behaviour, str]] = {
    "key": (Refuse(401, message="Incorrect key: secret-key"), r"^status 401: .*Incorrect key: \[key\]"),
    "model": (Refuse(404, message="no model m"), "status 404: .*no model m"),
    "request": (Refuse(400, message="too long"), "status 400: .*too long"),
    "credit": (Refuse(429, message="pay", code="insufficient_quota"), "status 429: .*pay"),
    "a long wait": (Refuse(429, retry_after="3600"), r"asks to wait 3600 s, longest_wait is 0\.1"),
    "length": (Say('{"good": tr', finish_reason="length"), "cut .length.: raise max_tokens"),
    # Whole as JSON, yet the server says that something is missing.
    "whole, yet cut": (Say(GOOD, finish_reason="length"), "cut .length.: raise max_tokens"),
    "filter": (Say(GOOD, finish_reason="content_filter"), "content_filter"),
}


@pytest.mark.parametrize("case", FINAL)
def test_what_another_attempt_cannot_mend_fails_at_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    behaviour, reason = FINAL[case]
    with serving(monkeypatch, lambda call, attempt: behaviour):
        reply = one()
    assert (reply.value, reply.attempts) == (None, 1)
    assert reply.failure is not None
    assert re.search(reason, reply.failure)
    assert "secret-key" not in reply.failure


def pauses(server: OpenAIServer) -> list[float]:
    return [later.at - earlier.at for earlier, later in itertools.pairwise(server.calls)]


def test_pauses_double_up_to_the_longest_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(QUICK, attempts=5, first_wait=0.1, longest_wait=0.3)
    with serving(monkeypatch, lambda call, attempt: Refuse(500)) as server:
        assert one(config).attempts == 5
    found = pauses(server)
    for pause, most in zip(found, [0.1, 0.2, 0.3, 0.3], strict=True):
        assert most / 2 <= pause < most + 0.25
    # Two requests that fail together do not come back together.
    with serving(monkeypatch, lambda call, attempt: Refuse(500)) as server:
        list(ask([request(str(i)) for i in range(8)], str, config=replace(config, attempts=2)))
    second = sorted(call.at for call in server.calls)[8:]
    assert second[-1] - second[0] > 0.003


def test_a_server_is_not_asked_before_the_time_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, lambda call, attempt: Refuse(429, "0.4") if attempt == 1 else Say(GOOD)) as server:
        assert one(replace(QUICK, longest_wait=1.0)).value == Verdict(True, "it is")
    assert 0.4 <= pauses(server)[0] < 0.7

    # A date has whole seconds: two from now lies one to two seconds ahead.
    def date(call: Call, attempt: int) -> Behaviour:
        return Refuse(503, formatdate(time.time() + 2, usegmt=True)) if attempt == 1 else Say(GOOD)

    with serving(monkeypatch, date) as server:
        assert one(replace(QUICK, longest_wait=3.0)).value == Verdict(True, "it is")
    assert 0.9 < pauses(server)[0] < 2.5
    for nonsense in ("soon", "-5", "inf", "1e9"):
        with serving(monkeypatch, lambda call, attempt, text=nonsense: Refuse(429, text) if attempt == 1 else Say(GOOD)) as server:
            assert one().attempts == 2
        assert pauses(server)[0] < 0.5


def test_requests_are_bounded_and_taken_only_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        for taken in itertools.count(1):
            yield request(str(taken))

    with serving(monkeypatch, lambda call, attempt: Say(call.text, seconds=0.02)) as server:
        replies = ask(endless(), int, config=replace(QUICK, concurrency=4))
        first = list(itertools.islice(replies, 30))
        replies.close()  # type: ignore[attr-defined]
    assert server.most_at_once == 4
    assert taken <= 30 + 4
    assert len({reply.id for reply in first}) == 30
    assert all(reply.id == str(reply.value) for reply in first)


def test_replies_come_as_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(call: Call, attempt: int) -> Behaviour:
        return Say(call.text, seconds=0.5 if call.text == "slow" else 0.0)

    with serving(monkeypatch, behave):
        names = [reply.id for reply in ask(map(request, ["slow", "a", "b"]), str, config=replace(QUICK, concurrency=2))]
    assert names == ["a", "b", "slow"]


def test_tokens_of_every_attempt_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(call: Call, attempt: int) -> Behaviour:
        if attempt == 1:
            return Refuse(500)
        return Say("prose" if attempt == 2 else GOOD, usage={"prompt_tokens": 100 * attempt, "completion_tokens": attempt})

    with serving(monkeypatch, behave):
        assert one().usage == Usage(200 + 300, 2 + 3)
    assert Usage(1_000_000, 500_000).cost(RemoteConfig("m", prompt_price=0.5, completion_price=4.0)) == pytest.approx(2.5)


def test_the_request_holds_the_model_the_options_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(QUICK, options={"temperature": 0.0, "max_tokens": 7, "chat_template_kwargs": {"enable_thinking": False}})
    with serving(monkeypatch, lambda call, attempt: Say(GOOD)) as server:
        one(config)
    (call,) = server.calls
    assert call.key == "secret-key"
    assert call.body == {"model": "m", "messages": [{"role": "user", "content": "r"}], **config.options}


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_key_nothing_starts(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set: export it"):
        next(ask([request("r")], str, config=QUICK))


def test_a_mistake_in_the_reader_is_not_taken_for_a_bad_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(text: str) -> str:
        raise KeyError(text)

    with serving(monkeypatch, lambda call, attempt: Say("x")), pytest.raises(KeyError):
        list(ask([request("r")], read, config=QUICK))


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n {GOOD} \n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}\n```\n",
        f"<think>Not {{bad}}.\n\nReally.</think>\n\n{GOOD}",
        f"<think>a</think>```json\n{GOOD}\n```",
    ],
)
def test_json_is_read_from_what_models_put_around_it(text: str) -> None:
    assert json_reader(Verdict)(text) == Verdict(True, "it is")


@pytest.mark.parametrize(
    "text", ["", "```json\n```", GOOD + GOOD, f"{GOOD} I hope this helps", "[]", '{"good": null}', f"<think>{GOOD}"]
)
def test_anything_else_is_not_read_as_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid JSON|valid boolean|an object"):
        json_reader(Verdict)(text)


def test_a_reader_says_what_is_wrong_and_where() -> None:
    with pytest.raises(ValueError, match=r"1\.good: Field required"):
        json_reader(list[Verdict])(f"[{GOOD}, {{}}]")


def test_a_journal_goes_on_after_its_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert list(Journal(path).rows()) == []
    rows: list[dict[str, Any]] = [{"id": "a", "text": "Zoë\nand \u2028 others"}, {"id": "b", "text": "x" * 200_000}]
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
            # On the disk before the next one.
            assert list(Journal(path).rows())[-1] == row
    whole = path.read_bytes()
    for torn in (b'{"id": "c"', b"x" * 100_000, b'{"id": "c"}'):
        path.write_bytes(whole + torn)
        assert list(Journal(path).rows()) == rows
        with Journal(path) as journal:
            journal.append({"id": "d"})
        assert list(Journal(path).rows()) == [*rows, {"id": "d"}]
    path.write_bytes(b'{"id": "only')
    with Journal(path) as journal:
        journal.append({"id": "d"})
    assert path.read_bytes() == b'{"id": "d"}\n'


@pytest.mark.parametrize("line", [b"{\n", b"[1]\n", b'{"id": "\xff"}\n'])
def test_a_damaged_row_within_a_journal_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + line + b'{"id": "b"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*delete this line"):
        list(Journal(path).rows())
