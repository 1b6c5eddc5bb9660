"""What a collection is built from, and how new conversations are written: frozen, typed, checked where they enter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from shine.config import Positive, RemoteConfig, Seed, SourceConfig

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class PartConfig:
    """A public data set that goes into a collection.

    Attributes:
        source: how it is read.
        hub: its repository on the hub.
        licence: of its text, for the manifest.
        share: of its contexts, drawn from the collection's seed.
    """

    source: SourceConfig
    hub: str
    licence: str
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class CollectionConfig:
    """A training collection made of public parts.

    Attributes:
        form: ``conversations`` keeps all questions of a context together, ``questions`` makes an item of each.
        parts: in the order in which they are written.
    """

    form: Literal["conversations", "questions"]
    parts: Mapping[str, PartConfig]
    seed: Seed = 42


@dataclass(frozen=True, config=_STRICT)
class WritingConfig:
    """New conversations about given contexts, written and checked by a model.

    In the prompts ``{context}``, ``{turns}``, ``{question}`` and ``{answer}`` are filled in.

    Attributes:
        remote: the model that writes and checks.
        sources: where the contexts come from; their own questions are not looked at.
        turns: questions asked for about each context.
        write: asks for ``{"pairs": [{"question": …, "answer": …}, …]}``.
        support: asks for ``{"supported": true or false}``, given context, question and answer.
        recall: asks for ``{"answer": …}``, given the question alone.
        known_f1: a question counts as answerable without its context where that answer has this much word overlap (F1) with the
            written one.
        turn_tokens: tokens of a question with its answer, for the estimate.
    """

    remote: RemoteConfig
    sources: Mapping[str, SourceConfig]
    write: str
    support: str
    recall: str
    turns: Positive = 8
    known_f1: Annotated[float, Field(gt=0, le=1)] = 0.6
    turn_tokens: Positive = 60

    def __post_init__(self) -> None:
        needed = {"write": ("context", "turns"), "support": ("context", "question", "answer"), "recall": ("question",)}
        for prompt, names in needed.items():
            if missing := [name for name in names if f"{{{name}}}" not in getattr(self, prompt)]:
                raise ValueError(f"the prompt {prompt!r} must hold {{{missing[0]}}}")
