"""How sure a score is: bootstrap intervals over contexts, and differences between two that looked at the same.

Questions about one context are not independent, so contexts are drawn, each with all its questions: percentile bootstrap, seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED = 4000, 0


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def plain(self) -> dict[str, float]:
        """For a JSON file."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Totals:
    """Of each context, the sum of a score and the weight it is a mean over (questions, or tokens): context id -> pair."""

    of: Mapping[str, tuple[float, float]]

    def mean(self) -> float:
        """The score over all contexts."""
        sums, weights = np.array(list(self.of.values()), dtype=np.float64).T
        return float(sums.sum() / weights.sum())


def interval(totals: Totals, *, transform: Callable[[float], float] = float, seed: int = SEED) -> Estimate:
    """The mean with its interval.

    Args:
        transform: a rising function of the mean, such as ``exp`` for a perplexity.
    """
    means = _resampled(np.array(list(totals.of.values()), dtype=np.float64), seed)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(transform(totals.mean()), transform(float(low)), transform(float(high)))


def difference(ours: Totals, theirs: Totals, *, seed: int = SEED) -> Estimate:
    """How much higher ``ours`` is than ``theirs`` on the contexts that both looked at: drawn together, so that what makes a
    context hard for both does not widen the interval.

    Raises:
        ValueError: they share no context.
    """
    first, second = _drawn_together(ours, theirs, seed=seed)
    return _estimate(first - second)


def way(ours: Totals, *, floor: Totals, ceiling: Totals, seed: int = SEED) -> Estimate | None:
    """What part of the way from ``floor`` to ``ceiling`` is gone, in percent: 0 is no better than one, 100 as good as the other.

    On the contexts that all three looked at, drawn together. ``None`` where the ceiling is not above the floor beyond chance
    (the 95 % interval of their difference reaches to zero): there is no way to go then.

    Raises:
        ValueError: they share no context.
    """
    mine, low, high = _drawn_together(ours, floor, ceiling, seed=seed)
    if _estimate(high - low).low <= 0:
        return None
    # The few resamples that leave no way, at most one in forty, would have no share of it.
    drawn = high > low
    return _estimate(100 * (mine[drawn] - low[drawn]) / (high[drawn] - low[drawn]))


def pairs_interval(groups: Sequence[Sequence[float]], *, seed: int = SEED) -> Estimate:
    """The mean over all pairs of contexts with its interval: contexts are drawn, and with them their pairs with the others drawn
    (none with itself).

    Args:
        groups: contexts that were compared with each other; of each group of C the values of its pairs, ``(0, 1)``, ``(0, 2)``, …,
            ``(C - 2, C - 1)``. At least one pair in all.
    """
    tables = []
    for values in groups:
        tables.append(np.zeros(2 * (round((1 + math.sqrt(1 + 8 * len(values))) / 2),)))
        tables[-1][np.triu_indices(len(tables[-1]), 1)] = values
    ends = np.cumsum([len(table) for table in tables])
    generator = np.random.default_rng(seed)
    found = [_mean_of_pairs(np.ones((1, ends[-1])), tables, ends)]
    for size in _portions(ends[-1]):
        drawn = generator.multinomial(ends[-1], np.full(ends[-1], 1 / ends[-1]), size=size)
        found.append(_mean_of_pairs(drawn, tables, ends))
    return _estimate(np.concatenate(found))


def _mean_of_pairs(weights: np.ndarray, tables: Sequence[np.ndarray], ends: np.ndarray) -> np.ndarray:
    """Of each row of ``weights [R, contexts]`` the mean over pairs of different contexts, each as often as both were drawn; a row
    that holds no pair is left out."""
    sums, pairs = np.zeros((2, len(weights)))
    for table, drawn in zip(tables, np.split(weights, ends[:-1], axis=1), strict=True):
        sums += ((drawn @ table) * drawn).sum(1)
        pairs += (drawn.sum(1) ** 2 - (drawn**2).sum(1)) / 2
    return np.asarray(sums[pairs > 0] / pairs[pairs > 0])


def _drawn_together(*results: Totals, seed: int) -> list[np.ndarray]:
    """Of each result its mean over the contexts that all looked at, and then that of each resample of these contexts."""
    shared = sorted(set.intersection(*(set(totals.of) for totals in results)))
    if not shared:
        raise ValueError("the results share no context: compare runs on the same data")
    pairs = [np.array([totals.of[name] for name in shared], dtype=np.float64) for totals in results]
    return [np.concatenate([[pair[:, 0].sum() / pair[:, 1].sum()], _resampled(pair, seed)]) for pair in pairs]


def _estimate(values: np.ndarray) -> Estimate:
    """The first value, and the bounds that the others give it."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high))


def _resampled(pairs: np.ndarray, seed: int) -> np.ndarray:
    """The ratio of sums of each resample of the rows of ``pairs [C, 2]``; equal seeds draw equal rows."""
    count, generator = len(pairs), np.random.default_rng(seed)
    means = []
    for size in _portions(count):
        sums = generator.multinomial(count, np.full(count, 1 / count), size=size) @ pairs
        means.append(sums[:, 0] / sums[:, 1])
    return np.concatenate(means)


def _portions(count: int) -> Iterator[int]:
    """So many resamples at once as make about 30 MB of counts."""
    step = max(4_000_000 // count, 1)
    for start in range(0, RESAMPLES, step):
        yield min(step, RESAMPLES - start)


def break_even(*, encode: float, answer: float, answer_in_context: float) -> int | None:
    """The number of questions about one context from which on encoding it takes less time in all; ``None`` where no number does.

    Args:
        encode: seconds to make the adapter of a context.
        answer: seconds a question with the adapter.
        answer_in_context: seconds a question with the context in the prompt.
    """
    saved = answer_in_context - answer
    return math.floor(encode / saved) + 1 if saved > 0 else None
