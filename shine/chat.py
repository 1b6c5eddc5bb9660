"""ChatML text, special tokens, and which tokens are labels.

Everything SHINE sees is plain ChatML: no system turn, no think block. We render it ourselves because chat templates differ
in both (SmolLM2's adds a system turn, Qwen3's a think block).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from shine.config import TaskTokens

IGNORE = -100
"""The label of a token that is not scored."""

START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Conversation:
    """Questions with their answers so far; a value: `then` gives a longer one."""

    turns: tuple[tuple[str, str], ...] = ()

    def then(self, question: str, answer: str) -> Conversation:
        """This conversation with one more turn."""
        return Conversation((*self.turns, (question, answer)))

    def asking(self, question: str) -> list[Message]:
        """The messages up to and with the next question."""
        said = [message for asked, answer in self.turns for message in (Message("user", asked), Message("assistant", answer))]
        return [*said, Message("user", question)]


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids and labels of a conversation, both ``[T]``; ``dropped`` tokens were cut at its end to fit."""

    input_ids: list[int]
    labels: list[int]
    dropped: int = 0

    @property
    def label_count(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, task_tokens: TaskTokens, *, embedding_rows: int) -> None:
    """Make sure the task tokens and ChatML marks are single tokens; new ones go to spare rows of the embedding.

    Raises:
        ValueError: the vocabulary has no ChatML marks, or no spare row is left for the task tokens.
    """
    for mark in (START, END):
        if mark not in tokenizer.get_vocab():
            raise ValueError(
                f"this tokenizer has no {mark}: SHINE speaks ChatML, choose a backbone that knows it (an instruct model)"
            )
    names = [task_tokens.reconstruct, task_tokens.complete, task_tokens.nothing]
    missing = [name for name in names if len(token_ids(tokenizer, name)) != 1]
    if missing and len(tokenizer) + len(missing) > embedding_rows:
        spare = [name for name in tokenizer.all_special_tokens if name not in (START, END)]
        raise ValueError(
            f"no spare embedding row for {', '.join(missing)} ({len(tokenizer)} tokens, {embedding_rows} rows): set "
            f"backbone.task_tokens to special tokens the vocabulary has and does not need, some of {', '.join(spare)}"
        )
    for name in missing:
        if name in tokenizer.get_vocab():
            raise ValueError(
                f"{name!r} is a piece of words to this tokenizer: set backbone.task_tokens to special tokens, or new ones"
            )
    tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > embedding_rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model's embedding {embedding_rows:,} rows: they do not belong "
            "together, fetch both from the same place"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ``text`` with nothing added around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def token_starts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Where in ``text`` each of its tokens begins, in characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [start for start, _ in encoded["offset_mapping"]]


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has."""
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """How many tokens a text has, as a function of the text."""
    return lambda text: len(token_ids(tokenizer, text))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, max_length: int | None = None
) -> EncodedConversation:
    """Tokenise a conversation; labels are each answer, its end token and newline, everything else is ignored.

    Args:
        messages: the turns in order.
        max_length: tokens beyond this are dropped at the end.
    """
    return encode_conversations(tokenizer, [messages], max_length=max_length)[0]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, max_length: int | None = None
) -> list[EncodedConversation]:
    """`encode_conversation` of each, tokenised by one call."""
    pieces = [
        text
        for messages in conversations
        for message in messages
        for text in (f"{START}{message.role}\n", f"{message.content}{END}\n")
    ]
    ids = iter(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else ())
    encoded = []
    for messages in conversations:
        input_ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            header, body = next(ids), next(ids)
            input_ids += header + body
            labels += [IGNORE] * len(header) + (body if message.role == "assistant" else [IGNORE] * len(body))
        limit = len(input_ids) if max_length is None else max_length
        encoded.append(EncodedConversation(input_ids[:limit], labels[:limit], dropped=max(len(input_ids) - limit, 0)))
    return encoded


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, assistant_prefix: str = "") -> list[int]:
    """Ids of a conversation that ends where the assistant's next answer begins."""
    said = encode_conversation(tokenizer, messages).input_ids
    return said + token_ids(tokenizer, f"{START}assistant\n{assistant_prefix}")


def prompt_text(messages: Sequence[Message]) -> str:
    """The text of what `encode_prompt` gives the ids of, for those who tokenise it elsewhere."""
    said = "".join(f"{START}{message.role}\n{message.content}{END}\n" for message in messages)
    return f"{said}{START}assistant\n"


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[mark] for mark in (END, END_OF_TEXT) if mark in vocabulary}
    return sorted(ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-text token that stands between grouped texts."""
    return tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)


def clean_answer(text: str) -> str:
    """The answer itself: without a think block, closed or not, and without surrounding white space."""
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    return text.replace("<think>", "").strip()
