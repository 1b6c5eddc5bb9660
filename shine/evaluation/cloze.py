"""Whether an adapter knows its document: words held out of the document's own sentences, scored with and without the adapter.

The question is a sentence up to a word that the text uses only once, and the answer is that word. It competes with words held out
of other sentences of the same text, so that knowing what such a text is about is not enough. What this cannot tell is whether
questions are answered well: it shows that what the text says, and not only its style, is there.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shine.chat import Message, encode_prompt, token_ids
from shine.data.batching import chunks, pad_left
from shine.lora import LoRA
from shine.model import Shine
from shine.pieces import sentences

CHOICES = 8
FEWEST = 5
"""Sentences below which no result could be told from chance: five of five are 3 % likely by chance."""
SURE = 0.05
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Cloze:
    """A sentence up to a word, the word, and the words it competes with (itself among them)."""

    start: str
    word: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Guess:
    """What the model made of a cloze: the log-probability of every choice."""

    cloze: Cloze
    scores: tuple[float, ...]

    @property
    def choice(self) -> str:
        """The likeliest word."""
        return self.cloze.choices[max(range(len(self.scores)), key=lambda index: self.scores[index])]

    @property
    def right(self) -> bool:
        return self.choice == self.cloze.word

    @property
    def loss(self) -> float:
        """Of the right word, in nats, before the choices are compared."""
        return -self.scores[self.cloze.choices.index(self.cloze.word)]

    @property
    def margin(self) -> float:
        """How far the right word's log-probability lies above the mean of the other choices."""
        return (-self.loss * len(self.scores) - sum(self.scores)) / (len(self.scores) - 1)


@dataclass(frozen=True)
class Knowledge:
    """The same clozes with and without the adapter.

    Attributes:
        p: of the sign test: how likely it is that the adapter helps in so many sentences by chance.
    """

    with_adapter: tuple[Guess, ...]
    without: tuple[Guess, ...]

    @property
    def helped(self) -> int:
        """Sentences in which the right word gains more from the adapter than the other choices do on average."""
        return sum(a.margin > b.margin for a, b in zip(self.with_adapter, self.without, strict=True))

    @property
    def p(self) -> float:
        count = len(self.with_adapter)
        return sum(math.comb(count, k) for k in range(self.helped, count + 1)) / 2**count

    @property
    def knows(self) -> bool:
        """Helped more often than chance explains."""
        return self.p < SURE


def make_clozes(text: str, *, most: int = 64, seed: int = 0) -> list[Cloze]:
    """Clozes from a text, spread over it; each holds out the last word of a sentence that the text uses once.

    Raises:
        ValueError: there are too few such sentences.
    """
    counts = Counter(word.lower() for word in _WORD.findall(text))
    held = []
    for sentence in dict.fromkeys(sentence.strip() for sentence in sentences(text)):
        words = [match for match in _WORD.finditer(sentence) if match.start() > 0]
        once = [match for match in words if counts[match[0].lower()] == 1 and (len(match[0]) > 2 or match[0].isdigit())]
        if once:
            held.append((sentence[: once[-1].start()].rstrip(), once[-1][0]))
    if len(held) < FEWEST:
        raise ValueError(
            f"only {len(held)} sentences of this text have a word of their own to ask for, {FEWEST} are needed: give a longer text"
        )
    step = max(len(held) / most, 1)
    chosen = [held[int(index * step)] for index in range(min(len(held), most))]
    rng = random.Random(seed)
    clozes = []
    for start, word in chosen:
        others = [other for _, other in held if other != word]
        choices = [word, *rng.sample(others, min(len(others), CHOICES - 1))]
        rng.shuffle(choices)
        clozes.append(Cloze(start, word, tuple(choices)))
    return clozes


def examine(shine: Shine, lora: LoRA, clozes: Sequence[Cloze]) -> Knowledge:
    """Score the clozes with and without the adapter, which must fit (`Shine.check_fits`)."""
    return Knowledge(tuple(_guesses(shine, lora, clozes)), tuple(_guesses(shine, None, clozes)))


@torch.no_grad()
def _guesses(shine: Shine, lora: LoRA | None, clozes: Sequence[Cloze], *, batch_size: int = 32) -> list[Guess]:
    rows, tails = [], []
    for cloze in clozes:
        prompt = encode_prompt(shine.tokenizer, [Message("user", cloze.start)])
        answers = [token_ids(shine.tokenizer, choice) for choice in cloze.choices]
        rows += [prompt + answer for answer in answers]
        tails += [len(answer) for answer in answers]
    scores: list[float] = []
    for batch in chunks(list(zip(rows, tails, strict=True)), batch_size):
        scores += _log_probabilities(shine, lora, [row for row, _ in batch], [tail for _, tail in batch])
    found = iter(scores)
    return [Guess(cloze, tuple(next(found) for _ in cloze.choices)) for cloze in clozes]


def _log_probabilities(shine: Shine, lora: LoRA | None, rows: Sequence[Sequence[int]], tails: Sequence[int]) -> list[float]:
    """Of the last ``tails[i]`` tokens of each row, given those before."""
    ids, mask = pad_left(rows, value=shine.tokenizer.pad_token_id)
    width, device = ids.shape[1], shine.backbone.device
    positions = torch.tensor([row * width + width - tail + i for row, tail in enumerate(tails) for i in range(tail)])
    labels = ids.flatten()[positions]
    logits = shine.backbone.label_logits(
        ids.to(device), None if mask is None else mask.to(device), label_positions=positions.to(device), lora=lora
    )
    found = logits.log_softmax(-1).gather(1, labels.to(device)[:, None])[:, 0]
    return [float(part.sum()) for part in found.split(list(tails))]
