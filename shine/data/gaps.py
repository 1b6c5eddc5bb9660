"""Questions made of a text's own sentences: a span is taken out and asked for.

No model writes them. Dates, numbers, names and short noun phrases are found by their form, and a question is the clause around
one with a question word in its place ("the first railway opened in what year?") or a blank. They are not what people ask, but there
is no end of them, they are about real text, and its own words answer them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from shine.data.examples import Turn
from shine.pieces import sentences

BLANK = "____"
BLANKS = 0.2
"""Share of the questions that have a blank instead of a question word."""
FEWEST_WORDS = 3
"""A clause with fewer words beside its span asks for nothing in particular."""
MOST_WORDS = 12
"""Of a clause, on either side of its span."""
_NUMBERS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty"
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_FIRST = "In|On|At|By|For|From|The|A|An|After|Before|During|If|When|While|As|Since|With|To|But|And|Of|Under|Between"
_SMALL = "of|the|and|de|von|van|for"
_STOPS = (
    "of|in|that|which|who|and|or|to|for|with|by|from|on|at|is|are|was|were|has|have|had|as|than|when|where|the|a|an|under|over|"
    "into|about|between|against|after|before|during|through|across|if|but|not|can|may|will|would|could|should|do|does|did"
)
_BEFORE_THINGS = "|".join(rf"(?<=\b{word} )" for word in ("the", "its", "a", "an", "of", "by", "with"))
_NAME = r"[A-Z][\w-]+"
_PHRASE = rf"(?:(?!(?:{_STOPS})\b)[a-z][a-z-]+ ){{0,2}}(?!(?:{_STOPS})\b)[a-z][a-z-]+(?=[,.;:!?]| (?:{_STOPS})\b)"
_PLACE = re.compile(r"\b(?:in|at|from|near) $")
_CLAUSE_END = re.compile(r"[,;:()“”\"]|—| – ")


@dataclass(frozen=True)
class _Kind:
    """A form of span, and the words that can stand in its place."""

    name: str
    form: re.Pattern[str]
    words: tuple[str, ...]


_KINDS = (
    _Kind(
        "date",
        re.compile(rf"\b(?:(?:{_MONTHS}) \d{{1,2}}(?:, \d{{4}})?|\d{{1,2}} (?:{_MONTHS})(?: \d{{4}})?)\b"),
        ("what date", "which day"),
    ),
    _Kind("year", re.compile(r"(?<![\d,.$£€-])(?:1[0-9]|20)\d\d\b(?![,.]\d|%|-)"), ("what year", "which year")),
    _Kind("share", re.compile(r"(?<![\w.,])\d[\d.,]*(?:%| percent\b| per cent\b)"), ("what percentage", "how much")),
    _Kind("money", re.compile(r"[$£€]\d[\d.,]*\d?(?: (?:million|billion|trillion)\b|(?:m|bn)\b)?"), ("how much", "how much money")),
    _Kind("number", re.compile(rf"(?<![\w.,$£€-])(?:\d[\d,]*(?:\.\d+)?|{_NUMBERS})(?= [a-z])"), ("how many",)),
    _Kind(
        "name",
        re.compile(rf"(?<=\w ){_NAME}(?: (?:(?:{_SMALL}) )?{_NAME})*|^(?!(?:{_FIRST})\b){_NAME}(?: {_NAME})+"),
        ("who", "what"),
    ),
    _Kind("thing", re.compile(rf"(?:{_BEFORE_THINGS}){_PHRASE}"), ("what",)),
)


def gap_questions(text: str, *, most: int, rng: random.Random) -> tuple[Turn, ...]:
    """Up to ``most`` questions about ``text``, no two alike.

    Sentences take turns: one gets a second question when each has had its first. Names and figures come before things, mostly.

    A turn's kind says what is asked for: ``date``, ``year``, ``share``, ``money``, ``number``, ``name`` or ``thing``.
    """
    lines = [" ".join(sentence.split()) for sentence in sentences(text) if sentence.strip()]
    of_each = [sorted(_sentence_questions(line, rng), key=lambda turn: rng.random() + (turn.kind == "thing") / 2) for line in lines]
    turns: dict[str, Turn] = {}
    for depth in range(max(map(len, of_each), default=0)):
        level = [found[depth] for found in of_each if len(found) > depth]
        rng.shuffle(level)
        turns |= {turn.question: turn for turn in level if turn.question not in turns}
    return tuple(turns.values())[:most]


def _sentence_questions(line: str, rng: random.Random) -> Iterator[Turn]:
    taken: list[tuple[int, int]] = []
    for kind in _KINDS:
        for match in kind.form.finditer(line):
            start, end = match.span()
            # A year inside a date is asked for as the date.
            if any(start < other_end and other_start < end for other_start, other_end in taken):
                continue
            taken.append((start, end))
            question = _question(line, start, end, kind, rng)
            if question is not None:
                yield Turn(question, (match[0],), kind.name)


def _question(line: str, start: int, end: int, kind: _Kind, rng: random.Random) -> str | None:
    """The clause around a span with something in its place, or nothing where the clause says too little or gives it away."""
    before, after = line[:start], line[end:].rstrip('.!?"”')
    clause = _CLAUSE_END.split(before)[-1], _CLAUSE_END.split(after)[0]
    if len("".join(clause).split()) >= FEWEST_WORDS:
        before, after = clause
    before, after = " ".join(before.split()[-MOST_WORDS:]), _first_words(after)
    gives_away = re.compile(rf"(?<!\w){re.escape(line[start:end])}(?!\w)", re.IGNORECASE)
    if len(f"{before} {after}".split()) < FEWEST_WORDS or gives_away.search(f"{before} {after}"):
        return None
    words = ("where", "which place") if kind.name == "name" and _PLACE.search(line[:start]) else kind.words
    blank = rng.random() < BLANKS
    asked = f"{before} {BLANK if blank else rng.choice(words)}{after}".strip()
    return f"{asked[0].upper()}{asked[1:]}{'' if blank else '?'}"


def _first_words(text: str) -> str:
    """The first words, with what stands before them: a space, or the end of the word before."""
    found = re.match(rf"\S*(?:\s+\S+){{0,{MOST_WORDS}}}", text)
    assert found is not None
    return found[0]
