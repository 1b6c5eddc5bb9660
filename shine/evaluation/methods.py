"""The three ways to answer: SHINE (the context as LoRA), In-Context (the context in the prompt), Only Question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.chat import Message, clean_answer, encode_prompt, stop_ids, token_ids
from shine.config import MethodName, PromptConfig
from shine.data.batching import pad_left
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA


@dataclass(frozen=True)
class Asked:
    """A question about context number ``context`` of those prepared, after the earlier turns of its conversation."""

    context: int
    question: str
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a method said; ``cut`` where it had not ended after ``max_new_tokens``."""

    text: str
    cut: bool


@dataclass
class Method:
    """A way to answer questions about contexts.

    ``prepare`` reads a list of contexts once; then any number of questions about them can be asked. The count of encoded
    contexts is kept, so that "a context with several questions is encoded once" can be checked.
    """

    name: MethodName
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptConfig
    assistant_prefix: str = ""
    hypernetwork: Hypernetwork | None = None
    encoded: int = field(default=0, init=False)
    contexts: list[str] = field(default_factory=list, init=False)
    lora: LoRA | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        assert (self.hypernetwork is not None) == (self.name == "shine")

    @torch.no_grad()
    def prepare(self, contexts: Sequence[str]) -> None:
        """Read these contexts; SHINE turns them into LoRAs here, in one batch."""
        self.contexts = list(contexts)
        if self.hypernetwork is not None:
            ids, mask = self._batch([token_ids(self.tokenizer, context) for context in contexts])
            self.lora = self.hypernetwork(self.backbone, ids, mask)
            self.encoded += len(self.contexts)

    def messages(self, asked: Asked) -> list[Message]:
        """The conversation up to and with the question, as this method shows it to the backbone."""
        questions = [question for question, _ in asked.history] + [asked.question]
        if self.name == "in_context":
            questions[0] = self.prompts.in_context.format(context=self.contexts[asked.context], question=questions[0])
        messages = [Message("system", self.prompts.system)] if self.name != "shine" and self.prompts.system else []
        for index, question in enumerate(questions):
            messages.append(Message("user", question))
            if index < len(asked.history):
                messages.append(Message("assistant", asked.history[index][1]))
        return messages

    def answer(self, asked: Sequence[Asked], *, max_new_tokens: int) -> list[Answer]:
        """Greedy answers, all questions in one batch."""
        rows = self.answer_ids(asked, max_new_tokens=max_new_tokens)
        texts = self.tokenizer.batch_decode(rows)
        return [Answer(clean_answer(text), len(row) == max_new_tokens) for row, text in zip(rows, texts, strict=True)]

    @torch.no_grad()
    def answer_ids(self, asked: Sequence[Asked], *, max_new_tokens: int) -> list[list[int]]:
        """Token ids of the greedy answers, without the end token and what follows it."""
        stops = stop_ids(self.tokenizer)
        prompts = [encode_prompt(self.tokenizer, self.messages(a), assistant_prefix=self.assistant_prefix) for a in asked]
        ids, mask = self._batch(prompts)
        tokens = self.backbone.generate(
            ids,
            torch.ones_like(ids) if mask is None else mask,
            lora=self.worn(asked),
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            pad_id=self.tokenizer.pad_token_id,
        )
        return [_until(row, stops) for row in tokens.tolist()]

    def worn(self, asked: Sequence[Asked]) -> LoRA | None:
        """The adapter of each question's context, side by side."""
        return None if self.lora is None else self.lora.select([a.context for a in asked])

    def _batch(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids, mask = pad_left(rows, value=self.tokenizer.pad_token_id)
        return ids.to(self.backbone.device), None if mask is None else mask.to(self.backbone.device)


def _until(row: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stops), len(row))
    return list(row[:end])
