"""Any plain text as a source of questions about it, or of texts to give back: nobody has to ask."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from shine.data.examples import Example, Turn
from shine.data.gaps import gap_questions
from shine.data.sources.files import Source, parsed
from shine.pieces import sentences


def read_gaps(
    source: Source,
    *,
    column: str = "text",
    length: int = 200,
    turns: int = 6,
    of_each: int | None = None,
    skip_texts: int = 0,
    seed: int = 0,
) -> Iterator[Example]:
    """Passages of a text, each with questions made of its own sentences (see `shine.data.gaps`).

    Args:
        column: where the texts stand; rows in a row with one text, as in sets of questions, are read once.
        length: most tokens of a passage, which is whole sentences of one text.
        turns: questions of a passage, at most; passages without any are left out.
        of_each: at most so many passages of a text, from its beginning.
        skip_texts: leave out the first so many texts with all of their passages: those that something else is watched on.
        seed: of which questions are asked.
    """
    _at_least_one(turns=turns)
    for name, passage in _passages(source, column=column, length=length, of_each=of_each, skip_texts=skip_texts):
        found = gap_questions(passage, most=turns, rng=random.Random(f"{seed} {passage}"))
        if found:
            yield Example(name, passage, found)


def read_recitations(
    source: Source, *, ask: str, column: str = "text", length: int = 200, of_each: int | None = None, skip_texts: int = 0
) -> Iterator[Example]:
    """Passages of a text, each with one turn, ``ask``, whose answer is the passage.

    With the task token of reconstruction as ``ask`` this is one half of pretraining, to be had beside questions, so that a QA
    stage does not unlearn it.

    Args:
        column, length, of_each, skip_texts: as for `read_gaps`.
    """
    for name, passage in _passages(source, column=column, length=length, of_each=of_each, skip_texts=skip_texts):
        yield Example(name, passage, (Turn(ask, (passage,), "recitation"),))


def _passages(source: Source, *, column: str, length: int, of_each: int | None, skip_texts: int) -> Iterator[tuple[str, str]]:
    """Names and passages: as many whole sentences as fit into ``length`` tokens; a sentence that does not fit ends one."""
    _at_least_one(length=length, of_each=of_each)
    rows = parsed(source, {column: str | None}, lambda row, place: (row[column] or "").strip())
    if skip_texts < 0:
        raise ValueError(f"options.skip_texts={skip_texts}: at least 0")
    for index, (text, _) in itertools.islice(enumerate(itertools.groupby(rows)), skip_texts, None):
        passages = itertools.islice(_cut(text, source, length), of_each)
        yield from ((f"{source.config.split}-{index}#{number}", passage) for number, passage in enumerate(passages, start=1))


def _cut(text: str, source: Source, length: int) -> Iterator[str]:
    held: list[tuple[str, int]] = []
    for sentence in sentences(text):
        count = source.tokens(sentence)
        while held and sum(tokens for _, tokens in held) + count > length:
            passage, held = _filled(held, source, length)
            yield passage
        if count <= length:
            held.append((sentence, count))
    while held:
        passage, held = _filled(held, source, length)
        yield passage


def _filled(held: list[tuple[str, int]], source: Source, length: int) -> tuple[str, list[tuple[str, int]]]:
    """Sentences as one text, and those at their end that wait: together they can have more tokens than one by one."""
    for end in range(len(held), 1, -1):
        passage = "".join(sentence for sentence, _ in held[:end]).strip()
        if source.tokens(passage) <= length:
            return passage, held[end:]
    return held[0][0].strip(), held[1:]


def _at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"options.{name}={count}: at least 1")
