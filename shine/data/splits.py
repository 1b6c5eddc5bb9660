"""Splits by context, never by question. What was learned in spite of it is found by `shine.data.leaks`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from shine.config import SourceConfig
from shine.data.examples import Example

# A character of a script without spaces between words stands for a word.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+"
)


def one_side(examples: Iterable[Example], contexts: Iterable[str], config: SourceConfig) -> Iterator[Example]:
    """The examples on the side ``config.part`` of a split by context.

    Which contexts are held out depends on the contexts that there are, the share and the seed, not on their order; all questions
    about a context, and contexts that differ in case, marks and white space only, stay together.

    Args:
        contexts: all contexts of the source, read once before the examples.

    Raises:
        ValueError: there are too few contexts to hold some out.
    """
    # Takes most of a second, and few runs split anything.
    from sklearn.model_selection import GroupShuffleSplit

    groups = np.array([_hash(words_of(context)) for context in contexts], dtype=np.uint64)
    if len(np.unique(groups)) < 2:
        raise ValueError(f"part={config.part}: a split needs at least two different contexts; set part=all")
    splitter = GroupShuffleSplit(n_splits=1, test_size=config.held_out, random_state=config.split_seed)
    _, chosen = next(splitter.split(groups, groups=groups))
    held_out = set(groups[chosen].tolist())
    for example in examples:
        if (_hash(words_of(example.context)) in held_out) == (config.part == "held_out"):
            yield example


def words_of(text: str) -> list[str]:
    """The words of a text without case, marks and white space."""
    return _WORD.findall(text.lower())


def _hash(words: Iterable[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
