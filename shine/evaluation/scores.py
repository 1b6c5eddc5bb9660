"""From rows of predictions to figures: means with 95 % intervals, differences between methods, shares, times. Pure functions."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from shine.evaluation.results import Row
from shine.evaluation.statistics import Totals, break_even, difference, interval, pairs_interval, way
from shine.metrics import perplexity

ANSWER_SCORES = ("em", "f1", "rouge_1", "rouge_2", "rouge_l")
RECALL_SCORES = ("exact_prefix", "em", "f1")
FLOOR, CEILINGS = "only_question", ("in_context_tuned", "in_context")
"""What knows nothing of the context, and what sees it: a method is somewhere on the way between them."""


def totals(rows: Iterable[Row], name: str) -> Totals:
    """Sums and counts of a score by context, in percent; ``loss`` by token, as it is."""
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for row in rows:
        total, weight = found[row["id"]]
        value, size = (row["loss"] * row["tokens"], row["tokens"]) if name == "loss" else (100 * row[name], 1)
        found[row["id"]] = (total + value, weight + size)
    return Totals(dict(found))


def summarise_answers(rows: Sequence[Row], *, bounds: Sequence[int]) -> dict[str, Any]:
    """Scores in percent with intervals, shares, and the scores by turn and by context length.

    ``right`` and ``wrong`` are the shares of answers with an F1 of one and of nothing at all: F1 is bimodal, its mean says little
    about a single answer.
    """
    result: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name in ANSWER_SCORES:
        estimate = interval(totals(rows, name))
        result[name], intervals[name] = estimate.value, [estimate.low, estimate.high]
    for name, f1 in (("right", 1.0), ("wrong", 0.0)):
        estimate = interval(totals(({"id": row["id"], name: row["f1"] == f1} for row in rows), name))
        result[name], intervals[name] = estimate.value, [estimate.low, estimate.high]
    result |= {
        "intervals": intervals,
        "questions": len(rows),
        "contexts": len({row["id"] for row in rows}),
        "cut": sum(row["cut"] for row in rows),
        "turns": grouped(rows, lambda row: row["turn"] + 1, ("em", "f1", "rouge_l")),
        "lengths": grouped(rows, lambda row: bucket(row["context_tokens"], bounds), ("em", "f1", "rouge_l")),
    }
    return result


def summarise_recall(rows: Sequence[Row], *, bounds: Sequence[int]) -> dict[str, Any]:
    """Perplexity, exact-prefix ratio, EM and F1 (percent) of each task, over all texts and by length bucket."""
    summary: dict[str, Any] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        buckets: dict[int, list[Row]] = defaultdict(list)
        for row in mine:
            buckets[bucket(row["context_tokens"], bounds)].append(row)
        summary[task] = {**_recall(mine), "lengths": {str(bound): _recall(buckets[bound]) for bound in sorted(buckets)}}
    overall = {name: interval(totals(rows, name)).value for name in ("em", "f1")}
    return {**overall, "texts": len({row["id"] for row in rows}), **summary}


def _recall(rows: Sequence[Row]) -> dict[str, Any]:
    found = {name: interval(totals(rows, name)) for name in RECALL_SCORES}
    found["perplexity"] = interval(totals(rows, "loss"), transform=perplexity)
    each = sorted(perplexity(row["loss"]) for row in rows)
    return {
        **{name: estimate.value for name, estimate in found.items()},
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in found.items()},
        # Of single texts, not of the mean: how unlike they are.
        "perplexity_p10": each[int(0.1 * (len(each) - 1))],
        "perplexity_p90": each[-1 - int(0.1 * (len(each) - 1))],
        "texts": len(rows),
    }


def bucket(length: int, bounds: Sequence[int]) -> int:
    """The smallest bound that holds a length; the last one takes what is longer (cut at a token, a text may grow by a few)."""
    return bounds[min(bisect_left(bounds, length), len(bounds) - 1)]


def grouped(rows: Sequence[Row], group: Callable[[Row], int], names: Sequence[str]) -> dict[str, Any]:
    """Some scores of each group of rows, with the interval of F1."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    found: dict[str, Any] = {}
    for key in sorted(groups):
        estimate = interval(totals(groups[key], "f1"))
        means = {name: totals(groups[key], name).mean() for name in names}
        found[str(key)] = {**means, "f1_interval": [estimate.low, estimate.high], "questions": len(groups[key])}
    return found


