"""From examples to samples: token ids and labels of one training sequence, for each stage."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from shine.chat import IGNORE, Message, encode_conversation, encode_conversations, separator_id, token_counts, token_ids
from shine.config import StageConfig, TaskTokens
from shine.data.examples import Example, Turn
from shine.data.grouping import Groups, first_fit
from shine.data.pieces import hide_end, split_text
from shine.data.table import Table, in_chunks, write_table
from shine.data.tally import Tally, answerable

MIN_PIECE = 8
"""The least tokens to split texts into; one character can take four."""
AT_ONCE = 256
"""Examples tokenised by one call."""


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


class StageSamples(Protocol):
    """The samples of a stage: sample ``index`` as it is in ``epoch``.

    Attributes:
        tally: what was skipped on the way here; who learns from a sample counts what was cut from it there.
        lengths: ``[N]``, tokens of each sample (of a group, about).
        examples: ``[N]``, equal numbers where samples have their context in common.
        fingerprint: a hash of the texts behind the samples and of their order, wherever they were read from.
    """

    tally: Tally
    lengths: np.ndarray
    examples: np.ndarray
    fingerprint: str

    def __len__(self) -> int: ...

    def sample(self, index: int, *, epoch: int) -> Sample: ...


class Digest:
    """A hash that texts are added to as they pass."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *texts: str) -> None:
        for text in texts:
            self._hash.update(text.encode("utf-8", "surrogatepass") + b"\0")

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


class AnswerSamples:
    """The QA stages: all turns of a context as one conversation (mqa), or each question by itself (1qa).

    Everything is tokenised once and kept in a table.
    """

    SCHEMA: Mapping[str, pa.DataType] = {
        "id": pa.string(),
        "example": pa.int32(),
        "context_ids": pa.list_(pa.int32()),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "context_dropped": pa.int32(),
        "conversation_dropped": pa.int32(),
    }

    def __init__(self, table: Table, tally: Tally, fingerprint: str) -> None:
        self.table, self.tally, self.fingerprint = table, tally, fingerprint
        context, conversation = (pc.list_value_length(table.column(name)).to_numpy() for name in ("context_ids", "input_ids"))
        self.lengths = context + conversation
        self.examples = table.column("example").to_numpy()

    @classmethod
    def build(
        cls, examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, stage: StageConfig, *, folder: Path | None = None
    ) -> AnswerSamples:
        """Tokenise ``examples`` into ``folder``, or into memory."""
        tally, digest = Tally(), Digest()
        rows = _answer_rows(examples, tokenizer, stage, tally, digest)
        table = write_table(None if folder is None else folder / "samples.arrow", cls.SCHEMA, rows)
        return cls(table, tally, str(digest))

    @classmethod
    def open(cls, folder: Path, tally: Tally, fingerprint: str) -> AnswerSamples:
        """What `build` wrote into ``folder``."""
        return cls(Table(folder / "samples.arrow"), tally, fingerprint)

    def __len__(self) -> int:
        return len(self.table)

    def sample(self, index: int, *, epoch: int) -> Sample:
        ids = {name: self.table.value(name, index).tolist() for name in ("context_ids", "input_ids", "labels")}
        dropped = {name: self.table.value(name, index) for name in ("context_dropped", "conversation_dropped")}
        return Sample(self.table.value("id", index), **ids, **dropped)


def _answer_rows(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, stage: StageConfig, tally: Tally, digest: Digest
) -> Iterator[dict[str, Any]]:
    read = 0
    for chunk in in_chunks(answerable(examples, tally), AT_ONCE):
        contexts = tokenizer([example.context for example in chunk], add_special_tokens=False, verbose=False)["input_ids"]
        asked = []
        for number, example in enumerate(chunk):
            digest.add(example.context, *(text for turn in example.turns for text in (turn.question, turn.answer)))
            if stage.name == "mqa":
                asked.append((number, example.id, example.turns))
            else:
                asked += [(number, f"{example.id}/{n}", (turn,)) for n, turn in enumerate(example.turns)]
        messages = [_messages(turns) for *_, turns in asked]
        encoded = encode_conversations(tokenizer, messages, max_length=stage.conversation_length)
        for (number, name, _), conversation in zip(asked, encoded, strict=True):
            if not conversation.label_count:
                tally.skip("no label left after truncation, raise stage.conversation_length", name)
                continue
            kept = contexts[number][: stage.context_length]
            yield {
                "id": name,
                "example": read + number,
                "context_ids": kept,
                "input_ids": conversation.input_ids,
                "labels": conversation.labels,
                "context_dropped": len(contexts[number]) - len(kept),
                "conversation_dropped": conversation.dropped,
            }
        read += len(chunk)


def _messages(turns: Iterable[Turn]) -> list[Message]:
    return [m for turn in turns for m in (Message("user", turn.question), Message("assistant", turn.answer))]


