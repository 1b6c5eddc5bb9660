"""ChatML text, labels, truncation, task tokens, and what is left of an answer."""

from __future__ import annotations

import re

import pytest
from conftest import SPECIAL, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shine.chat import (
    IGNORE,
    Message,
    clean_answer,
    encode_conversation,
    encode_prompt,
    prepare_tokenizer,
    separator_id,
    stop_ids,
    token_ids,
)
from shine.config import TaskTokens

MARKS = SPECIAL[:3]

CONVERSATION = [
    Message("user", "Who is it?"),
    Message("assistant", "Abro,\nof Arlow."),
    Message("user", "And Ünna?"),
    Message("assistant", "é"),
]
# The same by hand: a piece of text, and whether it is a label.
PIECES = [
    ("<|im_start|>user\nWho is it?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Abro,\nof Arlow.<|im_end|>\n", True),
    ("<|im_start|>user\nAnd Ünna?<|im_end|>\n<|im_start|>assistant\n", False),
    ("é<|im_end|>\n", True),
]


def ids_and_labels(tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """One token a byte, so the pieces can be tokenised by themselves."""
    ids, labels = [], []
    for text, is_label in pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if is_label else [-100] * len(piece)
    return ids, labels


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Message("user", "Hi"), "<|im_start|>user\nHi<|im_end|>\n"),
        (Message("assistant", "a\n b "), "<|im_start|>assistant\na\n b <|im_end|>\n"),
        (Message("system", ""), "<|im_start|>system\n<|im_end|>\n"),
    ],
)
def test_a_message_is_written_as_plain_chatml(tokenizer: PreTrainedTokenizerBase, message: Message, text: str) -> None:
    assert tokenizer.decode(encode_conversation(tokenizer, [message]).input_ids) == text


