"""The slow way to put a context into weights: an ordinary LoRA, trained on each context by itself."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from shine.chat import Message, encode_conversation
from shine.config import FineTuningConfig
from shine.data.batching import chunks, collate
from shine.data.examples import Example, Turn
from shine.data.samples import Sample
from shine.evaluation.methods import Asked, Method, Speaker
from shine.lora import LoRA
from shine.training.reader import starting_lora

FOLDS = 2
"""LoRAs of a context whose own questions are learned: one of the even turns, to answer the odd ones, and one of the odd turns."""


@dataclass(frozen=True)
class Lessons:
    """Which conversations may be learned for a context.

    Attributes:
        of: conversations by context text, from a source of their own; ``None`` takes the context's other questions.
    """

    of: dict[str, list[tuple[Turn, ...]]] | None = field(default=None)

    @staticmethod
    def read(examples: Iterable[Example]) -> Lessons:
        """The conversations of a source, by context."""
        found: dict[str, list[tuple[Turn, ...]]] = defaultdict(list)
        for example in examples:
            if turns := tuple(turn for turn in example.turns if turn.answers):
                found[example.context.strip()].append(turns)
        return Lessons(dict(found))

    def conversations(self, example: Example, fold: int) -> list[tuple[Turn, ...]]:
        """Those that the LoRA of ``fold`` may learn: never one with a question that this LoRA is to answer.

        Raises:
            ValueError: the source has none about this context.
        """
        if self.of is None:
            return [(turn,) for number, turn in enumerate(example.turns) if number % FOLDS != fold]
        if (found := self.of.get(example.context.strip())) is None:
            raise ValueError(
                f"fine_tuning.source holds no conversation about context {example.id}: it must be about the very contexts that are "
                "scored (contexts cut to stage.context_length are matched as cut), or set fine_tuning.source=null"
            )
        return found


class FineTuned(Method):
    """A LoRA trained on the context and on ``count`` conversations about it; then the question alone, as SHINE is asked."""

    plain = True

    def __init__(self, name: str, speaker: Speaker, config: FineTuningConfig, *, count: int, epochs: int, lessons: Lessons) -> None:
        super().__init__(name, speaker)
        self.config, self.count, self.epochs, self.lessons = config, count, epochs, lessons

        self._first: list[int] = []

    def place(self, asked: Asked) -> int:
        return self._first[asked.context] + asked.turn % len(self.folds(self.examples[asked.context]))

    def task_question(self, token: str, words: str) -> str:
        return words

    def folds(self, example: Example) -> range:
        """The LoRAs of a context by what they may learn: one, unless its own questions are learned, half of them for the others."""
        return range(min(FOLDS, max(len(example.turns), 1)) if self.count and self.lessons.of is None else 1)

    def adapters(self) -> LoRA:
        folds = [self.folds(example) for example in self.examples]
        self._first = [0, *itertools.accumulate(map(len, folds))]
        return LoRA.stack([self._train(example, fold) for example, mine in zip(self.examples, folds, strict=True) for fold in mine])

    def conversations(self, example: Example, fold: int) -> list[tuple[Turn, ...]]:
        """What the LoRA of ``fold`` learns beside the text: ``count`` conversations, or as many as there are."""
        return self.lessons.conversations(example, fold)[: self.count] if self.count else []

    def learned(self, source: str, examples: Sequence[Example]) -> dict[str, float]:
        """How many conversations the LoRAs of a set really learn: the number wanted, the fewest, and the mean.

        Raises:
            ValueError: there is none to learn about any context, so that this would be fine-tuning on the text alone.
        """
        found = [len(self.conversations(example, fold)) for example in examples for fold in self.folds(example)]
        if self.count and not any(found):
            raise ValueError(
                f"fine_tuning.conversations={self.count}: no context of {source} has a second question that could be learned; name "
                "conversations about these contexts in fine_tuning.source, or learn the text alone: fine_tuning.conversations=[0]"
            )
        return {"wanted": self.count, "fewest": min(found), "mean": sum(found) / len(found)}

    def samples(self, example: Example, fold: int) -> list[Sample]:
        """What one LoRA learns: the context given back, then the conversations."""
        learned: list[tuple[Turn, ...]] = [(Turn(self.speaker.prompts.repeat, (example.context,)),)]
        learned += self.conversations(example, fold)
        samples = []
        for turns in learned:
            messages = [m for turn in turns for m in (Message("user", turn.question), Message("assistant", turn.answer))]
            encoded = encode_conversation(self.speaker.tokenizer, messages)
            samples.append(Sample(example.id, [0], encoded.input_ids, encoded.labels))
        return samples

    def _train(self, example: Example, fold: int) -> LoRA:
        seed = int.from_bytes(hashlib.sha256(f"{example.id} {fold}".encode()).digest()[:7])
        lora = starting_lora(self.speaker.backbone, rank=self.config.rank, generator=torch.Generator().manual_seed(seed))
        samples, order = self.samples(example, fold), random.Random(seed)
        parameters = list(itertools.chain.from_iterable(lora.values()))
        optimizer = torch.optim.AdamW(parameters, lr=self.config.learning_rate, weight_decay=0.0)
        scale = self.config.alpha / self.config.rank
        with torch.enable_grad():
            for _ in range(self.epochs):
                for group in chunks(order.sample(samples, len(samples)), self.config.batch_size):
                    optimizer.zero_grad()
                    self._loss(lora.scale(scale), group).backward()
                    optimizer.step()
        return LoRA({path: (a.detach(), b.detach() * scale) for path, (a, b) in lora.items()})

    def _loss(self, lora: LoRA, samples: Sequence[Sample]) -> Tensor:
        speaker = self.speaker
        batch = collate(samples, pad_id=speaker.tokenizer.pad_token_id).to(speaker.backbone.device)
        logits = speaker.backbone.label_logits(batch.input_ids, batch.input_mask, label_positions=batch.label_positions, lora=lora)
        return F.cross_entropy(logits, batch.label_ids)
