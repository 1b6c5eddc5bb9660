"""What an example is: a context and the turns asked about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """A question, the answers that count as right (the first is the one to learn), and the kind of question it is.

    Without an answer it can be neither learned nor scored: see `shine.data.samples.answerable`.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = ""

    @property
    def answer(self) -> str:
        return self.answers[0]


@dataclass(frozen=True)
class Example:
    """A context with the turns about it; ``id`` names the context in its source. Plain text has no turns."""

    id: str
    context: str
    turns: tuple[Turn, ...] = ()
