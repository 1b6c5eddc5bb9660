"""Questions with short answers: one by one (``test.py``) or as conversations (``test_pwc.py``)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from shine.chat import token_starts
from shine.config import EvaluationConfig
from shine.data.batching import chunks
from shine.data.examples import Example
from shine.data.tally import Tally, answerable
from shine.evaluation.methods import Answer, Asked, Method
from shine.metrics import exact_match, f1


@dataclass(frozen=True)
class Prediction:
    """One answer and its scores (0 to 1); ``turn`` is the question's place in its context, ``cut`` as in `Answer`."""

    source: str
    id: str
    turn: int
    kind: str
    method: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    cut: bool
    em: float
    f1: float


@dataclass
class Clock:
    """Seconds spent on encoding contexts and on answering."""

    encode: float = 0.0
    answer: float = 0.0


def usable_examples(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, context_length: int, questions: bool, tally: Tally
) -> Iterator[Example]:
    """Examples whose context fits ``context_length`` tokens, cut where it must be; what was cut or skipped is counted.

    With ``questions``, those without any are skipped too.

    The cut is of the text itself, so that every method reads the same.
    """
    for example in answerable(examples, tally) if questions else examples:
        if not example.context.strip():
            tally.skip("empty context", example.id)
            continue
        starts = token_starts(tokenizer, example.context)
        tally.samples += 1
        if len(starts) > context_length:
            tally.contexts_cut += 1
            tally.context_tokens_dropped += len(starts) - context_length
            example = replace(example, context=example.context[: starts[context_length]])
        yield example


def predict(
    method: Method, source: str, examples: Sequence[Example], config: EvaluationConfig, *, conversations: bool, clock: Clock
) -> Iterator[Prediction]:
    """Answer every question of every example; each context is read once.

    Args:
        conversations: earlier turns are part of the prompt, with the method's own answers or the gold ones; otherwise each
            question stands alone.
    """
    for group in chunks(examples, config.batch_size):
        started = time.perf_counter()
        method.prepare([example.context for example in group])
        clock.encode += time.perf_counter() - started
        started = time.perf_counter()
        answers = _converse(method, group, config) if conversations else _answer_each(method, group, config)
        clock.answer += time.perf_counter() - started
        for index, example in enumerate(group):
            for number, turn in enumerate(example.turns):
                text, cut = answers[index, number].text, answers[index, number].cut
                yield Prediction(
                    source,
                    example.id,
                    number,
                    turn.kind,
                    method.name,
                    turn.question,
                    turn.answers,
                    text,
                    cut,
                    exact_match(text, turn.answers),
                    f1(text, turn.answers),
                )


def _answer_each(method: Method, group: Sequence[Example], config: EvaluationConfig) -> dict[tuple[int, int], Answer]:
    places = [(index, number) for index, example in enumerate(group) for number in range(len(example.turns))]
    answers: dict[tuple[int, int], Answer] = {}
    for batch in chunks(places, config.batch_size):
        asked = [Asked(index, group[index].turns[number].question) for index, number in batch]
        answers |= zip(batch, method.answer(asked, max_new_tokens=config.max_new_tokens), strict=True)
    return answers


def _converse(method: Method, group: Sequence[Example], config: EvaluationConfig) -> dict[tuple[int, int], Answer]:
    answers: dict[tuple[int, int], Answer] = {}
    for number in range(max(len(example.turns) for example in group)):
        places = [(index, number) for index, example in enumerate(group) if number < len(example.turns)]
        asked = []
        for index, _ in places:
            turns = group[index].turns
            said = [answers[index, n].text if config.history == "own" else turns[n].answer for n in range(number)]
            history = tuple((turn.question, text) for turn, text in zip(turns, said, strict=False))
            asked.append(Asked(index, turns[number].question, history))
        answers |= zip(places, method.answer(asked, max_new_tokens=config.max_new_tokens), strict=True)
    return answers


def summarise(predictions: Sequence[Prediction]) -> dict[str, float]:
    """EM and F1 in percent, how many questions they are of, and how many answers were cut at ``max_new_tokens``."""
    count = len(predictions)
    return {
        "em": 100 * sum(p.em for p in predictions) / count,
        "f1": 100 * sum(p.f1 for p in predictions) / count,
        "questions": count,
        "cut": sum(p.cut for p in predictions),
    }
