"""A server on loopback that speaks ``/v1/chat/completions``, and misbehaves when it is told to."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import LoopbackServer, serving


@dataclass(frozen=True)
class Say:
    """A proper answer; ``seconds`` passes before it."""

    text: str
    finish_reason: str = "stop"
    seconds: float = 0.0
    usage: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Refuse:
    """An error, as the API words it."""

    status: int
    retry_after: str | None = None
    message: str = "no"
    code: str | None = None


@dataclass(frozen=True)
class Send:
    """Status 200 and whatever ``body`` is; ``missing`` bytes are announced and never sent."""

    body: bytes
    missing: int = 0
    kind: str = "application/json"


@dataclass(frozen=True)
class Hang:
    """Nothing, or a byte now and then, until the client goes away."""

    drip: bool = False


@dataclass(frozen=True)
class Reset:
    """The connection is reset."""


Behaviour = Say | Refuse | Send | Hang | Reset


@dataclass(frozen=True)
class Call:
    """A request as it came in; ``at`` is of the monotonic clock."""

    at: float
    messages: list[dict[str, str]]
    body: dict[str, Any]
    key: str

    @property
    def text(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]


class OpenAIServer:
    """What has been asked, and how many were under way at most.

    ``behave(call, attempt)`` says what happens; ``attempt`` counts from 1 the calls with the same last message.
    """

    def __init__(self, behave: Callable[[Call, int], Behaviour]) -> None:
        self.behave = behave
        self.calls: list[Call] = []
        self.most_at_once = 0
        self.closing = threading.Event()
        self._now, self._seen, self._lock = 0, Counter[str](), threading.Lock()
        self._http = LoopbackServer(_handler(self))

    @property
    def environment(self) -> dict[str, str]:
        """What a client's process needs to find it."""
        url = f"http://127.0.0.1:{self._http.server_port}/v1"
        return {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "secret-key", "NO_PROXY": "127.0.0.1"}

    def enter(self, call: Call) -> Behaviour:
        with self._lock:
            self.calls.append(call)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self._seen[call.text] += 1
            attempt = self._seen[call.text]
        return self.behave(call, attempt)

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


@contextmanager
def openai_server(behave: Callable[[Call, int], Behaviour]) -> Iterator[OpenAIServer]:
    """A server in a thread of its own, gone when the block ends."""
    server = OpenAIServer(behave)
    with serving(server._http):
        try:
            yield server
        finally:
            server.closing.set()


def completion(text: str, *, finish_reason: str = "stop", usage: Mapping[str, int] | None = None) -> bytes:
    """The body of a proper answer."""
    counted = usage or {"prompt_tokens": 10, "completion_tokens": 3}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    total = {"total_tokens": sum(counted.values())}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": {**counted, **total}}
    return json.dumps(body).encode()


def _handler(server: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            at = time.monotonic()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.answer(404, b'{"error": {"message": "no such path"}}')
                return
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            behaviour = server.enter(Call(at, body["messages"], body, key))
            try:
                self.act(behaviour)
            finally:
                server.leave()

        def act(self, behaviour: Behaviour) -> None:
            match behaviour:
                case Say(text, finish_reason, seconds, usage):
                    time.sleep(seconds)
                    self.answer(200, completion(text, finish_reason=finish_reason, usage=usage))
                case Refuse(status, retry_after, message, code):
                    error = {"error": {"message": message, "type": "invalid", "code": code}}
                    self.answer(status, json.dumps(error).encode(), {"Retry-After": retry_after} if retry_after else {})
                case Send(content, missing, kind):
                    self.answer(200, content, {"Content-Type": kind}, missing=missing)
                    self.close_connection = self.close_connection or missing > 0
                case Hang(drip):
                    self.hang(drip=drip)
                case Reset():
                    # A linger of zero seconds makes closing a reset.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    socket.close(self.connection.detach())
                    self.close_connection = True

        def answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None, *, missing: int = 0) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) + missing))
            self.end_headers()
            self.wfile.write(content)

        def hang(self, *, drip: bool) -> None:
            if drip:
                self.answer(200, b"{", missing=10_000)
            while not server.closing.wait(0.02):
                if drip:
                    self.wfile.write(b" ")
            self.close_connection = True

    return Handler
