"""Texts made shorter: the end hidden, or split into pieces that fit."""

from __future__ import annotations

import re
from bisect import bisect_left

from transformers import PreTrainedTokenizerBase

from shine.chat import token_ids, token_starts

_NEXT_WORD = re.compile(r"\S")


def hide_end(text: str, share: float) -> str:
    """``text`` without the last ``share`` of its words: at least one word is hidden, and the first always stays.

    A text of a single word, as one in Chinese may be, loses characters instead.
    """
    parts = list(re.finditer(r"\S+", text))
    if len(parts) < 2:
        parts = list(re.finditer(r"\S", text))
    kept = max(min(round(len(parts) * (1 - share)), len(parts) - 1), 1)
    return text[: parts[kept - 1].end()] if parts else text


def split_text(tokenizer: PreTrainedTokenizerBase, text: str, *, budget: int) -> list[tuple[str, int]]:
    """``text`` as pieces of at most ``budget`` tokens with their token counts, broken at white space where there is some."""
    starts = token_starts(tokenizer, text)
    if len(starts) <= budget:
        return [(text, len(starts))] if starts else []
    pieces: list[tuple[str, int]] = []
    begin = 0
    while (word := _NEXT_WORD.search(text, begin)) is not None:
        begin = word.start()
        first = bisect_left(starts, begin)
        # Cut off by itself, a piece may tokenise to a few more tokens than it had: then take a little less.
        for size in range(budget, 0, -1):
            end = starts[first + size] if first + size < len(starts) else len(text)
            if end < len(text):
                broken = max(text.rfind(mark, begin + 1, end) for mark in (" ", "\n"))
                end = broken if broken > begin else end
            piece = text[begin:end].strip()
            length = len(token_ids(tokenizer, piece))
            if length <= budget:
                break
        pieces.append((piece, length))
        begin = end
    return pieces