def summarise_times(timings: Sequence[Row], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds in all, a context, an adapter and a question, and bytes of an adapter."""
    encode, answer, encoded, made = (sum(row[name] for row in timings) for name in ("encode", "answer", "encoded", "made"))
    questions = scores.get("questions") or sum(row["asked"] for row in timings)
    return {
        "contexts_encoded": encoded,
        "adapters_made": made,
        "adapter_bytes": max((row["adapter_bytes"] for row in timings), default=0),
        "seconds": {
            "total": round(encode + answer, 3),
            "encode": round(encode, 3),
            "answer": round(answer, 3),
            "encode_context": encode / encoded if encoded else 0.0,
            "encode_adapter": encode / made if made else 0.0,
            "answer_question": answer / questions,
        },
    }


def summarise_adapters(timings: Sequence[Row]) -> dict[str, Any]:
    """How unlike the adapters of different contexts are, where a hypernetwork made them: the mean cosine of every two of one batch
    with its interval, ``None`` where each batch had one context, and the mean effective rank."""
    measured = [row for row in timings if "cosines" in row]
    if not measured:
        return {}
    groups = [row["cosines"] for row in measured]
    pairs = sum(map(len, groups))
    found = pairs_interval(groups) if pairs else None
    return {
        "adapters": {
            "cosine": found.value if found else None,
            "intervals": {"cosine": [found.low, found.high] if found else None},
            "pairs": pairs,
            "effective_rank": sum(row["effective_ranks"] for row in measured) / sum(row["adapters"] for row in measured),
        }
    }


def compare_recall(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """How much each method is ahead of each that comes after it in giving texts back, with intervals, by task.

    Of ``loss`` in nats a token, where less is better; of ``exact_prefix`` in percent.
    """
    return {
        "differences": {
            f"{ours} - {theirs}": {
                task: {name: _gap(rows[ours], rows[theirs], name, task) for name in ("loss", "exact_prefix")}
                for task in dict.fromkeys(row["task"] for row in rows[ours])
            }
            for ours, theirs in combinations(rows, 2)
        }
    }


def _gap(ours: Sequence[Row], theirs: Sequence[Row], name: str, task: str) -> dict[str, float]:
    ours, theirs = ([row for row in rows if row["task"] == task] for rows in (ours, theirs))
    return difference(totals(ours, name), totals(theirs, name)).plain()


def compare_methods(rows: Mapping[str, Sequence[Row]], methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How much each method is ahead of each that comes after it, with intervals, and from how many questions on an adapter pays.

    Args:
        rows: of answers, by method.
        methods: their summaries, with times.
    """
    differences = {
        f"{ours} - {theirs}": {
            name: difference(totals(rows[ours], name), totals(rows[theirs], name)).plain() for name in ("em", "f1", "rouge_l")
        }
        for ours, theirs in combinations(rows, 2)
    }
    reference = methods.get("in_context")
    pays: dict[str, int | None] = {}
    for name, found in methods.items():
        if reference is not None and found["contexts_encoded"]:
            pays[name] = break_even(
                encode=found["seconds"]["encode_context"],
                answer=found["seconds"]["answer_question"],
                answer_in_context=reference["seconds"]["answer_question"],
            )
    return {"differences": differences, "break_even_questions": pays, "ways": ways(rows)}


def ways(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """How far each method that sees no context goes from Only Question to a method that does, in percent of EM and of F1.

    Returns:
        Method -> ceiling -> score -> its `way` with the interval, ``None`` where there is none to go.
    """
    ceilings = [name for name in CEILINGS if name in rows]
    if FLOOR not in rows or not ceilings:
        return {}
    found: dict[str, Any] = {}
    for method in rows:
        if method == FLOOR or method in CEILINGS:
            continue
        found[method] = {ceiling: {} for ceiling in ceilings}
        for ceiling, score in product(ceilings, ("em", "f1")):
            gone = way(totals(rows[method], score), floor=totals(rows[FLOOR], score), ceiling=totals(rows[ceiling], score))
            found[method][ceiling][score] = None if gone is None else gone.plain()
    return found
