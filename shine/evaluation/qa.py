"""Questions with short answers: one by one (``test.py``) or as conversations (``test_pwc.py``)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from shine.chat import token_ids, token_starts
from shine.config import ScoringConfig, SourceConfig
from shine.data.examples import Example
from shine.data.tally import Tally, answerable
from shine.evaluation.methods import Answer, Asked, Method
from shine.metrics import exact_match, f1, hotpot_f1, rouge

F1_RULES = {"hotpotqa": hotpot_f1, "2wiki": hotpot_f1}
"""Kinds of source whose official script scores F1 otherwise than SQuAD's."""


def golds_left_out(source: SourceConfig) -> str:
    """What the official script of a source also counts as right and these golds do not hold, for the reader of a score."""
    if source.kind == "2wiki" and source.options.get("aliases") is None:
        return (
            "golds without aliases, which the official script counts too, so scores may be lower than official ones "
            "(set options.aliases to its id_aliases.json)"
        )
    return ""


@dataclass(frozen=True)
class Prediction:
    """One answer and its scores (0 to 1).

    Attributes:
        id, turn: the context, and the question's place in it.
        context_tokens: length of the context.
        cut: as in `Answer`.
    """

    source: str
    method: str
    id: str
    turn: int
    kind: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    cut: bool
    context_tokens: int
    em: float
    f1: float
    rouge_1: float
    rouge_2: float
    rouge_l: float


@dataclass
class Clock:
    """Seconds spent on encoding contexts and on answering."""

    encode: float = 0.0
    answer: float = 0.0

    @contextmanager
    def measure(self, what: Literal["encode", "answer"]) -> Iterator[None]:
        """Add the time of the block, until a GPU has done what it was given in it."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        setattr(self, what, getattr(self, what) + time.perf_counter() - started)


def usable_examples(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, context_length: int, questions: bool, tally: Tally
) -> Iterator[Example]:
    """Examples whose context fits ``context_length`` tokens, cut where it must be; what was cut or skipped is counted.

    With ``questions``, those without any are skipped too.

    The cut is of the text itself, so that every method reads the same.

    Raises:
        ValueError: two examples have one id, by which their predictions could not be told apart.
    """
    seen: set[str] = set()
    for example in answerable(examples, tally) if questions else examples:
        if not example.context.strip():
            tally.skip("empty context", example.id)
            continue
        if example.id in seen:
            raise ValueError(f"two examples have the id {example.id!r}: give each an id of its own")
        seen.add(example.id)
        starts = token_starts(tokenizer, example.context)
        tally.samples += 1
        if len(starts) > context_length:
            tally.contexts_cut += 1
            tally.context_tokens_dropped += len(starts) - context_length
            example = replace(example, context=example.context[: starts[context_length]])
        yield example


def predict(
    method: Method,
    source: str,
    group: Sequence[Example],
    config: ScoringConfig,
    *,
    kind: str,
    conversations: bool,
    clock: Clock,
) -> list[Prediction]:
    """Answer every question about some contexts, which are read once, in one batch.

    Args:
        kind: of the source; it says which rule scores F1.
        conversations: earlier turns are part of the prompt, with the method's own answers or the gold ones; otherwise each
            question stands alone.
    """
    with clock.measure("encode"):
        method.prepare(group)
    with clock.measure("answer"):
        answers = _converse(method, group, config) if conversations else _answer_each(method, group, config)
    lengths = [len(token_ids(method.speaker.tokenizer, example.context)) for example in group]
    f1_rule = F1_RULES.get(kind, f1)
    rows = []
    for (index, number), answer in sorted(answers.items()):
        example, turn, text = group[index], group[index].turns[number], answer.text
        rows.append(
            Prediction(
                source,
                method.name,
                example.id,
                number,
                turn.kind,
                turn.question,
                turn.answers,
                text,
                answer.cut,
                lengths[index],
                exact_match(text, turn.answers),
                f1_rule(text, turn.answers),
                **rouge(text, turn.answers),
            )
        )
    return rows


def _answer_each(method: Method, group: Sequence[Example], config: ScoringConfig) -> dict[tuple[int, int], Answer]:
    places = [(index, number) for index, example in enumerate(group) for number in range(len(example.turns))]
    asked = [Asked(index, group[index].turns[number].question, turn=number) for index, number in places]
    answers = method.answer(asked, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    return dict(zip(places, answers, strict=True))


def _converse(method: Method, group: Sequence[Example], config: ScoringConfig) -> dict[tuple[int, int], Answer]:
    answers: dict[tuple[int, int], Answer] = {}
    for number in range(max(len(example.turns) for example in group)):
        places = [(index, number) for index, example in enumerate(group) if number < len(example.turns)]
        asked = []
        for index, _ in places:
            turns = group[index].turns
            said = [answers[index, n].text if config.history == "own" else turns[n].answer for n in range(number)]
            history = tuple((turn.question, text) for turn, text in zip(turns, said, strict=False))
            asked.append(Asked(index, turns[number].question, history, number))
        said_now = method.answer(asked, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
        answers |= zip(places, said_now, strict=True)
    return answers
