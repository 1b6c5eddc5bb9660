"""Scores of an answer against the gold ones: pure functions.

EM and F1 are those of SQuAD v1.1's official script: normal form, then the best over the gold answers. Where neither prediction nor
answer has a word in normal form, F1 is 1.0, as in SQuAD 2.0's script (v1.1's gives 0.0). HotpotQA and 2WikiMultihopQA add a rule
about yes and no (`hotpot_f1`); MuSiQue scores as SQuAD does. For MS MARCO the published tables print SQuAD's F1 too, which is
what is meant here; its own leaderboard has ROUGE-L and BLEU-1 of longer answers, so ROUGE stands beside.
"""

from __future__ import annotations

import math
import re
import string
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rouge import Rouge

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts written without spaces: there each character counts as a word.
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_CLOSED = ("yes", "no", "noanswer")
_ROUGE = Rouge(stats=["f"])
_RECURSION = threading.Lock()
ROUGE_WORDS = 1500
"""ROUGE looks at the first so many words: `rouge` takes time and memory with the product of the two lengths."""


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers in normal form, else 0.0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of the words shared with any answer, in normal form; where one side has no words, both must have none."""
    return max(_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def hotpot_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 by HotpotQA's rule: where the prediction or the answer is yes, no or noanswer, only the same counts, and counts whole.

    Without it "no, he was not" would be partly right where the answer is "no". Where both normal forms are empty the official
    script gives 0.0; so does this.
    """
    return max(_hotpot_f1(normalise(prediction), normalise(answer)) for answer in answers)


def _hotpot_f1(prediction: str, answer: str) -> float:
    if prediction != answer and (prediction in _CLOSED or answer in _CLOSED):
        return 0.0
    return _f1(prediction.split(), answer.split()) if prediction and answer else 0.0


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer))


def rouge(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L by the package ``rouge``: each the best over the answers, in lower case.

    What that package cannot take is met here: a side without words scores 0.0 (it raises), deep recursion on long texts is
    allowed for and texts are cut to `ROUGE_WORDS` words, and a script without spaces is read character by character (it would be
    one word).
    """
    said = _spaced(prediction)
    found = [_rouge(said, _spaced(answer)) for answer in answers]
    return {name: max(scores[f"rouge-{name[-1]}"]["f"] for scores in found) for name in ("rouge_1", "rouge_2", "rouge_l")}


def _rouge(prediction: str, answer: str) -> dict[str, dict[str, float]]:
    if not prediction or not answer:
        return {f"rouge-{kind}": {"f": 0.0} for kind in "12l"}
    with _deep_recursion(2 * ROUGE_WORDS + 200):
        return dict(_ROUGE.get_scores(prediction, answer)[0])


def _spaced(text: str) -> str:
    """Words with single spaces; sentences end in a full stop, as ``rouge`` expects, and none is empty."""
    sentences = (_UNSPACED.sub(r" \1 ", sentence).split() for sentence in text.lower().replace("。", ".").split("."))
    kept: list[str] = []
    room = ROUGE_WORDS
    for words in filter(None, sentences):
        kept.append(" ".join(words[:room]))
        room -= len(words)
        if room <= 0:
            break
    return ".".join(kept)


@contextmanager
def _deep_recursion(depth: int) -> Iterator[None]:
    """Let Python recurse ``depth`` calls deeper than now. Since 3.11 its own calls take no C stack, so this is safe."""
    with _RECURSION:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(before + depth)
        try:
            yield
        finally:
            sys.setrecursionlimit(before)


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
