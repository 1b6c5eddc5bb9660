"""Models and tokenizers as transformers reads them from a folder or the hub: whole, able to pad, and without noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from shine.chat import END_OF_TEXT


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Quiet while transformers loads or writes weights; its own setting afterwards."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_model(path: str, **options: Any) -> Any:
    """A ``PreTrainedModel`` every weight of which was found; typed ``Any`` because its methods are wrapped beyond mypy's reach."""
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(path, output_loading_info=True, **options)
    # transformers would start what is missing at random and only warn.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} among them")
    return model


def count_parameters(path: str) -> int:
    """How many numbers the weights of a model hold, by its configuration alone."""
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = make(AutoConfig.from_pretrained(path))
    return sum(parameter.numel() for parameter in model.parameters())


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, able to pad: with the end of text where it names no pad token."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Where the files are missing transformers makes up a tokenizer of special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("it has no tokenizer files")
    if tokenizer.pad_token is None:
        if END_OF_TEXT not in tokenizer.get_vocab():
            raise ValueError(f"its tokenizer has neither a pad token nor {END_OF_TEXT}, set pad_token in tokenizer_config.json")
        tokenizer.pad_token = END_OF_TEXT
    return tokenizer


def first_line(error: Exception) -> str:
    """What a library said, in one line without its full stop."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
