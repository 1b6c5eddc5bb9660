"""Short texts grouped to a budget, first fit."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(costs: Sequence[tuple[int, int]], *, limits: tuple[int, int], open_groups: int = 64) -> list[list[int]]:
    """Put each item into the first group that still has room in both budgets.

    Args:
        costs: what each item takes of the two budgets; no item exceeds a limit by itself.
        limits: the two budgets of a group.
        open_groups: how many groups are kept open; the fullest is closed when one more is needed, which bounds time and memory.

    Returns:
        Groups of item indices; every item is in exactly one.
    """
    closed: list[list[int]] = []
    opened: list[tuple[list[int], list[int]]] = []
    for item, cost in enumerate(costs):
        fitting = next((g for g in opened if all(u + c <= limit for u, c, limit in zip(g[1], cost, limits, strict=True))), None)
        if fitting is None:
            if len(opened) == open_groups:
                fullest = max(range(len(opened)), key=lambda g: opened[g][1])
                closed.append(opened.pop(fullest)[0])
            fitting = ([], [0, 0])
            opened.append(fitting)
        fitting[0].append(item)
        fitting[1][:] = [u + c for u, c in zip(fitting[1], cost, strict=True)]
    return closed + [members for members, _ in opened]
