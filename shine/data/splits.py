"""Splits by context, never by question, and the check that nothing to be scored was learned."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from shine.config import SourceConfig
from shine.data.examples import Example

# A character of a script without spaces between words stands for a word.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+"
)
SHINGLE = 8
"""Words in a row that two texts must share to have something in common."""


def one_side(examples: Iterable[Example], contexts: Iterable[str], config: SourceConfig) -> Iterator[Example]:
    """The examples on the side ``config.part`` of a split by context.

    Which contexts are held out depends on the contexts that there are, the share and the seed, not on their order; all questions
    about a context, and contexts that differ in case, marks and white space only, stay together.

    Args:
        contexts: all contexts of the source, read once before the examples.

    Raises:
        ValueError: there are too few contexts to hold some out.
    """
    groups = np.array([_hash(_words(context)) for context in contexts], dtype=np.uint64)
    if len(np.unique(groups)) < 2:
        raise ValueError(f"part={config.part}: a split needs at least two different contexts; set part=all")
    splitter = GroupShuffleSplit(n_splits=1, test_size=config.held_out, random_state=config.split_seed)
    _, chosen = next(splitter.split(groups, groups=groups))
    held_out = set(groups[chosen].tolist())
    for example in examples:
        if (_hash(_words(example.context)) in held_out) == (config.part == "held_out"):
            yield example


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _hash(words: Iterable[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Overlap:
    """A context to be scored that training has, or nearly: which training context holds how much of it (0 to 1)."""

    scored: str
    trained: str
    share: float


@dataclass
class LeakCheck:
    """Which contexts to be scored stand in training data, whole or nearly.

    A context counts as seen where one training context holds at least ``threshold`` of its runs of eight words, wherever they stand
    in it: a passage inside a longer text is found, and so is one with some words changed. Contexts of fewer than eight words are
    compared whole. Memory grows with what is to be scored only; training contexts stream by.

    Attributes:
        threshold: between 0 and 1.
        trained: how many training contexts were looked at.
    """

    threshold: float = 0.5
    trained: int = 0
    _names: list[str] = field(default_factory=list, repr=False)
    _sizes: list[int] = field(default_factory=list, repr=False)
    _owners: dict[int, list[int]] = field(default_factory=dict, repr=False)
    _best: dict[int, Overlap] = field(default_factory=dict, repr=False)

    @property
    def scored(self) -> int:
        """How many contexts are to be scored."""
        return len(self._names)

    @property
    def overlaps(self) -> list[Overlap]:
        """For each context found, the training context that holds most of it, the largest share first."""
        return sorted(self._best.values(), key=lambda overlap: -overlap.share)

    def score(self, name: str, context: str) -> None:
        """Add a context that will be scored; names need not differ."""
        shingles = _shingles(context)
        for shingle in shingles:
            self._owners.setdefault(shingle, []).append(len(self._names))
        self._names.append(name)
        self._sizes.append(len(shingles))

    def train(self, name: str, context: str) -> None:
        """Look at a context that will be learned."""
        self.trained += 1
        shared = Counter(owner for shingle in _shingles(context) for owner in self._owners.get(shingle, ()))
        for scored, count in shared.items():
            share = count / self._sizes[scored]
            best = self._best.get(scored)
            if share >= self.threshold and (best is None or share > best.share):
                self._best[scored] = Overlap(self._names[scored], name, share)


def _shingles(text: str) -> set[int]:
    words = _words(text)
    # Python's own hash: it differs from process to process, but these never leave theirs.
    return {hash(tuple(words[start : start + SHINGLE])) for start in range(max(len(words) - SHINGLE + 1, 1))} if words else set()
