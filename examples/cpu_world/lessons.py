"""What the CPU world's backbone is taught, from one word after another to conversations about an invented world.

Each lesson builds on the circuit that the one before has grown. Shown conversations at once, the model learns which kind of
answer a question wants and never whose: it gives somebody else's town, because most of the time there is only one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from shine.chat import IGNORE, Message, encode_conversation
from shine.config import PromptConfig, TaskTokens
from shine.data.worlds import NAMES, RELATIONS, Fact, World, tell
from shine.parsing import parse

Batches = Iterator[tuple[Tensor, Tensor]]
"""Ids and labels ``[B, T]``, right-padded, without end."""

PROMPTS = parse(PromptConfig, yaml.safe_load((Path(__file__).parents[2] / "configs/prompts/default.yaml").read_text()))
TASKS = TaskTokens()
VALUES = tuple(value for relation in RELATIONS for value in relation.values)

ONE_KIND = World(people=(2, 4), kinds=(1, 1), facts=(2, 2))
TWO_KINDS = World(people=(3, 4), kinds=(2, 2), facts=(3, 6))
THREE_KINDS = World(people=(2, 4), kinds=(3, 3), facts=(3, 6))
ALL_KINDS = World()


def repetitions(tokenizer: PreTrainedTokenizerBase, *, batch: int, seed: int) -> Batches:
    """Random names and values, the same row three times, labels on the repetitions: what came after this word before?"""
    words = word_ids(tokenizer, NAMES + VALUES)
    generator = torch.Generator().manual_seed(seed)
    while True:
        length = int(torch.randint(8, 24, (1,), generator=generator))
        once = words[torch.randint(len(words), (batch, length), generator=generator)]
        labels = once.repeat(1, 3)
        labels[:, :length] = IGNORE
        yield once.repeat(1, 3), labels


def pairs(tokenizer: PreTrainedTokenizerBase, *, batch: int, seed: int) -> Batches:
    """Names, each with a value, said again and again in a new order: what belongs to this name?"""
    names, values = word_ids(tokenizer, NAMES), word_ids(tokenizer, VALUES)
    generator = torch.Generator().manual_seed(seed)
    while True:
        count = int(torch.randint(3, 9, (1,), generator=generator))
        who = names[torch.rand(batch, len(names), generator=generator).topk(count).indices]
        what = values[torch.randint(len(values), (batch, count), generator=generator)]
        said, wanted = [], []
        for time in range(24 // count + 2):
            order = torch.rand(batch, count, generator=generator).argsort(1)
            pair = torch.stack([who.gather(1, order), what.gather(1, order)], -1)
            label = pair.clone()
            label[:, :, : 2 if time == 0 else 1] = IGNORE
            said.append(pair.flatten(1))
            wanted.append(label.flatten(1))
        yield torch.cat(said, 1), torch.cat(wanted, 1)


def restatements(tokenizer: PreTrainedTokenizerBase, worlds: Sequence[World], *, batch: int, seed: int) -> Batches:
    """A context told three times, each time in a new order and other words; labels on the values of the repetitions."""
    values = torch.cat([word_ids(tokenizer, VALUES), word_ids(tokenizer, VALUES, before="")])
    rng = random.Random(seed)

    def one() -> tuple[Tensor, Tensor]:
        facts = rng.choice(worlds).draw(rng)
        told = [tell(rng.sample(facts, len(facts)), rng) for _ in range(3)]
        first, ids = (torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in (told[0], " ".join(told)))
        labels = ids.where(torch.isin(ids, values), IGNORE)
        labels[: len(first)] = IGNORE
        return ids, labels

    while True:
        yield padded([one() for _ in range(batch)])


def questions(tokenizer: PreTrainedTokenizerBase, worlds: Sequence[World], *, batch: int, seed: int) -> Batches:
    """A short context of few kinds and, right behind it, the questions about it: which of these people is meant?"""
    rng = random.Random(seed)

    def one() -> list[Message]:
        facts = rng.choice(worlds).draw(rng)
        text = tell(facts, rng)
        turns = asked(facts, rng)
        return [Message("user", f"{text} {turns[0].content}"), *turns[1:]]

    while True:
        yield encoded(tokenizer, [one() for _ in range(batch)])


def conversations(tokenizer: PreTrainedTokenizerBase, worlds: Sequence[World], *, batch: int, seed: int) -> Batches:
    """Everything that the three methods will ask of the model: see `conversation`."""
    rng = random.Random(seed)
    while True:
        yield encoded(tokenizer, [conversation(rng.choice(worlds).draw(rng), rng) for _ in range(batch)])


def conversation(facts: list[Fact], rng: random.Random) -> list[Message]:
    """One of the ways in which the backbone meets a world, in the words of the baselines or in the plain ChatML of SHINE.

    Mostly questions with their context. Also questions without it, and texts asked for by a task token alone: nothing in the
    prompt can answer them, but they teach what such an answer looks like, so that a LoRA has to bring the facts and no more.
    """
    system = [Message("system", PROMPTS.system)] if rng.random() < 0.7 else []
    text, turns = tell(facts, rng), asked(facts, rng)
    way = rng.random()
    if way < 0.7:
        return [*system, Message("user", PROMPTS.in_context.format(context=text, question=turns[0].content)), *turns[1:]]
    if way < 0.8:
        return [*system, *turns]
    if way < 0.9:
        return [Message("user", rng.choice((TASKS.reconstruct, TASKS.complete))), Message("assistant", text)]
    return [*system, Message("user", f"{text}\n\n{PROMPTS.repeat}"), Message("assistant", text)]


def asked(facts: list[Fact], rng: random.Random) -> list[Message]:
    """A question about each fact with its answer, in a new order."""
    turns = [fact.turn(rng) for fact in rng.sample(facts, len(facts))]
    return [message for turn in turns for message in (Message("user", turn.question), Message("assistant", turn.answer))]


def word_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], *, before: str = " ") -> Tensor:
    """The token of each word, ``before`` written in front of it."""
    ids = [tokenizer(before + word, add_special_tokens=False).input_ids for word in words]
    assert all(len(row) == 1 for row in ids)
    return torch.tensor(ids).flatten()


def encoded(tokenizer: PreTrainedTokenizerBase, rows: list[list[Message]]) -> tuple[Tensor, Tensor]:
    found = [encode_conversation(tokenizer, row) for row in rows]
    return padded([(torch.tensor(row.input_ids), torch.tensor(row.labels)) for row in found])


def padded(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, labels = [ids for ids, _ in rows], [labels for _, labels in rows]
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORE)
