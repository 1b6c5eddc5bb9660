"""Long texts in pieces that a hypernetwork reads one by one: whole sentences as far as they fit, with some overlap."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from shine.chat import token_ids, token_starts

_UNIT = re.compile(r"\s*\S.*?(?:[.!?…。！？]+[\"'”’)\]]*(?=\s|$)|\n(?=\s*\n)|\Z)", re.DOTALL)
"""A sentence, or what is left of a paragraph, with the white space before it."""
OVERLAP = 8
"""By default an eighth of each piece is said again at the start of the next."""


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, a heading or list item without a full stop being one too; joined they are the text."""
    end = 0
    for match in _UNIT.finditer(text):
        end = match.end()
        yield match[0]
    if text[end:]:
        yield text[end:]


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, *, limit: int, overlap: int | None = None) -> Iterator[str]:
    """Consecutive pieces of at most ``limit`` tokens, in order, one at a time.

    They end where a sentence or a paragraph does; only a sentence longer than ``limit`` is cut within.

    Args:
        overlap: so many tokens, at most, of whole sentences that ended a piece begin the next; by default an eighth of ``limit``.

    Raises:
        ValueError: the overlap leaves no room for anything new.
    """
    overlap = limit // OVERLAP if overlap is None else overlap
    if limit < 1 or not 0 <= overlap < limit:
        raise ValueError(f"an overlap of {overlap} tokens in pieces of {limit}: it must be smaller than a piece, and not negative")
    units = _short_units(tokenizer, text, limit)
    held: deque[tuple[str, int]] = deque()
    new = False
    for unit, cost in units:
        while held and (sum(c for _, c in held) + cost > limit or _length(tokenizer, held, unit) > limit):
            if new:
                yield "".join(u for u, _ in held).strip()
                _keep_end(held, overlap)
                new = False
            else:
                # What was to be said again leaves no room for the next sentence.
                held.popleft()
        held.append((unit, cost))
        new = new or bool(unit.strip())
    if new:
        yield "".join(u for u, _ in held).strip()


def _length(tokenizer: PreTrainedTokenizerBase, held: deque[tuple[str, int]], unit: str) -> int:
    """Of the piece as it would be read; the sum over sentences can be off by how their ends melt together."""
    return len(token_ids(tokenizer, ("".join(u for u, _ in held) + unit).strip()))


def _keep_end(held: deque[tuple[str, int]], overlap: int) -> None:
    total = sum(cost for _, cost in held)
    while total > overlap:
        total -= held.popleft()[1]


def _short_units(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> Iterator[tuple[str, int]]:
    """Sentences with their tokens, longer ones cut to ``limit``."""
    for sentence in sentences(text):
        rest = sentence
        while (count := len(token_ids(tokenizer, rest))) > limit:
            starts = token_starts(tokenizer, rest)
            # At a character's start, even where one character is several tokens, and always further on.
            end = next((start for start in reversed(starts[: limit + 1]) if start > 0 and _fits(tokenizer, rest[:start], limit)), 1)
            yield rest[:end], len(token_ids(tokenizer, rest[:end]))
            rest = rest[end:]
        yield rest, count


def _fits(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> bool:
    return len(token_ids(tokenizer, text)) <= limit
