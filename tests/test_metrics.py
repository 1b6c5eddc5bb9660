"""Scores against hand-made cases: SQuAD's normal form, exact match, F1, and the exact-prefix ratio."""

from __future__ import annotations

import pytest

from shine.metrics import exact_match, exact_prefix_ratio, f1, normalise


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("  A  ", ""),
        ("", ""),
        ("...", ""),
        ("theatre", "theatre"),
        ("Anna and Theo", "anna and theo"),
        ("the-end", "theend"),  # punctuation goes before articles, as in SQuAD's own script
        ("U.S.A.", "usa"),
        ("can't", "cant"),
        ("one\n\ttwo", "one two"),
        ("$1,000.50", "100050"),
        ("Ünna’s", "ünna’s"),  # only ASCII punctuation
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1.0),
        ("Denver", ["Denver Broncos"], 0.0),
        ("broncos denver", ["Denver Broncos"], 0.0),
        ("Paris", ["London", "PARIS!"], 1.0),
        ("", ["Paris"], 0.0),
        ("", ["the"], 1.0),
        ("London Paris", ["London", "Paris"], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], score: float) -> None:
    assert exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1.0),
        ("Broncos Denver", ["Denver Broncos"], 1.0),
        # Shared 1, precision 1, recall 1/2.
        ("Denver", ["Denver Broncos"], 2 / 3),
        # Shared 2 of 4 said and 3 wanted: 2 * 1/2 * 2/3 / (1/2 + 2/3).
        ("in red green park", ["red green blue"], 4 / 7),
        # A word counts as often as both have it: shared 2, of 3 and of 2.
        ("ha ha ha", ["ha ha"], 4 / 5),
        ("ha", ["ha ha ha"], 1 / 2),
        # The best of the gold answers, not their union.
        ("red green", ["red", "green blue red", "x"], 4 / 5),
        ("red blue", ["red", "blue"], 2 / 3),
        ("Paris", ["London"], 0.0),
        ("", ["Paris"], 0.0),
        ("Paris", ["the"], 0.0),
        ("a", ["the"], 1.0),
    ],
)
def test_f1(prediction: str, answers: list[str], score: float) -> None:
    assert f1(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "target", "ratio"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3, 4], [1, 2, 3], 1.0),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([1, 9, 3, 4], [1, 2, 3, 4], 0.25),  # what is right after the first error does not count
        ([9, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([], [1], 0.0),
    ],
)
def test_exact_prefix_ratio(prediction: list[int], target: list[int], ratio: float) -> None:
    assert exact_prefix_ratio(prediction, target) == ratio
