"""Sources that need no file."""

from __future__ import annotations

from collections.abc import Iterator

from shine.data.examples import Example
from shine.data.sources.files import Source
from shine.data.worlds import World


def read_worlds(
    source: Source,
    *,
    count: int,
    seed: int,
    facts: tuple[int, int] = World.facts,
    people: tuple[int, int] = World.people,
    kinds: tuple[int, int] = World.kinds,
) -> Iterator[Example]:
    """Invented worlds, ``count`` contexts drawn from ``seed``; the rest as in `World`."""
    bounds = {"facts": facts, "people": people, "kinds": kinds}
    try:
        pairs = {name: (int(least), int(most)) for name, (least, most) in bounds.items()}
        count, seed = int(count), int(seed)
    except (TypeError, ValueError):
        raise ValueError(f"worlds: each of {bounds} must be a pair of whole numbers, count and seed numbers") from None
    return World(seed=seed, **pairs).examples(count)
