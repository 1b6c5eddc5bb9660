"""From examples to samples: token ids and labels of one training sequence, for each stage."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from shine.chat import IGNORE, Message, encode_conversation, separator_id, token_ids, token_starts
from shine.config import StageConfig, TaskTokens
from shine.data.examples import Example
from shine.data.grouping import first_fit

_NEXT_WORD = re.compile(r"\S")
MIN_PIECE = 8
"""The least tokens to split texts into; one character can take four."""


@dataclass(frozen=True)
class Sample:
    """One sequence pair: the context that becomes a LoRA, and the conversation it is judged on."""

    id: str
    context_ids: list[int]
    input_ids: list[int]
    labels: list[int]
    context_dropped: int = 0
    conversation_dropped: int = 0

    @property
    def label_count(self) -> int:
        return sum(label != IGNORE for label in self.labels)

    @property
    def tokens(self) -> int:
        """Context and conversation tokens together, padding not counted."""
        return len(self.context_ids) + len(self.input_ids)


@dataclass
class CutTally:
    """What did not fit, so that nothing is cut in silence."""

    samples: int = 0
    contexts_cut: int = 0
    context_tokens_dropped: int = 0
    conversations_cut: int = 0
    conversation_tokens_dropped: int = 0
    texts_split: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, example: str) -> None:
        """Count an example that could not be used; the first of each reason is named."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, example)

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.contexts_cut += sample.context_dropped > 0
        self.context_tokens_dropped += sample.context_dropped
        self.conversations_cut += sample.conversation_dropped > 0
        self.conversation_tokens_dropped += sample.conversation_dropped

    def __str__(self) -> str:
        text = (
            f"{self.samples:,} samples: {self.contexts_cut:,} contexts cut ({self.context_tokens_dropped:,} tokens), "
            f"{self.conversations_cut:,} conversations cut ({self.conversation_tokens_dropped:,} tokens)"
        )
        if self.texts_split:
            text += f", {self.texts_split:,} long texts split into pieces that fit"
        return text + "".join(
            f", {count:,} skipped: {reason} (first {self.first_skipped[reason]})" for reason, count in sorted(self.skipped.items())
        )


def answerable(examples: Iterable[Example], tally: CutTally) -> Iterator[Example]:
    """Examples with a context and a question that has an answer; what is left out is counted."""
    for example in examples:
        turns = tuple(turn for turn in example.turns if turn.answers)
        for _ in range(len(example.turns) - len(turns)):
            tally.skip("question without an answer", example.id)
        if not example.context.strip():
            tally.skip("empty context", example.id)
        elif turns:
            yield replace(example, turns=turns)
        elif not example.turns:
            tally.skip("no question", example.id)


class StageSamples(Protocol):
    """The samples of a stage: sample ``index`` as it is in ``epoch``, or ``None`` when it had to be skipped."""

    tally: CutTally

    def __len__(self) -> int: ...

    def sample(self, index: int, *, epoch: int) -> Sample | None: ...

    def fingerprint(self) -> str:
        """A hash of the texts behind the samples and of their order, wherever they were read from."""
        ...


class AnswerSamples:
    """The QA stages: all turns of a context as one conversation (mqa), or each question by itself (1qa)."""

    def __init__(self, examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, stage: StageConfig) -> None:
        self.tokenizer = tokenizer
        self.stage = stage
        self.tally = CutTally()
        self.items: list[Example] = []
        for example in answerable(examples, self.tally):
            if stage.name == "mqa":
                self.items.append(example)
            else:
                self.items += [Example(f"{example.id}/{n}", example.context, (turn,)) for n, turn in enumerate(example.turns)]

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        asked = ((turn.question, turn.answer) for item in self.items for turn in item.turns)
        return _digest(itertools.chain((item.context for item in self.items), itertools.chain.from_iterable(asked)))

    def sample(self, index: int, *, epoch: int) -> Sample | None:
        example = self.items[index]
        messages = [m for t in example.turns for m in (Message("user", t.question), Message("assistant", t.answer))]
        encoded = encode_conversation(self.tokenizer, messages, max_length=self.stage.conversation_length)
        if not encoded.label_count:
            self.tally.skip("no label left after truncation, raise stage.conversation_length", example.id)
            return None
        context = token_ids(self.tokenizer, example.context)
        kept = context[: self.stage.context_length]
        sample = Sample(example.id, kept, encoded.input_ids, encoded.labels, len(context) - len(kept), encoded.dropped)
        self.tally.add(sample)
        return sample