def test_the_conversation_is_chatml_without_system_turn_or_think_block(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(encode_conversation(tokenizer, CONVERSATION).input_ids) == "".join(text for text, _ in PIECES)


def test_labels_are_each_answer_its_end_token_and_newline_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_conversation(tokenizer, CONVERSATION)
    ids, labels = ids_and_labels(tokenizer, PIECES)
    assert encoded.input_ids == ids
    assert encoded.labels == labels
    assert IGNORE == -100
    assert encoded.dropped == 0
    # "Abro,\nof Arlow." is 15 bytes, "é" two; each with its end token and newline.
    assert encoded.label_count == 15 + 2 + 2 + 2


def test_a_conversation_without_an_answer_has_no_label(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_conversation(tokenizer, [Message("system", "s"), Message("user", "assistant")]).label_count == 0


def test_truncation_drops_the_end_and_counts_it(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, labels = ids_and_labels(tokenizer, PIECES)
    for length in range(len(ids) + 3):
        encoded = encode_conversation(tokenizer, CONVERSATION, max_length=length)
        assert encoded.input_ids == ids[:length]
        assert encoded.labels == labels[:length]
        assert encoded.dropped == max(len(ids) - length, 0)
        assert encoded.label_count == sum(label != -100 for label in labels[:length])


@pytest.mark.parametrize("prefix", ["", "<think>\n\n</think>\n\n"])
def test_a_prompt_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerBase, prefix: str) -> None:
    messages = [Message("system", "Be brief."), *CONVERSATION[:3]]
    text = tokenizer.decode(encode_prompt(tokenizer, messages, assistant_prefix=prefix))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho is it?<|im_end|>\n"
        "<|im_start|>assistant\nAbro,\nof Arlow.<|im_end|>\n<|im_start|>user\nAnd Ünna?<|im_end|>\n<|im_start|>assistant\n" + prefix
    )


@pytest.mark.parametrize("content", ["plain", "\nafter a newline", "\n\n\n", "", "ends in a newline\n"])
def test_a_prompt_is_what_training_saw_before_the_answer(content: str) -> None:
    # A tokenizer that knows "\n\n", as real ones do: what stands after a header must not melt into its newline.
    tokenizer = tiny_tokenizer(merges=[("Ċ", "Ċ")])
    assert len(token_ids(tokenizer, "\n\n")) == 1
    messages = [Message("user", content), Message("assistant", content), Message("user", content), Message("assistant", "x")]
    encoded = encode_conversation(tokenizer, messages)
    # The last answer is "x", its end token and a newline.
    assert encode_prompt(tokenizer, messages[:-1]) == encoded.input_ids[:-3]


def test_tokens_are_those_of_the_text_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    letters = tiny_tokenizer().get_vocab()
    assert token_ids(tokenizer, "ab<|im_end|>") == [letters["a"], letters["b"], 2]
    assert token_ids(tokenizer, "") == []


# --- task tokens -----------------------------------------------------------------------------------------------------------


def test_task_tokens_go_to_the_spare_rows_in_order() -> None:
    tokenizer = tiny_tokenizer(MARKS)
    assert len(tokenizer) == 259
    prepare_tokenizer(tokenizer, TaskTokens(), embedding_rows=262)
    assert token_ids(tokenizer, "<RECON>a<COMP><NOTHING>") == [259, tokenizer.get_vocab()["a"], 260, 261]
    assert len(tokenizer) == 262


def test_task_tokens_that_the_vocabulary_has_stay_where_they_are() -> None:
    tokenizer = tiny_tokenizer([*MARKS, "<COMP>"])
    prepare_tokenizer(tokenizer, TaskTokens(), embedding_rows=262)
    assert token_ids(tokenizer, "<RECON><COMP><NOTHING>") == [260, 3, 261]
    full = tiny_tokenizer([*MARKS, "<issue_start>", "<issue_comment>", "<issue_closed>"])
    prepare_tokenizer(full, TaskTokens("<issue_start>", "<issue_comment>", "<issue_closed>"), embedding_rows=262)
    assert len(full) == 262
    assert token_ids(full, "<issue_start><issue_comment><issue_closed>") == [3, 4, 5]


def test_preparing_twice_changes_nothing() -> None:
    tokenizer = tiny_tokenizer(MARKS)
    for _ in range(2):
        prepare_tokenizer(tokenizer, TaskTokens(), embedding_rows=262)
    assert len(tokenizer) == 262


@pytest.mark.parametrize(("special", "rows"), [(MARKS, 261), (MARKS, 259), ([*MARKS, "<COMP>"], 261)])
def test_without_spare_rows_the_error_names_tokens_that_could_serve(special: list[str], rows: int) -> None:
    tokenizer = tiny_tokenizer([*special, "<issue_start>"])
    before = len(tokenizer)
    with pytest.raises(ValueError, match=r"no spare embedding row for <RECON>.*backbone\.task_tokens") as error:
        prepare_tokenizer(tokenizer, TaskTokens(), embedding_rows=rows)
    assert "<issue_start>" in str(error.value)
    assert "<|im_start|>" not in str(error.value).split("some of")[1]
    assert len(tokenizer) == before


def word_tokenizer(*words: str, end: str) -> PreTrainedTokenizerFast:
    """Knows these words and nothing else."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>"])
def test_a_vocabulary_without_chatml_is_refused(mark: str) -> None:
    words = [word for word in ("<|im_start|>", "<|im_end|>", "<|endoftext|>") if word != mark]
    with pytest.raises(ValueError, match=f"no {re.escape(mark)}: .*instruct"):
        prepare_tokenizer(word_tokenizer(*words, end="<|endoftext|>"), TaskTokens(), embedding_rows=1000)


def test_a_task_token_that_is_not_one_token_is_refused() -> None:
    # "Ċa" is an entry of the vocabulary, but as text it is two bytes' worth of other tokens.
    tokenizer = tiny_tokenizer(merges=[("Ċ", "a")])
    with pytest.raises(ValueError, match="Ċa"):
        prepare_tokenizer(tokenizer, TaskTokens(reconstruct="Ċa"), embedding_rows=1000)


# --- answers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris", "Paris"),
        ("  Paris \n", "Paris"),
        ("", ""),
        ("<think>\n\n</think>\n\nParis", "Paris"),
        ("<think>It is in France, so <think> again.</think>\nParis", "Paris"),
        ("thoughts that began in the prompt</think>\n\nParis", "Paris"),
        ("<think>one</think>two<think>three</think> Paris", "Paris"),
        # Unclosed: the budget ended inside the block; what there is is scored.
        ("<think>\nParis", "Paris"),
        ("<think>", ""),
        ("</think>", ""),
        # Kept whole, not cut at the first line.
        ('{\n  "city": "Paris",\n  "people": [1, 2]\n}', '{\n  "city": "Paris",\n  "people": [1, 2]\n}'),
        ("<think>\n\n</think>\n\ndef f(x):\n    return x\n\n\nprint(f(1))\n", "def f(x):\n    return x\n\n\nprint(f(1))"),
        ("Paris\n\nIt is the capital.", "Paris\n\nIt is the capital."),
        ("a < b and b > c", "a < b and b > c"),
    ],
)
def test_clean_answer(text: str, answer: str) -> None:
    assert clean_answer(text) == answer


# --- ends ------------------------------------------------------------------------------------------------------------------


def test_answers_stop_at_the_end_of_a_turn_of_a_text_and_at_the_tokenizers_own_end() -> None:
    assert stop_ids(tiny_tokenizer()) == [0, 2]
    tokenizer = tiny_tokenizer([*MARKS, "<eos>"])
    tokenizer.eos_token = "<eos>"
    assert stop_ids(tokenizer) == [0, 2, 3]


def test_texts_are_separated_by_the_end_of_text_token_or_the_end_token_where_there_is_none() -> None:
    assert separator_id(word_tokenizer("a", "<|endoftext|>", "</s>", end="</s>")) == 1
    assert separator_id(word_tokenizer("a", "b", "</s>", end="</s>")) == 2
