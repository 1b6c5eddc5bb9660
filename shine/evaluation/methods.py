"""The ways to answer: SHINE (context as LoRA), In-Context (context in the prompt), Only Question; see also `fine_tuning`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.chat import Message, clean_answer, encode_prompt, stop_ids, token_ids
from shine.config import PromptConfig
from shine.data.batching import chunks, pad_left
from shine.data.examples import Example
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA


@dataclass(frozen=True)
class Asked:
    """A question about context number ``context`` of those prepared, its turn ``turn``, after the earlier turns ``history``."""

    context: int
    question: str
    history: tuple[tuple[str, str], ...] = ()
    turn: int = 0


@dataclass(frozen=True)
class Answer:
    """What a method said; ``cut`` where it had not ended after ``max_new_tokens``."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Speaker:
    """The frozen model that all methods share, and what the baselines among them are told.

    Attributes:
        assistant_prefix: what the baselines' answers start after.
    """

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptConfig
    assistant_prefix: str = ""

    def batch(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of ids side by side on the backbone's device, with their mask."""
        ids, mask = pad_left(rows, value=self.tokenizer.pad_token_id)
        return ids.to(self.backbone.device), None if mask is None else mask.to(self.backbone.device)


class Method:
    """A way to answer questions about contexts: `prepare` reads some, then any number of questions about them can be asked.

    This one shows the question alone; the others say what they do beside.

    Attributes:
        name: under which its predictions are kept.
        encoded: contexts made into adapters so far, so that "once, however many questions" can be checked.
        made: adapters made so far; fine-tuning may make more than one of a context.
    """

    plain = False
    """Whether it sees plain ChatML, without the baselines' system turn and answer prefix."""

    def __init__(self, name: str, speaker: Speaker) -> None:
        self.name, self.speaker = name, speaker
        self.encoded = self.made = 0
        self.examples: list[Example] = []
        self.lora: LoRA | None = None

    @torch.no_grad()
    def prepare(self, examples: Sequence[Example]) -> None:
        """Read the contexts of these examples, all in one batch."""
        self.examples = list(examples)
        lora = self.adapters()
        if lora is not None:
            # Once here instead of at each linear of each token.
            lora = lora.to(dtype=self.speaker.backbone.dtype)
            self.encoded += len(self.examples)
            self.made += len(next(iter(lora.values()))[0])
        self.lora = lora

    def adapters(self) -> LoRA | None:
        """The adapters of the prepared contexts, if this method makes any."""
        return None

    def place(self, asked: Asked) -> int:
        """Which of the adapters answers a question."""
        return asked.context

    def first_question(self, asked: Asked, question: str) -> str:
        """What the conversation opens with."""
        return question

    def task_question(self, token: str, words: str) -> str:
        """The question that asks for a text: the task token, or words for a model that never learned it."""
        return token if self.plain else words

    @property
    def adapter_bytes(self) -> int:
        """Bytes of one adapter in the backbone's type; zero without one."""
        if self.lora is None:
            return 0
        return sum(a[0].numel() * a.element_size() + b[0].numel() * b.element_size() for a, b in self.lora.values())

    def messages(self, asked: Asked) -> list[Message]:
        """The conversation up to and with the question, as this method shows it to the backbone."""
        questions = [question for question, _ in asked.history] + [asked.question]
        questions[0] = self.first_question(asked, questions[0])
        system = "" if self.plain else self.speaker.prompts.system
        messages = [Message("system", system)] if system else []
        for index, question in enumerate(questions):
            messages.append(Message("user", question))
            if index < len(asked.history):
                messages.append(Message("assistant", asked.history[index][1]))
        return messages

    def prompt(self, asked: Asked) -> list[int]:
        """Ids of what the backbone reads before it answers."""
        prefix = "" if self.plain else self.speaker.assistant_prefix
        return encode_prompt(self.speaker.tokenizer, self.messages(asked), assistant_prefix=prefix)

    def answer(self, asked: Sequence[Asked], *, max_new_tokens: int, batch_size: int) -> list[Answer]:
        """Greedy answers, in the order of the questions."""
        rows = self.answer_ids(asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
        texts = self.speaker.tokenizer.batch_decode(rows)
        return [Answer(clean_answer(text), len(row) == max_new_tokens) for row, text in zip(rows, texts, strict=True)]

    @torch.no_grad()
    def answer_ids(self, asked: Sequence[Asked], *, max_new_tokens: int, batch_size: int) -> list[list[int]]:
        """Token ids of the greedy answers, without the end token and what follows it; prompts of one length go together."""
        speaker, stops = self.speaker, stop_ids(self.speaker.tokenizer)
        prompts = [self.prompt(question) for question in asked]
        order = sorted(range(len(asked)), key=lambda index: len(prompts[index]))
        found: dict[int, list[int]] = {}
        for batch in chunks(order, batch_size):
            ids, mask = speaker.batch([prompts[index] for index in batch])
            tokens = speaker.backbone.generate(
                ids,
                torch.ones_like(ids) if mask is None else mask,
                lora=self.worn([asked[index] for index in batch]),
                max_new_tokens=max_new_tokens,
                stop_ids=stops,
                pad_id=speaker.tokenizer.pad_token_id,
            )
            found |= zip(batch, (_until(row, stops) for row in tokens.tolist()), strict=True)
        return [found[index] for index in range(len(asked))]

    def worn(self, asked: Sequence[Asked]) -> LoRA | None:
        """The adapter of each question, side by side."""
        return None if self.lora is None else self.lora.select([self.place(question) for question in asked])


class Shine(Method):
    """The context as a LoRA that the hypernetwork made."""

    plain = True

    def __init__(self, name: str, speaker: Speaker, hypernetwork: Hypernetwork) -> None:
        super().__init__(name, speaker)
        self.hypernetwork = hypernetwork.eval()

    def adapters(self) -> LoRA:
        ids, mask = self.speaker.batch([token_ids(self.speaker.tokenizer, example.context) for example in self.examples])
        return self.hypernetwork(self.speaker.backbone, ids, mask)


class ShineOther(Shine):
    """The control: every question under the adapter that another context of its batch has.

    What this scores above Only Question is what any adapter brings, such as short answers; what SHINE scores above this it has
    from the context.
    """

    def adapters(self) -> LoRA:
        own = super().adapters()
        if own.batch < 2:
            raise ValueError(
                "methods=[shine_other] needs another context beside each: give two contexts at least, and batch_size=3 at least"
            )
        return own.select([(index + 1) % own.batch for index in range(own.batch)])


class InContext(Method):
    """The context in the prompt, before the first question."""

    def first_question(self, asked: Asked, question: str) -> str:
        return self.speaker.prompts.in_context.format(context=self.examples[asked.context].context, question=question)


class InContextTuned(Method):
    """The context in a system turn, read under the LoRA of `shine.training.reader`, one for all contexts.

    Args:
        reader: of batch one.
    """

    plain = True
    adapter_bytes = 0

    def __init__(self, name: str, speaker: Speaker, reader: LoRA) -> None:
        super().__init__(name, speaker)
        self.reader = reader.to(speaker.backbone.device, speaker.backbone.dtype)

    def prepare(self, examples: Sequence[Example]) -> None:
        """Only remember them: nothing is made of them."""
        self.examples = list(examples)

    def messages(self, asked: Asked) -> list[Message]:
        """The context, and the conversation as SHINE is asked."""
        return [Message("system", self.examples[asked.context].context), *super().messages(asked)]

    def worn(self, asked: Sequence[Asked]) -> LoRA | None:
        """The same one for all."""
        return self.reader


def _until(row: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stops), len(row))
    return list(row[:end])
