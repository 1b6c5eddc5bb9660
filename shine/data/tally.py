"""What could not be used or did not fit, counted so that nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from shine.data.examples import Example


@dataclass
class Tally:
    """Counts of samples, of what was cut from them, and of what was skipped, with the first of each reason."""

    samples: int = 0
    contexts_cut: int = 0
    context_tokens_dropped: int = 0
    conversations_cut: int = 0
    conversation_tokens_dropped: int = 0
    texts_split: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, example: str) -> None:
        """Count an example that could not be used; the first of each reason is named."""
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, example)

    def add(self, *, context_dropped: int = 0, conversation_dropped: int = 0) -> None:
        """Count a sample and how many tokens of it did not fit."""
        self.samples += 1
        self.contexts_cut += context_dropped > 0
        self.context_tokens_dropped += context_dropped
        self.conversations_cut += conversation_dropped > 0
        self.conversation_tokens_dropped += conversation_dropped

    def state(self) -> dict[str, Any]:
        """Its fields as plain values, which JSON can hold."""
        # Not dataclasses.asdict, which counts a Counter's pairs.
        return {f.name: dict(v) if isinstance(v := getattr(self, f.name), dict) else v for f in fields(self)}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Tally:
        """The tally that `state` came from."""
        return Tally(**{**state, "skipped": Counter(state["skipped"]), "first_skipped": dict(state["first_skipped"])})

    def __str__(self) -> str:
        text = (
            f"{self.samples:,} samples: {self.contexts_cut:,} contexts cut ({self.context_tokens_dropped:,} tokens), "
            f"{self.conversations_cut:,} conversations cut ({self.conversation_tokens_dropped:,} tokens)"
        )
        if self.texts_split:
            text += f", {self.texts_split:,} long texts split into pieces that fit"
        return text + "".join(
            f", {count:,} skipped: {reason} (first {self.first_skipped[reason]})" for reason, count in sorted(self.skipped.items())
        )


def answerable(examples: Iterable[Example], tally: Tally) -> Iterator[Example]:
    """Examples with a context and a question that has an answer; what is left out is counted."""
    for example in examples:
        turns = tuple(turn for turn in example.turns if turn.answers)
        for _ in range(len(example.turns) - len(turns)):
            tally.skip("question without an answer", example.id)
        if not example.context.strip():
            tally.skip("empty context", example.id)
        elif turns:
            yield replace(example, turns=turns)
        elif not example.turns:
            tally.skip("no question", example.id)
