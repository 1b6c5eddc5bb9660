"""Contexts with whole conversations: the published collections, and a user's own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from shine.data.examples import Example, Turn
from shine.data.sources.files import Row, Source, existing, label, parsed, texts


def read_conversations(source: Source) -> Iterator[Example]:
    """The published collections, ``ift_pwc.json`` (MQA) and ``ift_c1qa.json`` (1QA): one list of objects, read as a stream.

    Each is ``{"context": …, "conversations": [{"role": "user" | "assistant", "content": …}, …]}``; the lengths beside them are
    not read. A question that is never answered comes without an answer.
    """
    return parsed(source, {"context": str, "conversations": Sequence}, _conversation)


def _conversation(row: Row, place: str) -> Example:
    turns: list[Turn] = []
    asked: str | None = None
    for number, message in enumerate(row["conversations"], start=1):
        where = f"{place}, message {number}"
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f'{where}: "content" is {content!r:.60}, not a text that is not empty; mend the file')
        expected = "user" if asked is None else "assistant"
        if role != expected:
            raise ValueError(
                f'{where}: "role" is {role!r:.60}, not {expected!r}: questions and answers must take turns; mend the file'
            )
        if asked is None:
            asked = content
        else:
            turns.append(Turn(asked, (content,)))
            asked = None
    if asked is not None:
        turns.append(Turn(asked, ()))
    return Example(place.rsplit("/", 1)[-1], row["context"], tuple(turns))


def read_msmarco_mqa(source: Source) -> Iterator[Example]:
    """``Yewei-Liu/ms_marco_mqa``: passages of MS MARCO with conversations of about fifteen questions, one object a line.

    Each is ``{"query_id": …, "context": …, "conversations": [{"question": …, "answer": …}, …]}``.
    """
    return parsed(source, {"context": str, "conversations": Sequence}, _msmarco_mqa_row, more=["query_id"])


def _msmarco_mqa_row(row: Row, place: str) -> Example:
    turns = tuple(_turn(given, "answer", place) for given in row["conversations"])
    return Example(label(row, "query_id", place) or place, row["context"], turns)


def read_jsonl(source: Source) -> Iterator[Example]:
    """A user's own file, one object a line: ``{"context": ..., "turns": [{"question": ..., "answers": [...]}]}``.

    ``id`` and ``kind`` are optional, and so are the turns where only the context matters.
    """
    if (path := existing(source.config)).is_dir():
        raise ValueError(f"{path}: is a folder; name the file in it, one JSON object a line")
    return parsed(source, {"context": str}, _own_line, more=["id", "turns"])


def _own_line(row: Row, place: str) -> Example:
    if not row["context"].strip():
        raise ValueError(f'{place}: "context" must be a text that is not empty')
    given = row.get("turns", [])
    if not isinstance(given, list):
        raise ValueError(f'{place}: "turns" must be a list')
    turns = tuple(_turn(turn, "answers", place) for turn in given)
    return Example(id=label(row, "id", place) or place, context=row["context"], turns=turns)


def _turn(given: Any, answers: Literal["answer", "answers"], place: str) -> Turn:
    """A turn whose gold answers stand under ``answers``: one text, or a list of them."""
    question = given.get("question") if isinstance(given, Mapping) else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'{place}: each turn needs a "question" (a text that is not empty); it is {given!r:.60}; mend the file')
    golds = texts(given.get("answers") if answers == "answers" else [given.get("answer")], answers, place)
    if not golds:
        raise ValueError(f'{place}: "answers" must hold at least one text; mend the file')
    return Turn(question, tuple(golds), label(given, "kind", place))
