"""Invented worlds: what is stated, what is asked, and that nothing gives an answer away."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from shine.data.worlds import NAMES, RELATIONS, World, guess_rate


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


EXAMPLES = list(World(seed=5).examples(300))
VALUES = {relation.kind: relation.values for relation in RELATIONS}


def test_a_world_is_the_same_every_time_and_whatever_the_count() -> None:
    assert list(World(seed=5).examples(300)) == EXAMPLES
    assert list(World(seed=5).examples(40)) == EXAMPLES[:40]
    assert World(seed=5).example(299) == EXAMPLES[299]


def test_worlds_of_different_seeds_share_no_context() -> None:
    contexts = [{example.context for example in World(seed=seed).examples(300)} for seed in (5, 6, 50, 1000, 2000)]
    for one, other in itertools.combinations(contexts, 2):
        assert not one & other
    assert all(len(found) == 300 for found in contexts)


def test_lists_hold_nothing_twice_and_no_name_is_a_value() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for values in VALUES.values():
        assert len(set(values)) == len(values)
    lower = {value.lower() for values in VALUES.values() for value in values}
    assert not lower & {name.lower() for name in NAMES}


@pytest.mark.parametrize(("facts", "people"), [((4, 6), (2, 3)), ((1, 1), (1, 1)), ((2, 8), (1, 4)), ((1, 2), (4, 4))])
def test_each_fact_is_stated_once_and_asked_once(facts: tuple[int, int], people: tuple[int, int]) -> None:
    statements = {kind: next(r.statements for r in RELATIONS if r.kind == kind) for kind in VALUES}
    questions = {kind: next(r.questions for r in RELATIONS if r.kind == kind) for kind in VALUES}
    for example in World(facts=facts, people=people, seed=9).examples(60):
        found = set()
        sentences = set(re.findall(r"[^.]+\.", example.context.replace(". ", ".")))
        for turn in example.turns:
            (what,) = turn.answers
            assert what in VALUES[turn.kind]
            asked = [name for name in NAMES for text in questions[turn.kind] if text.format(who=name) == turn.question]
            assert len(asked) == 1, turn.question
            article = f"{'an' if what[0] in 'aeiouAEIOU' else 'a'} {what}"
            told = {text.format(who=asked[0], what=what, a_what=article) for text in statements[turn.kind]} & sentences
            assert len(told) == 1, (turn, example.context)
            found |= told
        # Nothing told that is not asked, nothing asked twice.
        assert found == sentences
        assert len(found) == len(example.turns) == len({turn.question for turn in example.turns})
        mentioned = [name for name in NAMES if name.lower() in words_of(example.context)]
        assert people[0] <= len(mentioned) <= people[1]
        assert min(facts) <= len(example.turns) <= max(*facts, len(mentioned))


@pytest.mark.parametrize(
    ("facts", "people"),
    [
        ((2, len(RELATIONS) + 1), (1, 4)),  # one person has as many facts as there are kinds, not one more
        ((6, 4), (2, 3)),
        ((4, 6), (3, 2)),
        ((4, 6), (0, 2)),
        ((200, 200), (len(NAMES) + 1, len(NAMES) + 1)),
    ],
)
def test_a_world_that_cannot_be_drawn_is_refused_before_the_first_context(facts: tuple[int, int], people: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"facts|people"):
        World(facts=facts, people=people)


def test_a_world_of_few_kinds_lets_people_share_them() -> None:
    for example in World(facts=(3, 3), people=(3, 4), kinds=(1, 2), seed=3).examples(60):
        assert len({turn.kind for turn in example.turns}) <= 2
        assert 3 <= len(example.turns) <= 4
    with pytest.raises(ValueError, match=r"facts=\[2, 5\].*2 people have at most 4 facts of 2 kinds"):
        World(facts=(2, 5), people=(2, 3), kinds=(2, 2))
    with pytest.raises(ValueError, match=r"kinds=\[0, 1\]"):
        World(kinds=(0, 1))


def test_no_answer_can_be_read_from_its_question_or_an_earlier_turn() -> None:
    for example in EXAMPLES:
        seen: set[str] = set()
        for turn in example.turns:
            seen |= words_of(turn.question)
            assert not words_of(turn.answer) & seen


@pytest.mark.parametrize("kind", sorted(VALUES))
def test_the_best_constant_answer_is_right_as_often_as_said(kind: str) -> None:
    counts = Counter(turn.answer for example in World(seed=77).examples(2500) for turn in example.turns if turn.kind == kind)
    total = sum(counts.values())
    best = 100 * counts.most_common(1)[0][1] / total
    assert total > 1000
    # The luckiest value of some 24 lies up to about three standard deviations above the mean.
    rate = guess_rate(kind)
    assert rate - 0.5 < best < rate + 4 * 100 * ((rate / 100) * (1 - rate / 100) / total) ** 0.5
    assert rate <= 20
    assert set(counts) == set(VALUES[kind])


def test_kinds_people_and_counts_vary() -> None:
    assert {turn.kind for example in EXAMPLES for turn in example.turns} == set(VALUES)
    assert {len(example.turns) for example in EXAMPLES} == {4, 5, 6}
    assert len({example.id for example in EXAMPLES}) == len(EXAMPLES)
