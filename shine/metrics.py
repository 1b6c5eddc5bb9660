"""Scores of an answer against the gold ones: pure functions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers in normal form, else 0.0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of the words shared with any answer, in normal form; where one side has no words, both must have none."""
    return max(_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer))


def exact_prefix_ratio(prediction: Sequence[int], target: Sequence[int]) -> float:
    """Share of the target's tokens that the prediction gives before its first error; the target must not be empty."""
    right = 0
    for given, wanted in zip(prediction, target, strict=False):
        if given != wanted:
            break
        right += 1
    return right / len(target)


def perplexity(loss: float) -> float:
    """``exp`` of a mean loss a token, in nats; beyond exp(50) it stays there, so that it can be written as a number."""
    return math.exp(min(loss, 50))
