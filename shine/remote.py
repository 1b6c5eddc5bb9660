"""Asking a model behind an OpenAI-compatible server: many requests at once, patiently, where a failure is a value.

The address is ``OPENAI_BASE_URL``, the key ``OPENAI_API_KEY``; both stay in the environment.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, TypeVar

import openai
import pydantic

from shine.config import RemoteConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One thing to ask: chat messages (``role``, ``content``), and the name under which its reply comes back."""

    id: str
    messages: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Usage:
    """Tokens that the server says it has read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    def cost(self, config: RemoteConfig) -> float:
        """Their price, in the currency of the configuration."""
        return (self.prompt_tokens * config.prompt_price + self.completion_tokens * config.completion_price) / 1e6


@dataclass(frozen=True)
class Reply(Generic[T]):
    """What became of a request.

    Attributes:
        value: what the answer says; ``None`` after a failure.
        failure: why there is no value, of the last attempt; ``None`` where there is one.
        attempts: how often it was asked.
        usage: of all attempts.
    """

    id: str
    value: T | None = None
    failure: str | None = None
    attempts: int = 1
    usage: Usage = Usage()


def ask(requests: Iterable[Request], read: Callable[[str], T], *, config: RemoteConfig) -> Iterator[Reply[T]]:
    """One reply a request, in the order in which they arrive.

    At most ``config.concurrency`` requests are taken ahead of their replies, so ``requests`` may be endless. What may pass is
    asked again after a pause that doubles, or that the server names in ``Retry-After``: status 408, 409, 429 and 5xx, no
    connection, no answer in time, and an answer that cannot be read. Whatever else the server refuses fails at once. Not to be
    called where an event loop is running.

    Args:
        read: the value that an answer's text holds; raises ``ValueError`` where it is not what was asked for. See `json_reader`.

    Raises:
        ValueError: no key is set.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise ValueError("OPENAI_API_KEY is not set: export it (any word will do for a server of your own that asks for none)")
    waiting = iter(requests)
    with asyncio.Runner() as runner:
        # One loop here counts all attempts together; the client would neither know of unreadable answers nor of the total.
        client = openai.AsyncOpenAI(api_key=key, max_retries=0, timeout=config.timeout)
        try:
            under_way: set[asyncio.Task[Reply[T]]] = set()
            while True:
                for request in itertools.islice(waiting, config.concurrency - len(under_way)):
                    under_way.add(runner.get_loop().create_task(_ask_patiently(client, request, read, config)))
                if not under_way:
                    return
                done, under_way = runner.run(asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    reply = task.result()
                    # Some servers quote the key they were given.
                    yield replace(reply, failure=reply.failure and reply.failure.replace(key, "[key]"))
        finally:
            runner.run(client.close())


_WRAPPED = re.compile(r"\s*(?:<think>.*?</think>)?\s*(?:```(?:json)?\s*\n(?P<fenced>.*)```|(?P<plain>.*))\s*", re.DOTALL)


def json_reader(kind: type[T]) -> Callable[[str], T]:
    """A ``read`` for `ask`: JSON of a given type (a dataclass, ``TypedDict`` or anything that pydantic knows).

    A think block before it and a code fence around it are taken off.
    """
    adapter = pydantic.TypeAdapter(kind)

    def read(text: str) -> T:
        found = _WRAPPED.fullmatch(text)
        assert found is not None
        try:
            return adapter.validate_json(found["fenced"] or found["plain"] or "")
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None

    return read


@dataclass(frozen=True)
class _Message:
    content: str


@dataclass(frozen=True)
class _Choice:
    message: _Message
    finish_reason: str | None = None


@dataclass(frozen=True)
class _Completion:
    """The part of a chat completion that is used; servers differ in the rest."""

    choices: Annotated[tuple[_Choice, ...], pydantic.Field(min_length=1)]
    usage: Usage | None = None


_COMPLETION = pydantic.TypeAdapter(_Completion)


@dataclass(frozen=True)
class _Setback:
    """An attempt that gave no value.

    Attributes:
        passing: another attempt may do better.
        wait: seconds that the server asks for before it.
    """

    reason: str
    passing: bool
    wait: float = 0.0


async def _ask_patiently(client: openai.AsyncOpenAI, request: Request, read: Callable[[str], T], config: RemoteConfig) -> Reply[T]:
    usage = Usage()
    for attempt in itertools.count(1):
        outcome, used = await _ask_once(client, request, read, config)
        usage += used
        if not isinstance(outcome, _Setback):
            return Reply(request.id, value=outcome, attempts=attempt, usage=usage)
        if not outcome.passing or attempt == config.attempts:
            return Reply(request.id, failure=outcome.reason, attempts=attempt, usage=usage)
        # Half of the pause is drawn, so that those who failed together do not come back together.
        pause = min(config.first_wait * 2 ** (attempt - 1), config.longest_wait) * random.uniform(0.5, 1.0)
        await asyncio.sleep(outcome.wait + pause)
    raise AssertionError("unreachable")


async def _ask_once(
    client: openai.AsyncOpenAI, request: Request, read: Callable[[str], T], config: RemoteConfig
) -> tuple[T | _Setback, Usage]:
    messages: Any = list(request.messages)
    try:
        # The client's own limit is for each read, and a server that sends a byte now and then never meets it.
        async with asyncio.timeout(config.timeout):
            answer = await client.chat.completions.create(model=config.model, messages=messages, extra_body=dict(config.options))
    except (TimeoutError, openai.APITimeoutError):
        return _Setback(f"no answer within {config.timeout:g} s", passing=True), Usage()
    except openai.APIStatusError as error:
        return _refusal(error, config), Usage()
    except openai.OpenAIError as error:
        return _Setback(f"{error} {error.__cause__ or ''}".strip(), passing=True), Usage()
    except ValueError as error:  # a body that is not JSON
        return _Setback(f"not a chat completion: {error}", passing=True), Usage()
    try:
        completion = _COMPLETION.validate_python(answer.to_dict(warnings=False) if isinstance(answer, openai.BaseModel) else answer)
    except pydantic.ValidationError:
        return _Setback("not a chat completion: no answer text in it", passing=True), Usage()
    choice, usage = completion.choices[0], completion.usage or Usage()
    if choice.finish_reason in ("length", "content_filter"):
        remedy = {"length": "raise max_tokens in options", "content_filter": "the server withholds it"}[choice.finish_reason]
        return _Setback(f"the answer was cut ({choice.finish_reason}): {remedy}", passing=False), usage
    try:
        return read(choice.message.content), usage
    except ValueError as error:
        return _Setback(f"not the answer asked for: {error}", passing=True), usage


def _refusal(error: openai.APIStatusError, config: RemoteConfig) -> _Setback:
    wait = _retry_after(error.response.headers.get("retry-after"))
    reason = f"status {error.status_code}: {error.message}"
    if wait > config.longest_wait:
        return _Setback(f"{reason} (asks to wait {wait:.0f} s, longest_wait is {config.longest_wait:g})", passing=False)
    passing = error.status_code in (408, 409, 429) or error.status_code >= 500
    # An account without credit answers 429 as well, for as long as one likes to ask.
    return _Setback(reason, passing=passing and error.code != "insufficient_quota", wait=wait)


def _retry_after(header: str | None) -> float:
    """Seconds, from a number or a date (RFC 9110, section 10.2.3); zero where there is neither."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
