"""Invented stories as a source, which needs no file."""

from __future__ import annotations

from collections.abc import Iterator

from shine.data.examples import Example
from shine.data.sources.files import Source
from shine.data.stories import Story


def read_stories(
    source: Source,
    *,
    count: int,
    seed: int,
    people: tuple[int, int] = Story.people,
    facts: tuple[int, int] = Story.facts,
    turns: int = Story.turns,
    hops: int = Story.hops,
    unanswerable: float = Story.unanswerable,
    unknown: str = Story.unknown,
) -> Iterator[Example]:
    """Invented stories, ``count`` of them drawn from ``seed``; the rest as in `Story`."""
    try:
        story = Story(
            people=(int(people[0]), int(people[1])),
            facts=(int(facts[0]), int(facts[1])),
            turns=int(turns),
            hops=int(hops),
            unanswerable=float(unanswerable),
            unknown=str(unknown),
            seed=int(seed),
        )
        return story.examples(int(count))
    except (TypeError, IndexError) as error:
        raise ValueError(f"stories: people and facts must be pairs of whole numbers, the rest numbers ({error})") from None
