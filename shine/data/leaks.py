"""The search for what will be scored in what is learned: whole, inside a longer text, or nearly."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from shine.config import SourceConfig
from shine.data.sources import read_named, words
from shine.data.splits import words_of
from shine.data.tally import Tally, answerable

RUN = 4
"""Words in a row that two texts must share to have something in common."""
SKETCH = 512
"""The most runs that stand for a context, so that memory is bounded: a sample of its runs, the same one wherever they occur."""
OF_PARAGRAPHS = ("hotpotqa", "musique", "2wiki", "msmarco")
"""Kinds of sources whose contexts are paragraphs that a search or a writer put together, a blank line between them."""
LEAST_WORDS = 30
"""Of a paragraph that is looked for by itself; what is shorter may share as much by chance."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """A context to be scored that training has, or nearly: which training context holds how much of it (0 to 1)."""

    scored: str
    trained: str
    share: float


class LeakCheck:
    """Which contexts to be scored stand in training data, whole or nearly.

    A context counts as seen where one training context holds at least ``threshold`` of its runs of four words, wherever they stand
    in it: a passage inside a longer text is found, and so is one whose sentences were put in another order, that was cut in half,
    or of which every eighth word was changed. Case, marks and white space do not count. Contexts of fewer than four words are
    compared whole. Of a context of more than 512 runs the share is that of a sample (standard deviation at most 0.022).

    Training contexts stream by; memory is about 10 kB a context to be scored.

    Args:
        scored: names and texts of the contexts that will be scored; names need not differ.
        threshold: above 0, at most 1. Unrelated articles share up to 0.12 of their runs, chapters of one book up to 0.2, a copy in
            which every eighth word was changed half of them: 0.4 tells them apart.

    Attributes:
        trained: how many training contexts were looked at.
        scored: how many contexts are to be scored.
    """

    def __init__(self, scored: Iterable[tuple[str, str]], *, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold}: a share above 0, at most 1")
        self.threshold, self.trained = threshold, 0
        self._names: list[str] = []
        sketches = [np.empty(0, np.uint64)]
        for name, context in scored:
            self._names.append(name)
            # The smallest hashes: a fair sample, for they have nothing to do with what the words say.
            sketches.append(_runs(context)[:SKETCH].copy())
        self.scored = len(self._names)
        self._sizes = np.array([len(sketch) for sketch in sketches[1:]], dtype=np.int64)
        hashes = np.concatenate(sketches)
        order = np.argsort(hashes, kind="stable")
        self._owners = np.repeat(np.arange(self.scored, dtype=np.int32), self._sizes)[order]
        self._hashes, begins = np.unique(hashes[order], return_index=True)
        self._begins = np.append(begins, len(order))
        self._best: dict[int, Overlap] = {}

    @property
    def overlaps(self) -> list[Overlap]:
        """For each context found, the training context that holds most of it, the largest share first."""
        return sorted(self._best.values(), key=lambda overlap: -overlap.share)

    def train(self, name: str, context: str) -> None:
        """Look at a context that will be learned."""
        self.trained += 1
        runs = _runs(context)
        places = np.searchsorted(self._hashes, runs)
        inside = places < len(self._hashes)
        hits = places[inside][self._hashes[places[inside]] == runs[inside]]
        if not len(hits):
            return
        owners = np.concatenate([self._owners[self._begins[hit] : self._begins[hit + 1]] for hit in hits])
        found, counts = np.unique(owners, return_counts=True)
        shares = counts / self._sizes[found]
        for scored, share in zip(found.tolist(), shares.tolist(), strict=True):
            if share >= self.threshold and (scored not in self._best or share > self._best[scored].share):
                self._best[scored] = Overlap(self._names[scored], name, share)


def _runs(text: str) -> np.ndarray:
    """Hashes of the different runs of words in a text, ``[N]``, in ascending order; the same in every process."""
    # Ligatures, full-width letters and the like as what they stand for.
    codes = np.array([_code(word) for word in words_of(unicodedata.normalize("NFKC", text))], dtype=np.uint64)
    if not len(codes):
        return codes
    width = min(RUN, len(codes))
    hashes = np.zeros(len(codes) - width + 1, dtype=np.uint64)
    for place in range(width):
        hashes = hashes * _MULTIPLIER + codes[place : place + len(hashes)]
    return np.unique(hashes)


@lru_cache(maxsize=1 << 17)
def _code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def learned_contexts(
    sources: Mapping[str, SourceConfig], place: str, *, tokens: Callable[[str], int] = words, questions: bool = False
) -> Iterator[tuple[str, str]]:
    """Names and texts of all contexts that training on these sources learns.

    Args:
        place: where the sources stand, for names and messages.
        tokens: how long a text is, for sources that join or cut contexts.
        questions: what has no question with an answer is not learned.

    Raises:
        ValueError: a source cannot be read.
    """
    for name, source in sources.items():
        examples = read_named({name: source}, place, tokens=tokens)
        for example in answerable(examples, Tally()) if questions else examples:
            yield f"{place}.{name} {example.id}", example.context


def scored_contexts(
    sources: Mapping[str, SourceConfig], place: str, *, tokens: Callable[[str], int] = words, questions: bool = False
) -> Iterator[tuple[str, str]]:
    """Likewise those that are asked about: of passages put among others (``pad_to``) the passage itself, not the others.

    Within a long context even a whole copy of the passage would be a small share. So would one paragraph of the ten that a
    question comes with: where contexts are several paragraphs, each of thirty words and more stands for itself too.
    """
    for name, source in sources.items():
        if source.options.get("pad_to") is not None:
            source = replace(source, options={**source.options, "pad_to": None})
        for label, context in learned_contexts({name: source}, place, tokens=tokens, questions=questions):
            yield label, context
            paragraphs = context.split("\n\n") if source.kind in OF_PARAGRAPHS else ()
            for number, paragraph in enumerate(paragraphs, start=1):
                if len(words_of(paragraph)) >= LEAST_WORDS:
                    yield f"{label}, paragraph {number}", paragraph
