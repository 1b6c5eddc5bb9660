"""From rows to figures: differences, shares, percentiles and times, counted by hand."""

from __future__ import annotations

import math
import statistics as exact
from typing import Any

import pytest

from shine.evaluation.scores import (
    compare_methods,
    compare_recall,
    grouped,
    summarise_adapters,
    summarise_answers,
    summarise_recall,
    summarise_times,
    ways,
)


def answer(context: str, f1: float, *, turn: int = 0, tokens: int = 8, em: float = 0.0) -> dict[str, Any]:
    values = {"id": context, "turn": turn, "context_tokens": tokens, "cut": False, "em": em, "f1": f1}
    return {**values, **dict.fromkeys(("rouge_1", "rouge_2", "rouge_l"), f1)}


def text(name: str, loss: float, *, tokens: int = 4, task: str = "reconstruct", prefix: float = 0.5) -> dict[str, Any]:
    return {
        "id": name,
        "task": task,
        "context_tokens": 8,
        "tokens": tokens,
        "loss": loss,
        "exact_prefix": prefix,
        "em": 0.0,
        "f1": 0.5,
    }


def timed_methods(*, encode: float, shine: float, in_context: float) -> dict[str, Any]:
    """Summaries that hold times alone, in seconds."""
    return {
        "shine": {"contexts_encoded": 3, "seconds": {"encode_context": encode, "answer_question": shine}},
        "in_context": {"contexts_encoded": 0, "seconds": {"encode_context": 0.0, "answer_question": in_context}},
    }


def test_methods_differ_by_what_their_means_differ_by() -> None:
    """Equal gaps in each context leave nothing to chance; each pair once, the earlier method first."""
    rows = {
        "shine": [answer("a", 0.5), answer("a", 0.7, turn=1), answer("b", 0.9)],
        "in_context": [answer("a", 0.4), answer("a", 0.6, turn=1), answer("b", 0.8)],
        "only_question": [answer("a", 0.0), answer("a", 0.0, turn=1), answer("b", 0.9)],
    }
    found = compare_methods(rows, timed_methods(encode=1.0, shine=0.1, in_context=0.5))["differences"]
    assert list(found) == ["shine - in_context", "shine - only_question", "in_context - only_question"]
    gap = found["shine - in_context"]["f1"]
    assert (gap["value"], gap["low"], gap["high"]) == pytest.approx((10, 10, 10))
    wide = found["shine - only_question"]["f1"]
    assert wide["value"] == pytest.approx(100 * (0.5 + 0.7) / 3)
    # Drawn are a alone, b alone, or both: the extremes are the contexts' own gaps.
    assert (wide["low"], wide["high"]) == pytest.approx((0, 60))


@pytest.mark.parametrize(
    ("encode", "shine", "in_context", "pays"),
    [(1.0, 0.25, 0.5, 5), (1.0, 0.1, 0.5, 3), (1.0, 0.5, 0.4, None), (0.01, 0.1, 0.5, 1)],
)
def test_an_adapter_pays_from_a_number_of_questions_on(encode: float, shine: float, in_context: float, pays: int | None) -> None:
    """Counted up: the first number of questions that takes less time with the adapter; none for a method that makes none."""
    found = compare_methods({}, timed_methods(encode=encode, shine=shine, in_context=in_context))["break_even_questions"]
    counted = next((n for n in range(1, 1000) if encode + n * shine < n * in_context), None)
    assert found == {"shine": pays}
    assert counted == pays


def test_ways_go_from_only_question_to_each_method_that_sees_the_context() -> None:
    """Equal in each context: F1 20 on a way from 10 to 50 and to 30; no exact answer anywhere, so no way of EM."""
    scores = {"shine": 0.2, "in_context": 0.3, "in_context_tuned": 0.5, "only_question": 0.1}
    rows = {method: [answer(name, f1) for name in "abc"] for method, f1 in scores.items()}
    found = ways(rows)
    assert list(found) == ["shine"]
    assert list(found["shine"]) == ["in_context_tuned", "in_context"]
    for ceiling, gone in (("in_context_tuned", 25), ("in_context", 50)):
        assert found["shine"][ceiling]["f1"] == pytest.approx({"value": gone, "low": gone, "high": gone})
        assert found["shine"][ceiling]["em"] is None
    assert ways({name: rows[name] for name in ("shine", "in_context")}) == {}
    assert ways({name: rows[name] for name in ("shine", "only_question")}) == {}
    assert compare_methods(rows, {})["ways"] == found


