"""Invented worlds: people with made-up names and the facts about them, so that no answer can be known without the context.

Every context draws its people and facts anew. The values of a fact come from a fixed list per kind of question, uniformly, so
the best constant answer to a kind is right once in as many times as the list is long.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shine.data.examples import Example, Turn


@dataclass(frozen=True)
class Relation:
    """A kind of fact: its values, the ways to state it and the ways to ask for it (``{who}``, ``{what}``, ``{a_what}``)."""

    kind: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


NAMES = _words(
    "Abro Adila Amsel Anwen Arvo Aspin Balin Benka Boril Brenna Calder Corva Dagny Delphi Doran Edwy Elska Emrys Enzo Falka "
    "Farin Fenna Galen Gisla Gorin Halva Hedda Hobart Ilka Imre Isolda Ivar Jarek Jolan Jorun Kalle Karsa Kelda Koren Lador "
    "Leif Linnea Lorcan Ludo Maren Marlo Mirka Morten Nadir Nerys Nilo Norna Odalys Odin Olwen Orlo Osric Padma Perrin Petra "
    "Quill Rasmus Ravel Rhea Rolf Runa Sabra Selim Signe Soren Sunniva Talin Tamsin Tarek Thora Tobin Ulla Umar Unna Vanja "
    "Varro Velma Viggo Wanda Wendel Wilma Xandro Ximena Yara Yorick Ysolt Zadie Zelda Zoran Zuri Tilda"
)

RELATIONS = (
    Relation(
        "home",
        _words(
            "Arlow Bexley Brimor Calwick Dornal Elmsby Farrow Glenor Harwen Istmar Kelbrook Lorvik Marden Norfell Oswin Pelham "
            "Quenby Ravno Selkirk Tolen Ulmar Venby Westrel Yarvik"
        ),
        ("{who} lives in {what}.", "The home of {who} is in {what}.", "{who} has a house in {what}."),
        ("Where does {who} live?", "In which town is the home of {who}?"),
    ),
    Relation(
        "job",
        _words(
            "baker barber butcher carpenter cook dentist doctor driver farmer fisher gardener guard judge lawyer miller nurse "
            "painter pilot potter sailor smith tailor teacher writer"
        ),
        ("{who} works as {a_what}.", "The job of {who} is {what}.", "{who} earns money as {a_what}."),
        ("What is the job of {who}?", "As what does {who} work?"),
    ),
    Relation(
        "food",
        _words(
            "apples beans bread cake carrots cheese cherries corn dumplings eggs figs fish grapes honey lentils mushrooms noodles "
            "nuts olives onions pears plums rice soup"
        ),
        ("{who} likes to eat {what}.", "The favorite food of {who} is {what}.", "{who} eats {what} every day."),
        ("What does {who} like to eat?", "What is the favorite food of {who}?"),
    ),
    Relation(
        "color",
        _words(
            "amber beige black blue bronze brown coral crimson cyan gold gray green indigo ivory lilac orange pink purple red "
            "silver teal violet white yellow"
        ),
        ("{who} wears {a_what} coat.", "The coat of {who} is {what}.", "{who} bought {a_what} coat."),
        ("What color is the coat of {who}?", "Which color does {who} wear?"),
    ),
    Relation(
        "pet",
        _words(
            "beetle camel cat cow crow dog donkey duck ferret frog goat goose hamster hen horse lizard mouse owl parrot pony "
            "rabbit sheep snake turtle"
        ),
        ("{who} keeps {a_what}.", "The pet of {who} is {a_what}.", "{who} takes care of {a_what}."),
        ("Which animal does {who} keep?", "What is the pet of {who}?"),
    ),
    Relation(
        "music",
        _words(
            "accordion banjo bass bassoon bugle cello clarinet cornet drum fiddle flute guitar harp horn lute lyre mandolin oboe "
            "organ piano sitar trumpet tuba viola"
        ),
        ("{who} plays the {what}.", "The instrument of {who} is the {what}.", "{who} learned to play the {what}."),
        ("Which instrument does {who} play?", "What is the instrument of {who}?"),
    ),
    Relation(
        "sport",
        _words(
            "archery badminton baseball basketball bowling boxing chess climbing cricket cycling dancing diving fencing football "
            "golf hockey judo rowing rugby running skating skiing swimming tennis"
        ),
        ("{who} is good at {what}.", "The sport of {who} is {what}.", "{who} spends the weekend on {what}."),
        ("What is {who} good at?", "What is the sport of {who}?"),
    ),
    Relation(
        "month",
        _words("January February March April May June July August September October November December"),
        ("{who} was born in {what}.", "The birthday of {who} is in {what}.", "{who} has a birthday in {what}."),
        ("In which month was {who} born?", "When is the birthday of {who}?"),
    ),
)


@dataclass(frozen=True)
class Fact:
    """One thing that is true of one person."""

    who: str
    relation: Relation
    what: str

    def statement(self, rng: random.Random) -> str:
        """A sentence that says so."""
        return rng.choice(self.relation.statements).format(who=self.who, what=self.what, a_what=_with_article(self.what))

    def turn(self, rng: random.Random) -> Turn:
        """A question that asks for it."""
        return Turn(rng.choice(self.relation.questions).format(who=self.who), (self.what,), self.relation.kind)


@dataclass(frozen=True)
class World:
    """How contexts are drawn.

    Attributes:
        facts: least and most facts in a context.
        people: least and most people in a context; every person has at least one fact.
        kinds: least and most kinds of fact that a context draws from. The fewer, the more people share one, so that the kind
            of a question says less about its answer.
        seed: two worlds with different seeds share no sequence of draws.
    """

    facts: tuple[int, int] = (4, 6)
    people: tuple[int, int] = (2, 3)
    kinds: tuple[int, int] = (len(RELATIONS), len(RELATIONS))
    seed: int = 0

    def __post_init__(self) -> None:
        room = self.people[0] * self.kinds[0]
        for name, limit in {"people": len(NAMES), "kinds": len(RELATIONS), "facts": room}.items():
            least, most = getattr(self, name)
            if not 1 <= least <= most <= limit:
                of = f" of {self.kinds[0]} kinds" if self.kinds[0] < len(RELATIONS) else ""
                why = f" ({self.people[0]} people have at most {room} facts{of})" if name == "facts" else ""
                raise ValueError(f"worlds: {name}={[least, most]} must be the least and the most, from 1 to {limit}{why}")

    def examples(self, count: int) -> Iterator[Example]:
        """``count`` contexts, each fact asked for exactly once; example ``i`` is the same whatever ``count`` is."""
        for index in range(count):
            yield self.example(index)

    def example(self, index: int) -> Example:
        """Context number ``index`` of this world."""
        rng = random.Random(f"world {self.seed} {index}")
        facts = self.draw(rng)
        text = tell(facts, rng)
        rng.shuffle(facts)
        return Example(id=f"world-{self.seed}-{index}", context=text, turns=tuple(fact.turn(rng) for fact in facts))

    def draw(self, rng: random.Random) -> list[Fact]:
        """The facts of one context, in no order."""
        people = rng.sample(NAMES, rng.randint(*self.people))
        relations = rng.sample(RELATIONS, rng.randint(*self.kinds))
        count = max(rng.randint(*self.facts), len(people))
        pairs = [(person, relation) for person in people for relation in relations]
        # One fact for each person first, so that nobody is a mere name.
        chosen = [(person, rng.choice(relations)) for person in people]
        chosen += rng.sample([pair for pair in pairs if pair not in chosen], count - len(people))
        facts = [Fact(person, relation, rng.choice(relation.values)) for person, relation in chosen]
        rng.shuffle(facts)
        return facts


def tell(facts: Iterable[Fact], rng: random.Random) -> str:
    """The facts as a text, in their order, each in one of its ways."""
    return " ".join(fact.statement(rng) for fact in facts)


def guess_rate(kind: str) -> float:
    """How often the best constant answer to this kind of question is right, in percent."""
    return 100 / len(next(relation.values for relation in RELATIONS if relation.kind == kind))
