"""A running vLLM or SGLang: register an adapter with it, ask it, take the adapter away again.

Requests and answers as they read in the engines' sources, see `shine.export.engines`. The key, where the server wants one, is
``OPENAI_API_KEY`` in the environment.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from shine.chat import END, END_OF_TEXT, Conversation, clean_answer, prompt_text
from shine.export.engines import ENGINES
from shine.export.peft import peft_config, peft_tensors
from shine.lora import LoRA

ADDRESSES = {"vllm": "http://127.0.0.1:8000", "sglang": "http://127.0.0.1:30000"}
"""Where the engines listen if nobody says otherwise."""
_ASK = "see what it has with `shine serve-adapter list`, and what it takes with `shine export --check`"


@dataclass(frozen=True)
class Served:
    """A model that a server offers.

    Attributes:
        root: the folder or hub id it was loaded from.
        parent: of an adapter, the model it belongs to; ``None`` for a model.
    """

    name: str
    root: str | None = None
    parent: str | None = None


class Server:
    """One server of an engine.

    Raises:
        ValueError: (any method) it is down, too slow, fails, or refuses; one line with what it said and the remedy.
    """

    def __init__(self, address: str | None = None, *, engine: str, timeout: float = 120.0) -> None:
        """No request is made yet.

        Args:
            address: such as ``http://127.0.0.1:8000``, with or without ``/v1``; by default where the engine listens.
            engine: ``vllm`` or ``sglang``.
            timeout: seconds that a request may take.
        """
        self.address = (address or ADDRESSES[engine]).rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{address!r} is no address of a server: give one like {ADDRESSES[engine]}")
        self.kind, self.engine, self.timeout = engine, ENGINES[engine], timeout
        # A second attempt at loading would be refused because of the first.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=timeout)

    def models(self) -> list[Served]:
        """What it serves: the backbone first, then the adapters, where it lists them (older SGLang does not)."""
        with self._explained():
            listed = json.loads(self._client.get("/models", cast_to=str))["data"]
            return [Served(str(model["id"]), model.get("root"), model.get("parent")) for model in listed]

    def base(self) -> Served:
        """The backbone that it serves."""
        found = next((model for model in self.models() if model.parent is None), None)
        if found is None:
            raise ValueError(f"{self.address}: it serves no model; start it with {self._start()}")
        return found

    def register(self, name: str, folder: str | Path) -> None:
        """Load a PEFT folder under a name.

        Args:
            folder: as the server sees it.
        """
        self._change(self.engine.load, {"lora_name": name, "lora_path": str(folder)})

    def register_tensors(self, name: str, lora: LoRA, *, tensor_parallel: int = 1) -> None:
        """Send the weights themselves (SGLang only), where the server cannot read a folder of this machine.

        They travel as a pickle in base64, which is what SGLang reads. Releases since 0.5.18 want one copy for each GPU in
        ``serialized_named_tensors``, earlier ones a single one in ``serialized_tensors``; both are tried, the newer first.
        """
        assert self.kind == "sglang"
        payload = base64.b64encode(pickle.dumps(dict(peft_tensors(lora)))).decode("ascii")
        body = {"lora_name": name, "config_dict": peft_config(lora, base=self.base().name)}
        path = f"{self.engine.load}_from_tensors"
        try:
            self._change(path, {**body, "serialized_named_tensors": [payload] * tensor_parallel})
        except _OlderServerError:
            self._change(path, {**body, "serialized_tensors": payload})

    def unregister(self, name: str) -> None:
        """Take an adapter away; what it loaded from disk stays there."""
        self._change(self.engine.unload, {"lora_name": name})

    def ask(
        self, name: str, question: str, *, history: Conversation | None = None, max_new_tokens: int = 256, base: str | None = None
    ) -> str:
        """The greedy answer of the backbone that wears an adapter.

        The prompt is sent as plain ChatML to ``/v1/completions``, because chat templates add system turns and think blocks that
        SHINE has not seen.

        Args:
            base: the backbone's name on the server, which SGLang wants as well; asked for if not given.
        """
        model = name if self.kind == "vllm" else f"{base or self.base().name}:{name}"
        prompt = prompt_text((history or Conversation()).asking(question))
        with self._explained():
            answer = self._client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=max_new_tokens,
                temperature=0.0,
                stop=[END, END_OF_TEXT],
                extra_body={"add_special_tokens": False},
            )
            return clean_answer(answer.choices[0].text)

    def _change(self, path: str, body: Mapping[str, Any]) -> None:
        with self._explained():
            said = self._client.post(f"{self.address}{path}", cast_to=str, body=body)
            # vLLM answers with a sentence, SGLang with a record that can also say no.
            record = json.loads(said) if self.kind == "sglang" else {"success": True}
            if record.get("success") is not True:
                raise ValueError(f"{self.address}: it refuses {body['lora_name']}: {_said(record, said)}; {_ASK}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What can go wrong with a request, as one line for a user."""
        try:
            yield
        except openai.APITimeoutError:
            raise ValueError(f"{self.address}: no answer within {self.timeout:g} s; see its log, or give --timeout") from None
        except openai.APIConnectionError as error:
            raise ValueError(
                f"{self.address}: no server answers there ({error.__cause__ or error}); start {self.engine.title}: {self._start()}"
            ) from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except (json.JSONDecodeError, openai.OpenAIError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{self.address}: its answer is none of {self.engine.title}'s ({type(error).__name__}: {_line(str(error))}); check "
                "the address and --engine"
            ) from None

    def _refusal(self, error: openai.APIStatusError) -> ValueError:
        said = _said(error.body, error.response.text)
        status = error.status_code
        if status in (400, 422) and "serialized_tensors" in error.response.text:
            return _OlderServerError(f"{self.address}: it refuses weights: {said}")
        if status >= 500:
            return ValueError(f"{self.address}: it failed (status {status}): {said}; see its log, then try again")
        if status in (401, 403):
            return ValueError(f"{self.address}: it wants a key (status {status}: {said}): export OPENAI_API_KEY")
        # The frame's own answer, where the route is not there at all.
        if status in (404, 405) and said.rstrip(".") in ("Not Found", "Method Not Allowed"):
            return ValueError(f"{self.address}: it has no such request ({error.request.url.path}); start it with {self._start()}")
        return ValueError(f"{self.address}: it refuses (status {status}): {said}; {_ASK}")

    def _start(self) -> str:
        return self.engine.command.format(base="BACKBONE", rank="N", modules="all")


class _OlderServerError(ValueError):
    """The server wants weights under the name that earlier releases gave them."""


def name_for(stem: str, lora: LoRA) -> str:
    """A name that other weights do not have: ``stem`` and a hash of the update's values."""
    digest = hashlib.sha256()
    for path in sorted(lora):
        for matrix in lora[path]:
            digest.update(path.encode() + matrix.detach().float().cpu().contiguous().numpy().tobytes())
    clean = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_.-") else "-" for letter in stem)
    return f"{clean.strip('-._') or 'adapter'}-{digest.hexdigest()[:10]}"


def _said(body: object, text: str) -> str:
    """What the server says of an error, in any of the shapes the engines use."""
    if isinstance(body, Mapping):
        for key in ("error_message", "message", "detail", "error"):
            value = body.get(key)
            if isinstance(value, Mapping):
                return _said(value, text)
            if value:
                return _line(str(value))
    return _line(body if isinstance(body, str) else text) or "nothing"


def _line(text: str) -> str:
    """Its first line with anything on it, not too long."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 300 else f"{line[:300]} …"