class PretrainSamples:
    """Reconstruction and completion of short texts grouped to the budget (paper, section on pretraining).

    The contexts of a group are joined by the end-of-text token; each text has its own turn, whose answer is the whole text in
    both tasks: a completion hides the last 10 to 30 % of the words from the context only. Contexts and turns are shuffled
    independently, anew in each epoch. Texts longer than the budget are split at a word into pieces that fit it.

    Args:
        tasks: restrict to one of ``("reconstruct", "complete")``, or use both, half and half.
    """

    HIDE = (0.1, 0.3)

    def __init__(
        self,
        examples: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase,
        stage: StageConfig,
        *,
        task_tokens: TaskTokens,
        seed: int,
        tasks: Sequence[str] = ("reconstruct", "complete"),
    ) -> None:
        self.tokenizer = tokenizer
        self.tally = CutTally()
        self.seed = seed
        self.tasks = tuple(tasks)
        self.task_tokens = task_tokens
        self.separator = separator_id(tokenizer)
        overhead = len(encode_conversation(tokenizer, self._turn("reconstruct", "")).input_ids)
        budget = min(stage.context_length - 1, stage.conversation_length - overhead)
        if budget < MIN_PIECE:
            raise ValueError(
                f"stage.context_length={stage.context_length} and stage.conversation_length={stage.conversation_length} leave no "
                f"room for a text: make them at least {MIN_PIECE + 1} and {MIN_PIECE + overhead}"
            )
        pieces: list[tuple[str, int]] = []
        for example in examples:
            if not example.context.strip():
                self.tally.skip("empty context", example.id)
                continue
            found = split_text(tokenizer, example.context, budget=budget)
            self.tally.texts_split += len(found) > 1
            pieces += found
        self.texts = [text for text, _ in pieces]
        # A text costs its separator in the context and its turn's marks in the conversation: both must fit.
        costs = [(length + 1, length + overhead) for _, length in pieces]
        self.groups = first_fit(costs, limits=(stage.context_length, stage.conversation_length))

    def __len__(self) -> int:
        return len(self.groups)

    def fingerprint(self) -> str:
        return _digest(self.texts[member] for group in self.groups for member in group)

    def sample(self, index: int, *, epoch: int) -> Sample | None:
        rng = random.Random(f"{self.seed} {epoch} {index}")
        members = [(self.texts[member], rng.choice(self.tasks), rng.uniform(*self.HIDE)) for member in self.groups[index]]
        rng.shuffle(members)
        context_ids: list[int] = []
        for text, task, share in members:
            visible = text if task == "reconstruct" else hide_end(text, share)
            context_ids += ([self.separator] if context_ids else []) + token_ids(self.tokenizer, visible)
        rng.shuffle(members)
        encoded = encode_conversation(self.tokenizer, [m for text, task, _ in members for m in self._turn(task, text)])
        sample = Sample(f"group-{index}", context_ids, encoded.input_ids, encoded.labels)
        self.tally.add(sample)
        return sample

    def _turn(self, task: str, text: str) -> list[Message]:
        return [Message("user", getattr(self.task_tokens, task)), Message("assistant", text)]


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def hide_end(text: str, share: float) -> str:
    """``text`` without the last ``share`` of its words: at least one word is hidden, and the first always stays.

    A text of a single word, as one in Chinese may be, loses characters instead.
    """
    parts = list(re.finditer(r"\S+", text))
    if len(parts) < 2:
        parts = list(re.finditer(r"\S", text))
    kept = max(min(round(len(parts) * (1 - share)), len(parts) - 1), 1)
    return text[: parts[kept - 1].end()] if parts else text


def split_text(tokenizer: PreTrainedTokenizerBase, text: str, *, budget: int) -> list[tuple[str, int]]:
    """``text`` as pieces of at most ``budget`` tokens with their token counts, broken at white space where there is some."""
    starts = token_starts(tokenizer, text)
    if len(starts) <= budget:
        return [(text, len(starts))] if starts else []
    pieces: list[tuple[str, int]] = []
    begin = 0
    while (word := _NEXT_WORD.search(text, begin)) is not None:
        begin = word.start()
        first = bisect_left(starts, begin)
        # Cut off by itself, a piece may tokenise to a few more tokens than it had: then take a little less.
        for size in range(budget, 0, -1):
            end = starts[first + size] if first + size < len(starts) else len(text)
            if end < len(text):
                broken = max(text.rfind(mark, begin + 1, end) for mark in (" ", "\n"))
                end = broken if broken > begin else end
            piece = text[begin:end].strip()
            length = len(token_ids(tokenizer, piece))
            if length <= budget:
                break
        pieces.append((piece, length))
        begin = end
    return pieces


def build_samples(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, stage: StageConfig, *, task_tokens: TaskTokens, seed: int
) -> StageSamples:
    """The samples of a stage.

    Raises:
        ValueError: the sources hold nothing that this stage can use.
    """
    samples: StageSamples
    if stage.name == "pretrain":
        samples = PretrainSamples(examples, tokenizer, stage, task_tokens=task_tokens, seed=seed)
    else:
        samples = AnswerSamples(examples, tokenizer, stage)
    if not len(samples):
        wanted = "text" if stage.name == "pretrain" else "question"
        raise ValueError(
            f"no sample for stage {stage.name}: data.train is empty, its skip leaves nothing, or it holds no {wanted} "
            f"({samples.tally})"
        )
    return samples
