"""Long texts in pieces that a hypernetwork reads one by one: whole sentences as far as they fit, with some overlap."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from shine.chat import token_counts, token_ids, token_starts

_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|\Z)|[。！？]++[\"'”’」』）)\]]*+|\n")
"""Where a sentence may end. Chinese and Japanese put no space there. No character is looked at more than a few times."""
_SEEN = re.compile(r"\S")
_WRAPPED = 50
"""A line of so many characters that a letter follows on the next is prose with hard line breaks; a shorter one stands by itself."""
_WINDOW = 16
"""Characters a token that are looked at to find where to cut; tokens of text have about four."""
_BATCH = 256
"""Sentences that are tokenised by one call."""
OVERLAP = 8
"""By default an eighth of each piece is said again at the start of the next."""


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, a heading, list item or row without a full stop being one too; joined they are the text."""
    start, line = 0, 0
    first = _first(text, 0)
    for match in _END.finditer(text):
        end = match.end()
        breaks = match[0] == "\n"
        ends = _stands_alone(text, line, end) if breaks else not _numbers(text, first, end)
        line = end if breaks else line
        if ends and end > first:
            yield text[start:end]
            start, first = end, _first(text, end)
    if text[start:]:
        yield text[start:]


def _first(text: str, start: int) -> int:
    """Where the white space from ``start`` on is over."""
    found = _SEEN.search(text, start)
    return len(text) if found is None else found.start()


def _numbers(text: str, first: int, end: int) -> bool:
    """Whether this is the number of a list item, ``12.``, which belongs to what follows."""
    return end - first <= 4 and text[first : end - 1].isdigit()


def _stands_alone(text: str, line: int, end: int) -> bool:
    """Whether the line from ``line`` to ``end`` does not run on in the next."""
    following = text[end : end + 40].lstrip(" \t")[:1]
    return end - line <= _WRAPPED or not (following.isalpha() or following in ("(", '"', "'", "“", "‘"))


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
    waiting: deque[tuple[str, int] | None] = deque()
    held: deque[tuple[str, int]] = deque()
    total = fresh = 0
    # The last comes after everything and tells that there is no more.
    for coming in chain(_short_units(tokenizer, text, limit), (None,)):
        waiting.append(coming)
        while waiting:
            unit = waiting.popleft()
            if unit is not None and (not held or total + unit[1] <= limit):
                held.append(unit)
                total, fresh = total + unit[1], fresh + 1
            elif fresh:
                waiting.appendleft(unit)
                returned = _make_fit(tokenizer, held, fresh, limit)
                waiting.extendleft(returned)
                if "".join(text for text, _ in list(held)[len(returned) - fresh :]).strip():
                    yield _joined(held)
                fresh, total = 0, _keep_end(held, overlap)
            elif unit is not None:
                # What was to be said again leaves no room for the next sentence.
                waiting.appendleft(unit)
                total -= held.popleft()[1]


def how_many(tokens: int, *, limit: int, overlap: int | None = None) -> int:
    """About how many pieces `pieces` makes of a text of so many tokens.

    Sentences do not fill a piece to its end, and no more than whole ones are said again.
    """
    shared = limit // OVERLAP if overlap is None else overlap
    return 1 if tokens <= limit else math.ceil(tokens / max(limit - shared, 1))


def _joined(held: Iterable[tuple[str, int]]) -> str:
    return "".join(text for text, _ in held).strip()


def _make_fit(tokenizer: PreTrainedTokenizerBase, held: deque[tuple[str, int]], fresh: int, limit: int) -> list[tuple[str, int]]:
    """Take sentences off the end of a piece, last first, or else off its start, until its tokens are within ``limit``.

    The sum over its sentences can be off by how their ends melt together.
    """
    returned: list[tuple[str, int]] = []
    while len(held) > 1 and not _fits(tokenizer, _joined(held), limit):
        if len(returned) + 1 < fresh:
            returned.append(held.pop())
        else:
            held.popleft()
    return returned


def _keep_end(held: deque[tuple[str, int]], overlap: int) -> int:
    """Keep what the next piece says again, and count it."""
    total = sum(cost for _, cost in held)
    while total > overlap:
        total -= held.popleft()[1]
    return total


def _short_units(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> Iterator[tuple[str, int]]:
    """Sentences with their tokens, longer ones cut to ``limit``."""
    window = _WINDOW * limit
    coming = sentences(text)
    while batch := list(islice(coming, _BATCH)):
        for sentence, count in zip(batch, token_counts(tokenizer, [sentence[:window] for sentence in batch]), strict=True):
            if len(sentence) <= window and count < limit:
                yield sentence, count
            else:
                yield from _cut(tokenizer, sentence, limit)


def _cut(tokenizer: PreTrainedTokenizerBase, sentence: str, limit: int) -> Iterator[tuple[str, int]]:
    place = 0
    while place < len(sentence):
        window = sentence[place : place + _WINDOW * limit]
        starts = token_starts(tokenizer, window)
        if len(starts) <= limit and _fits(tokenizer, window.strip(), limit):
            end = len(window) if place + len(window) == len(sentence) else _best_cut(window, len(window))
        else:
            # At a character's start, even where one character is several tokens, and always further on.
            possible = (start for start in reversed(starts[: limit + 1]) if start > 0)
            end = _best_cut(window, next((start for start in possible if _fits(tokenizer, window[:start].strip(), limit)), 1))
        yield window[:end], len(starts) if end == len(window) else len(token_ids(tokenizer, window[:end]))
        place += end


def _best_cut(text: str, end: int) -> int:
    """The last line end before ``end``, or else the last space, unless little would be left before it."""
    for mark in ("\n", " "):
        found = text.rfind(mark, end // 2, end) + 1
        if found and text[:found].strip():
            return found
    return end


def _fits(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> bool:
    return len(token_ids(tokenizer, text)) <= limit