class PretrainSamples:
    """Reconstruction and completion of short texts grouped to the budget (paper, section on pretraining).

    The contexts of a group are joined by the end-of-text token; each text has its own turn, whose answer is the whole text in
    both tasks: a completion hides the last 10 to 30 % of the words from the context only. Contexts and turns are shuffled
    independently, anew in each epoch. Texts longer than the budget are split at a word into pieces that fit it.

    Args:
        texts: the texts with their token counts, as `build` writes them.
        groups: which of them belong together.
        tasks: restrict to one of ``("reconstruct", "complete")``, or use both, half and half.
    """

    HIDE = (0.1, 0.3)
    SCHEMA: Mapping[str, pa.DataType] = {"text": pa.large_string(), "tokens": pa.int32()}

    def __init__(
        self,
        texts: Table,
        groups: Groups,
        tally: Tally,
        fingerprint: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task_tokens: TaskTokens,
        seed: int,
        tasks: Sequence[str] = ("reconstruct", "complete"),
    ) -> None:
        self.texts, self.groups, self.tally, self.fingerprint = texts, groups, tally, fingerprint
        self.tokenizer, self.task_tokens, self.seed, self.tasks = tokenizer, task_tokens, seed, tuple(tasks)
        self.separator = separator_id(tokenizer)
        self.lengths = 2 * groups.totals
        self.examples = np.arange(len(groups.totals))

    @classmethod
    def build(
        cls,
        examples: Iterable[Example],
        tokenizer: PreTrainedTokenizerBase,
        stage: StageConfig,
        *,
        folder: Path | None = None,
        task_tokens: TaskTokens,
        seed: int,
        tasks: Sequence[str] = ("reconstruct", "complete"),
    ) -> PretrainSamples:
        """Split, count and group the texts of ``examples`` into ``folder``, or into memory.

        Raises:
            ValueError: the stage's lengths leave no room for a text.
        """
        overhead = len(encode_conversation(tokenizer, _text_turn(task_tokens.reconstruct, "")).input_ids)
        budget = min(stage.context_length - 1, stage.conversation_length - overhead)
        if budget < MIN_PIECE:
            raise ValueError(
                f"stage.context_length={stage.context_length} and stage.conversation_length={stage.conversation_length} leave no "
                f"room for a text: make them at least {MIN_PIECE + 1} and {MIN_PIECE + overhead}"
            )
        tally, digest = Tally(), Digest()
        rows = _text_rows(examples, tokenizer, budget, tally, digest)
        table = write_table(None if folder is None else folder / "texts.arrow", cls.SCHEMA, rows)
        lengths = table.column("tokens").to_numpy()
        # A text costs its separator in the context and its turn's marks in the conversation: both must fit.
        costs = np.stack([lengths + 1, lengths + overhead], axis=1)
        groups = first_fit(costs, limits=(stage.context_length, stage.conversation_length))
        if folder is not None:
            groups.save(folder / "groups.npz")
        return cls(table, groups, tally, str(digest), tokenizer, task_tokens=task_tokens, seed=seed, tasks=tasks)

    @classmethod
    def open(
        cls,
        folder: Path,
        tally: Tally,
        fingerprint: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task_tokens: TaskTokens,
        seed: int,
    ) -> PretrainSamples:
        """What `build` wrote into ``folder``."""
        texts, groups = Table(folder / "texts.arrow"), Groups.load(folder / "groups.npz")
        return cls(texts, groups, tally, fingerprint, tokenizer, task_tokens=task_tokens, seed=seed)

    def __len__(self) -> int:
        return len(self.groups)

    def sample(self, index: int, *, epoch: int) -> Sample:
        rng = random.Random(f"{self.seed} {epoch} {index}")
        texts = [self.texts.value("text", member) for member in self.groups[index]]
        members = [(text, rng.choice(self.tasks), rng.uniform(*self.HIDE)) for text in texts]
        rng.shuffle(members)
        context_ids: list[int] = []
        for text, task, share in members:
            visible = text if task == "reconstruct" else hide_end(text, share)
            context_ids += ([self.separator] if context_ids else []) + token_ids(self.tokenizer, visible)
        rng.shuffle(members)
        turns = [m for text, task, _ in members for m in _text_turn(getattr(self.task_tokens, task), text)]
        encoded = encode_conversation(self.tokenizer, turns)
        return Sample(f"group-{index}", context_ids, encoded.input_ids, encoded.labels)


def _text_turn(task_token: str, text: str) -> list[Message]:
    return [Message("user", task_token), Message("assistant", text)]


def _text_rows(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, budget: int, tally: Tally, digest: Digest
) -> Iterator[dict[str, Any]]:
    for chunk in in_chunks(examples, AT_ONCE):
        usable = []
        for example in chunk:
            if example.context.strip():
                usable.append(example.context)
            else:
                tally.skip("empty context", example.id)
        for text, count in zip(usable, token_counts(tokenizer, usable), strict=True):
            pieces = [(text, count)] if count <= budget else split_text(tokenizer, text, budget=budget)
            tally.texts_split += len(pieces) > 1
            for piece, length in pieces:
                if length:
                    digest.add(piece)
                    yield {"text": piece, "tokens": length}
