"""Invented stories: people, their relations, places and dates, with questions of several hops and questions that have no answer.

A story is drawn in three steps: a small world in which everything about everybody is settled, a part of it that is told, and
questions about it. Names are made of syllables anew for each story, so nothing in it can be known without the context.
`shine.data.worlds` is simpler: one sentence, one question.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from shine.data.examples import Example, Turn

Kind = Literal["person", "town", "region", "river", "date", "year", "job", "instrument"]
UNANSWERABLE = "unanswerable"
_TRIES = 40
"""Draws of an unanswerable question before a story counts as too fully told for one more."""


@dataclass(frozen=True)
class Attribute:
    """Something that has one value for each person or town, and how it is worded (``{who}``, ``{what}``, ``{a_what}``).

    Attributes:
        of, gives: kind of what has it, and of its values.
        questions: ask for the value.
        phrases: stand for the value within a longer question.
        reverse: asks who has the value.
        symmetric: the value has it too, and its value is ``who``.
        kin: tells something of the value's own kin, so that a person is in one such fact only.
    """

    name: str
    of: Kind
    gives: Kind
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    phrases: tuple[str, ...] = ()
    reverse: str | None = None
    symmetric: bool = False
    kin: bool = False


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _relation(name: str, *statements: str, symmetric: bool = False, kin: bool = False) -> Attribute:
    return Attribute(
        name,
        "person",
        "person",
        (f"{{what}} is the {name} of {{who}}.", f"The {name} of {{who}} is {{what}}.", *statements),
        (f"Who is the {name} of {{who}}?", f"What is the name of the {name} of {{who}}?"),
        (f"the {name} of {{who}}",),
        symmetric=symmetric,
        kin=kin,
    )


ATTRIBUTES = (
    Attribute(
        "home",
        "person",
        "town",
        ("{who} lives in {what}.", "The home of {who} is in {what}.", "{who} has a house in {what}."),
        ("Where does {who} live?", "In which town is the home of {who}?"),
        ("the town where {who} lives", "the home town of {who}"),
        "Who lives in {what}?",
    ),
    Attribute(
        "birthplace",
        "person",
        "town",
        ("{who} was born in {what}.", "The birthplace of {who} is {what}.", "{who} came into the world in {what}."),
        ("Where was {who} born?", "What is the birthplace of {who}?"),
        ("the birthplace of {who}", "the town where {who} was born"),
        "Who was born in {what}?",
    ),
    Attribute(
        "birthday",
        "person",
        "date",
        ("{who} was born on {what}.", "The day of birth of {who} is {what}.", "{who} came into the world on {what}."),
        ("When was {who} born?", "On which day was {who} born?"),
    ),
    Attribute(
        "job",
        "person",
        "job",
        ("{who} works as {a_what}.", "The job of {who} is that of {a_what}.", "{who} is {a_what} by trade."),
        ("What is the job of {who}?", "As what does {who} work?"),
        reverse="Who works as {a_what}?",
    ),
    Attribute(
        "instrument",
        "person",
        "instrument",
        ("{who} plays the {what}.", "The instrument of {who} is the {what}.", "{who} has learned the {what}."),
        ("Which instrument does {who} play?", "What is the instrument of {who}?"),
        reverse="Who plays the {what}?",
    ),
    _relation("teacher", "{who} took lessons from {what}."),
    _relation("employer", "{who} is paid by {what}."),
    _relation("doctor", "{who}, when ill, sends for {what}."),
    _relation("spouse", "{who} is married to {what}.", symmetric=True),
    _relation("sister", "{who} has a sister, {what}.", kin=True),
    _relation("brother", "{who} has a brother, {what}.", kin=True),
    Attribute(
        "region",
        "town",
        "region",
        ("{who} lies in the region of {what}.", "The region around {who} is called {what}.", "{who} is a town of {what}."),
        ("In which region does {who} lie?", "To which region does {who} belong?"),
    ),
    Attribute(
        "river",
        "town",
        "river",
        ("{who} stands on the river {what}.", "The river {what} flows through {who}.", "The river of {who} is the {what}."),
        ("On which river does {who} stand?", "Which river flows through {who}?"),
        reverse="Which town stands on the river {what}?",
    ),
    Attribute(
        "founded",
        "town",
        "year",
        ("{who} was founded in {what}.", "The year in which {who} was founded is {what}."),
        ("In which year was {who} founded?", "Since which year has {who} existed?"),
        reverse="Which town was founded in {what}?",
    ),
)
BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}
FIRST_BORN = "Who was born first, {one} or {other}?"
JOBS = _words(
    "baker barber butcher carpenter cook dentist farmer fisher gardener guard judge lawyer miller nurse painter pilot potter "
    "sailor smith tailor writer"
)
INSTRUMENTS = _words(
    "accordion banjo bassoon cello clarinet cornet fiddle flute guitar harp horn lute mandolin oboe organ tuba viola"
)
MONTHS = _words("January February March April May June July August September October November December")
_STARTS = _words("B D F G H J K L M N P R S T V W Z Br Dr Gl Kr Pl St Tr")
_MIDDLES = _words("ab ad al am ar az eb el em en er ev ib il im in ir ol om on or ub ul um un ur")
_ENDS: dict[Kind, tuple[str, ...]] = {
    "person": _words("a an e i ia in is o on us"),
    "town": _words("bridge burg by ford ham stead ton wick"),
    "region": _words("land mark ovia ria shire"),
    "river": _words("ava ock une ith eld"),
}


@dataclass(frozen=True)
class Fact:
    """``attribute`` of ``who`` is ``what``."""

    who: str
    attribute: Attribute
    what: str

    def statement(self, rng: random.Random) -> str:
        """A sentence that says so; a symmetric fact is told from either side."""
        who, what = rng.sample((self.who, self.what), 2) if self.attribute.symmetric else (self.who, self.what)
        return _fill(rng.choice(self.attribute.statements), who=who, what=what)


@dataclass(frozen=True)
class Question:
    """A question, its answer (``None``: the story does not say), and what was told that gives the answer away."""

    text: str
    answer: str | None
    kind: str
    told: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Story:
    """How stories are drawn.

    Attributes:
        people: least and most people in a story.
        facts: least and most sentences.
        turns: most questions; a short story may give fewer.
        hops: most facts that a question goes through.
        unanswerable: share of questions whose answer the story does not tell.
        unknown: the answer to these.
        seed: two settings with different seeds share no sequence of draws.
    """

    people: tuple[int, int] = (4, 7)
    facts: tuple[int, int] = (12, 20)
    turns: int = 8
    hops: int = 3
    unanswerable: float = 0.15
    unknown: str = "unknown"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.people[0] <= self.people[1] <= 100:
            raise ValueError(f"stories: people={list(self.people)} must be the least and the most, from 2 to 100")
        # Each person has five facts and three relations at least.
        room = 8 * self.people[0]
        if not 1 <= self.facts[0] <= self.facts[1] <= room:
            raise ValueError(
                f"stories: facts={list(self.facts)} must be the least and the most, to {room} of {self.people[0]} people"
            )
        if self.turns < 1 or self.hops < 1 or not 0 <= self.unanswerable < 1 or not self.unknown.strip():
            raise ValueError("stories: turns and hops must be 1 or more, unanswerable from 0 to below 1, unknown a text")

    def examples(self, count: int) -> Iterator[Example]:
        """``count`` stories; example ``i`` is the same whatever ``count`` is."""
        return map(self.example, range(count))

    def example(self, index: int) -> Example:
        """Story number ``index``."""
        rng = random.Random(f"story {self.seed} {index}")
        facts = _draw_facts(rng.randint(*self.people), rng)
        told = rng.sample(facts, rng.randint(*self.facts))
        turns = tuple(Turn(q.text, (q.answer or self.unknown,), q.kind) for q in self._questions(told, rng))
        return Example(f"story-{self.seed}-{index}", " ".join(fact.statement(rng) for fact in told), turns)

    def _questions(self, told: Sequence[Fact], rng: random.Random) -> list[Question]:
        """No answer stands in an earlier turn, and nothing told is asked for twice in different words."""
        asking = _Asking(told, rng)
        pools = [*asking.chains(self.hops), asking.reverses(), asking.comparisons()]
        for pool in pools:
            rng.shuffle(pool)
        chosen: list[Question] = []
        used: set[tuple[str, str]] = set()
        while len(chosen) < self.turns:
            if rng.random() < self.unanswerable:
                candidates: Iterator[Question] = filter(None, (asking.unanswerable(self.hops) for _ in range(_TRIES)))
            else:
                candidates = _drawn(pools, rng)
            fitting = (question for question in candidates if not question.told & used and not _given_away(question, chosen))
            question = next(fitting, None)
            if question is None:
                break
            chosen.append(question)
            used |= question.told
        return chosen


class _Asking:
    """Questions about what is told."""

    def __init__(self, told: Sequence[Fact], rng: random.Random) -> None:
        self.rng = rng
        self.value = {(fact.who, fact.attribute.name): fact.what for fact in told}
        self.value |= {(fact.what, fact.attribute.name): fact.who for fact in told if fact.attribute.symmetric}
        self.kin = {name for fact in told if fact.attribute.kin for name in (fact.who, fact.what)}
        self.told = told
        self.people = sorted({fact.who for fact in told if fact.attribute.of == "person"})

    def chains(self, hops: int) -> list[list[Question]]:
        """From one fact to ``hops`` of them in a row, by their number."""
        starts = sorted({who for who, _ in self.value})
        paths: list[tuple[list[str], list[Attribute]]] = [([who], []) for who in starts]
        pools = []
        for length in range(1, hops + 1):
            longer = [
                ([*seen, self.value[seen[-1], attribute.name]], [*path, attribute])
                for seen, path in paths
                for attribute in ATTRIBUTES
                # Nobody is met twice: "the spouse of the spouse of" is a riddle of its own.
                if self.value.get((seen[-1], attribute.name)) not in (None, *seen)
            ]
            pools.append([self._chain(seen, path, kind=f"{length}-hop") for seen, path in longer])
            paths = [(seen, path) for seen, path in longer if path[-1].phrases]
        return pools

    def _chain(self, seen: Sequence[str], path: Sequence[Attribute], *, kind: str) -> Question:
        return Question(self._word(seen[0], path), seen[-1], kind, self._link(seen[-2], path[-1], seen[-1]))

    def _word(self, who: str, path: Sequence[Attribute]) -> str:
        for attribute in path[:-1]:
            who = self.rng.choice(attribute.phrases).format(who=who)
        return self.rng.choice(path[-1].questions).format(who=who)

    def _link(self, who: str, attribute: Attribute, what: str) -> frozenset[tuple[str, str]]:
        return frozenset({(who, attribute.name)} | ({(what, attribute.name)} if attribute.symmetric else set()))

    def reverses(self) -> list[Question]:
        """Who has a value that one alone is said to have."""
        having: dict[tuple[str, str], list[str]] = {}
        for (who, name), what in self.value.items():
            having.setdefault((name, what), []).append(who)
        return [
            Question(_fill(reverse, what=what), who[0], "reverse", frozenset({(who[0], name)}))
            for (name, what), who in having.items()
            if (reverse := BY_NAME[name].reverse) is not None and len(who) == 1
        ]

    def comparisons(self) -> list[Question]:
        """Which of two people was born first."""
        born = [who for who in self.people if (who, "birthday") in self.value]
        return [self._comparison(*self.rng.sample(pair, 2)) for pair in itertools.combinations(born, 2)]

    def _comparison(self, one: str, other: str) -> Question:
        first = min(one, other, key=lambda who: _day(self.value[who, "birthday"]))
        told = frozenset({(one, "birthday"), (other, "birthday")})
        return Question(FIRST_BORN.format(one=one, other=other), first, "comparison", told)

    def unanswerable(self, hops: int) -> Question | None:
        """A question that breaks off at its first or last fact; ``None`` if the first try does not."""
        who = self.rng.choice(self.people) if self.people else ""
        path: list[Attribute] = []
        at: str | None = who
        kind: Kind = "person"
        for length in range(self.rng.randint(1, hops), 0, -1):
            fitting = [a for a in ATTRIBUTES if a.of == kind and (a.phrases or length == 1)]
            if not fitting:
                return None
            path.append(self.rng.choice(fitting))
            # Of a brother's sister something is known, even if not who she is.
            if at is not None and path[-1].kin and at in self.kin and (at, path[-1].name) not in self.value:
                return None
            at = self.value.get((at, path[-1].name)) if at is not None else None
            kind = path[-1].gives
        if not who or at is not None:
            return None
        return Question(self._word(who, path), None, UNANSWERABLE, frozenset({(who, " ".join(a.name for a in path))}))


def _drawn(pools: Sequence[list[Question]], rng: random.Random) -> Iterator[Question]:
    """Questions taken out of the pools, a pool first, so that the many chains do not crowd out the other kinds."""
    while filled := [pool for pool in pools if pool]:
        yield rng.choice(filled).pop()


def _given_away(question: Question, earlier: Sequence[Question]) -> bool:
    """Whether the answer is a word of the question (but for a choice of two) or of an earlier turn."""
    texts = [f"{turn.text} {turn.answer}" for turn in earlier] + ([] if question.kind == "comparison" else [question.text])
    return question.answer is not None and any(question.answer in text for text in texts)


def _draw_facts(count: int, rng: random.Random) -> list[Fact]:
    """Everything about ``count`` people and their towns, in no order."""
    names: set[str] = set()
    people = _names("person", count, names, rng)
    towns = _names("town", max(2, count // 2 + 1), names, rng)
    regions, rivers = _names("region", 3, names, rng), _names("river", 3, names, rng)
    days = rng.sample(range(28 * 12 * 40), count)
    years = rng.sample(range(1100, 1700), len(towns))
    values: list[tuple[str, str, str]] = []
    for who, day in zip(people, days, strict=True):
        values += [(who, "home", rng.choice(towns)), (who, "birthplace", rng.choice(towns)), (who, "birthday", _date(day))]
        values += [(who, "job", rng.choice(JOBS)), (who, "instrument", rng.choice(INSTRUMENTS))]
        others = [other for other in people if other != who]
        values += [(who, name, rng.choice(others)) for name in ("teacher", "employer", "doctor")]
    # Neighbours in a row: each is in one pair of kin and in one marriage, never with the same other.
    for index, (one, other) in enumerate(itertools.pairwise(people)):
        values.append((one, "spouse" if index % 2 else rng.choice(("sister", "brother")), other))
    for town, year in zip(towns, years, strict=True):
        values += [(town, "region", rng.choice(regions)), (town, "river", rng.choice(rivers)), (town, "founded", str(year))]
    facts = [Fact(who, BY_NAME[name], what) for who, name, what in values]
    rng.shuffle(facts)
    return facts


def _names(kind: Kind, count: int, taken: set[str], rng: random.Random) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        name = rng.choice(_STARTS) + rng.choice(_MIDDLES) + rng.choice(_ENDS[kind])
        # No name is part of another, so that none gives another away.
        if not any(name in other or other in name for other in taken):
            taken.add(name)
            found.append(name)
    return found


def _date(day: int) -> str:
    years, rest = divmod(day, 28 * 12)
    return f"{rest % 28 + 1} {MONTHS[rest // 28]} {1840 + years}"


def _day(date: str) -> tuple[int, int, int]:
    day, month, year = date.split()
    return int(year), MONTHS.index(month), int(day)


def _fill(template: str, *, what: str, who: str = "") -> str:
    article = "an" if what[0].lower() in "aeiou" else "a"
    return template.format(who=who, what=what, a_what=f"{article} {what}")