def test_texts_given_back_are_compared_by_task() -> None:
    rows = {
        "shine": [text("a", 1.0, tokens=2), text("b", 2.0, tokens=6, prefix=1.0), text("a", 5.0, task="complete")],
        "in_context": [text("a", 0.5, tokens=2), text("b", 1.5, tokens=6), text("a", 1.0, task="complete")],
    }
    found = compare_recall(rows)["differences"]["shine - in_context"]
    assert found["reconstruct"]["loss"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert found["reconstruct"]["exact_prefix"]["value"] == pytest.approx(25)
    assert found["complete"]["loss"]["value"] == pytest.approx(4.0)


def test_the_band_of_perplexities_leaves_out_a_tenth_at_each_end() -> None:
    """Eleven texts of losses 0.0 to 1.0: the second and the last but one, whatever the order."""
    rows = [text(str(n), n / 10) for n in (7, 0, 3, 10, 1, 5, 9, 2, 8, 4, 6)]
    found = summarise_recall(rows, bounds=(10,))["reconstruct"]
    assert found["perplexity_p10"] == pytest.approx(math.exp(0.1))
    assert found["perplexity_p90"] == pytest.approx(math.exp(0.9))


def test_a_group_has_an_interval_of_its_own() -> None:
    """Of equal answers there is nothing to draw; of unlike contexts the interval has the width of the standard error."""
    even = grouped([answer(str(n), 0.25, turn=1) for n in range(5)], lambda row: row["turn"], ("f1",))["1"]
    assert (even["f1"], even["f1_interval"], even["questions"]) == (25.0, [25.0, 25.0], 5)
    values = [n % 10 / 10 for n in range(400)]
    low, high = grouped([answer(str(n), value) for n, value in enumerate(values)], lambda row: 0, ("f1",))["0"]["f1_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * 100 * exact.pstdev(values) / 20, rel=0.06)
    assert low < 100 * exact.mean(values) < high


def test_shares_and_lengths_are_counted() -> None:
    rows = [
        answer("a", 1.0, tokens=10),
        answer("a", 0.0, turn=1, tokens=10),
        answer("b", 0.5, tokens=11),
        answer("c", 0.0, tokens=99),
    ]
    found = summarise_answers(rows, bounds=(10, 20))
    assert (found["right"], found["wrong"], found["questions"], found["contexts"]) == (25.0, 50.0, 4, 3)
    # Of the contexts drawn, a has one of two right and wrong, b none, c one wrong: from all b to all a or all c.
    assert (found["intervals"]["right"], found["intervals"]["wrong"]) == ([0.0, 50.0], [0.0, 100.0])
    assert {bound: group["questions"] for bound, group in found["lengths"].items()} == {"10": 2, "20": 2}
    assert {turn: group["f1"] for turn, group in found["turns"].items()} == {"1": 50.0, "2": 0.0}


def test_adapters_are_compared_within_their_batch() -> None:
    timings = [
        {"cosines": [0.4, 0.6, 0.2], "effective_ranks": 6.0, "adapters": 3},
        {"cosines": [], "effective_ranks": 1.0, "adapters": 1},
        {"encode": 0.0},
    ]
    found = summarise_adapters(timings)["adapters"]
    assert (found["cosine"], found["pairs"], found["effective_rank"]) == (pytest.approx(0.4), 3, 1.75)
    # A resample of the three may hold two of them only.
    assert found["intervals"]["cosine"] == [pytest.approx(0.2), pytest.approx(0.6)]
    alone = {"cosine": None, "intervals": {"cosine": None}, "pairs": 0, "effective_rank": 1.0}
    assert summarise_adapters(timings[1:2]) == {"adapters": alone}
    assert summarise_adapters(timings[2:]) == {}


def test_times_are_of_a_context_an_adapter_and_a_question() -> None:
    timings = [
        {"encode": 1.0, "answer": 0.5, "encoded": 2, "made": 4, "asked": 3, "adapter_bytes": 8},
        {"encode": 0.2, "answer": 0.1, "encoded": 1, "made": 1, "asked": 1, "adapter_bytes": 8},
    ]
    found = summarise_times(timings, {"questions": 4})
    assert found["seconds"] == pytest.approx(
        {"total": 1.8, "encode": 1.2, "answer": 0.6, "encode_context": 0.4, "encode_adapter": 0.24, "answer_question": 0.15}
    )
    assert (found["contexts_encoded"], found["adapters_made"], found["adapter_bytes"]) == (3, 5, 8)
