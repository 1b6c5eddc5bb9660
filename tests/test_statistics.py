"""Intervals against closed forms."""

from __future__ import annotations

import itertools
import math
import statistics as exact

import numpy as np
import pytest

from shine.evaluation.statistics import Totals, break_even, difference, interval, pairs_interval, way


def binomial_quantile(count: int, chance: float, share: float) -> int:
    total = 0.0
    for k in range(count + 1):
        total += math.comb(count, k) * chance**k * (1 - chance) ** (count - k)
        if total >= share:
            return k
    raise AssertionError("unreachable")


def test_right_or_wrong_answers_have_binomial_quantiles() -> None:
    """Resampling n values of which k are one draws from a binomial distribution."""
    count, right = 200, 130
    found = interval(Totals({str(n): (float(n < right), 1) for n in range(count)}))
    assert found.value == pytest.approx(right / count)
    # The quantile of 4,000 draws may be a step beside the exact one.
    assert found.low * count == pytest.approx(binomial_quantile(count, right / count, 0.025), abs=1)
    assert found.high * count == pytest.approx(binomial_quantile(count, right / count, 0.975), abs=1)


def test_a_mean_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(50, 10, size=400)
    found = interval(Totals({str(n): (value, 1) for n, value in enumerate(values)}))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * exact.pstdev(values) / 20, rel=0.06)


def test_pairs_of_contexts_are_not_independent() -> None:
    """Where a pair's value is the sum of its contexts', the mean over pairs is twice theirs and as wide as that, however many pairs
    there are; in two groups it is still the contexts that count."""
    values = np.random.default_rng(5).normal(0, 1, size=80)
    sums = [[a + b for a, b in itertools.combinations(group, 2)] for group in (values, *np.split(values, 2))]
    whole, halves = pairs_interval(sums[:1]), pairs_interval(sums[1:])
    for found in (whole, halves):
        assert found.value == pytest.approx(2 * values.mean())
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * 2 * exact.pstdev(values) / math.sqrt(80), rel=0.12)


def test_a_pair_of_equals_is_as_sure_as_it_can_be() -> None:
    """A context that was compared with nobody adds no pair, and resamples without any pair are left out."""
    found = pairs_interval([[0.5], [], [0.5, 0.5, 0.5]])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_questions_about_one_context_are_not_independent() -> None:
    """Ten equal answers in each of forty contexts say as much as one in each."""
    single = Totals({str(n): (float(n % 4 == 0), 1) for n in range(40)})
    tenfold = Totals({str(n): (10.0 * (n % 4 == 0), 10) for n in range(40)})
    assert interval(tenfold) == interval(single)


def test_a_paired_difference_is_that_of_the_contexts() -> None:
    """Contexts of very unlike difficulty, and a method that is one better on each but for noise."""
    generator = np.random.default_rng(5)
    hard, noise = generator.normal(50, 30, size=300), generator.normal(1, 1, size=300)
    theirs = Totals({str(n): (value, 1) for n, value in enumerate(hard)})
    ours = Totals({str(n): (value + more, 1) for n, (value, more) in enumerate(zip(hard, noise, strict=True))})
    found = difference(ours, theirs)
    assert found.value == pytest.approx(float(noise.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * exact.pstdev(noise) / math.sqrt(300), rel=0.06)
    apart = interval(ours).high - interval(ours).low
    assert found.high - found.low < apart / 10


def test_a_difference_looks_at_shared_contexts_only() -> None:
    found = difference(Totals({"a": (1, 1), "b": (5, 1)}), Totals({"b": (2, 1), "c": (100, 1)}))
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="share no context"):
        difference(Totals({"a": (1, 1)}), Totals({"b": (1, 1)}))


def test_an_interval_is_the_same_every_time_and_follows_a_transform() -> None:
    totals = Totals({str(n): (n * 0.1, 3) for n in range(30)})
    plain, raised = interval(totals), interval(totals, transform=math.exp)
    assert plain == interval(totals)
    assert (raised.value, raised.low, raised.high) == tuple(map(math.exp, (plain.value, plain.low, plain.high)))
    assert interval(totals, seed=1) != plain


def test_break_even() -> None:
    assert break_even(encode=1.0, answer=0.1, answer_in_context=0.5) == 3
    # Four questions take two seconds either way: it is the fifth that makes the difference.
    assert break_even(encode=1.0, answer=0.25, answer_in_context=0.5) == 5
    assert break_even(encode=1.0, answer=0.3, answer_in_context=0.3) is None


def test_a_way_is_a_ratio_of_differences() -> None:
    """Contexts of very unlike difficulty where every one goes three tenths of its way: nothing is left to chance."""
    generator = np.random.default_rng(7)
    floor, gap = generator.normal(40, 20, size=200), generator.uniform(10, 50, size=200)
    totals = [Totals({str(n): (value, 1) for n, value in enumerate(floor + share * gap)}) for share in (0.3, 0, 1)]
    found = way(totals[0], floor=totals[1], ceiling=totals[2])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((30, 30, 30))


def test_a_way_has_the_interval_of_a_ratio_estimator() -> None:
    """Half of the contexts go all of an equal way, half of them none: half of it, as sure as a share of 400."""
    rows = {str(n): n for n in range(400)}
    ours = Totals({name: (20.0 * (n % 2), 1) for name, n in rows.items()})
    floor, ceiling = (Totals(dict.fromkeys(rows, (value, 1))) for value in (0.0, 20.0))
    found = way(ours, floor=floor, ceiling=ceiling)
    assert found is not None
    assert found.value == pytest.approx(50)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 100 * 0.5 / 20, rel=0.06)


def test_a_way_that_few_contexts_make_has_an_interval() -> None:
    """Four of 200 contexts are right in context, none without: one resample in fifty has none of them, and would be 0 / 0."""
    right = Totals({str(n): (100.0 * (n < 4), 1) for n in range(200)})
    none = Totals({str(n): (0.0, 1) for n in range(200)})
    found = way(none, floor=none, ceiling=right)
    assert found is not None
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_there_is_no_way_to_a_ceiling_that_is_not_higher() -> None:
    """Not beyond chance: as often below the floor as above it."""
    floor = Totals({str(n): (10.0, 1) for n in range(40)})
    ceiling = Totals({str(n): (10.0 + (-1) ** n, 1) for n in range(40)})
    assert way(floor, floor=floor, ceiling=ceiling) is None
