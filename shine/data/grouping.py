"""Short texts grouped to a budget, first fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Groups:
    """A partition of items.

    Attributes:
        members: the items, group after group.
        ends: where in ``members`` each group ends.
        totals: what each group took of the first budget.
    """

    members: np.ndarray
    ends: np.ndarray
    totals: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, group: int) -> list[int]:
        found: list[int] = self.members[self.ends[group - 1] if group else 0 : self.ends[group]].tolist()
        return found

    def save(self, file: Path) -> None:
        """Write to an ``.npz`` file."""
        np.savez(file, members=self.members, ends=self.ends, totals=self.totals)

    @staticmethod
    def load(file: Path) -> Groups:
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            return Groups(arrays["members"], arrays["ends"], arrays["totals"])


def first_fit(costs: np.ndarray, *, limits: tuple[int, int], open_groups: int = 64) -> Groups:
    """Put each item into the first group that still has room in both budgets.

    Args:
        costs: ``[N, 2]``, what each item takes of the two budgets; no item exceeds a limit by itself.
        limits: the two budgets of a group.
        open_groups: how many groups are kept open; the fullest is closed when one more is needed, which bounds time and memory.

    Returns:
        The groups in the order in which they were closed, those still open last, oldest first.
    """
    group_of = np.empty(len(costs), dtype=np.int64)
    room = np.zeros((open_groups, 2), dtype=np.int64)
    # Which group each open place holds, oldest first; groups are numbered as they are opened.
    held: list[int] = []
    closed: list[int] = []
    opened = 0
    for item, cost in enumerate(costs):
        count = len(held)
        fits = (room[:count, 0] >= cost[0]) & (room[:count, 1] >= cost[1])
        place = int(fits.argmax()) if count else 0
        if not count or not fits[place]:
            if count == open_groups:
                place = _fullest(room)
                closed.append(held.pop(place))
                room[place:-1] = room[place + 1 :]
                count -= 1
            place = count
            held.append(opened)
            room[place] = limits
            opened += 1
        room[place] -= cost
        group_of[item] = held[place]
    return _gathered(group_of, costs, order=closed + held)


def _fullest(room: np.ndarray) -> int:
    """The place with the least room, by the first budget, then the second."""
    return int(np.lexsort((room[:, 1], room[:, 0]))[0])


def _gathered(group_of: np.ndarray, costs: np.ndarray, *, order: list[int]) -> Groups:
    place_of = np.empty(len(order), dtype=np.int64)
    place_of[order] = np.arange(len(order))
    places = place_of[group_of]
    totals = np.bincount(places, weights=costs[:, 0], minlength=len(order)).astype(np.int64)
    return Groups(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places, minlength=len(order))), totals)
