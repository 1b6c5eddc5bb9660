"""Where a LoRA comes from: which context, read by which hypernetwork with which backbone. Plain values, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class ContextRecord:
    """A context without its text, unless that was asked for.

    Attributes:
        sha256: of the whole text in UTF-8.
        characters, tokens: of the whole text.
        read: tokens of it that were read; fewer than ``tokens`` where it was cut.
        pieces: in how many pieces it was read; the LoRA is then the sum of theirs.
        name: what the user calls it, a file name for instance.
        text: the text itself, where it was to be kept.
    """

    sha256: str
    characters: int
    tokens: int
    read: int
    pieces: int = 1
    name: str | None = None
    text: str | None = None


@dataclass(frozen=True, config=_STRICT)
class ModelRecord:
    """A model: what it was called when it was loaded, and its fingerprint (`shine.fingerprint`)."""

    name: str
    fingerprint: str


@dataclass(frozen=True, config=_STRICT)
class Provenance:
    """Where a span of a LoRA's rank comes from; a LoRA that was joined has several, in the order of its ranks.

    Attributes:
        context: what was read.
        rank: the width of the span; a linear that is narrower has its own full rank instead (see `LoRA.span`).
        strength: what the update has been multiplied by since it was made.
        hypernetwork, backbone: what made it.
        versions: of SHINE and the libraries beneath it.
        date: when it was made, in UTC, as ISO 8601 writes it.
        kept: share of the update's squared norm that is left after its rank was reduced; 1 where it was not.
        shared: the rank is that of a sum of several contexts which was reduced, so that they cannot be told apart any more.
    """

    context: ContextRecord
    rank: int
    hypernetwork: ModelRecord
    backbone: ModelRecord
    versions: Mapping[str, str]
    date: str
    strength: float = 1.0
    kept: float = 1.0
    shared: bool = False


def sha256(text: str) -> str:
    """The hash that identifies a context."""
    return hashlib.sha256(text.encode()).hexdigest()
