"""One conversation held three times: SHINE, In-Context and Only Question. What the terminal and the page share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from shine.data.examples import Example
from shine.evaluation.methods import Asked
from shine.evaluation.side_by_side import three_methods
from shine.lora import LoRA
from shine.model import Shine


@dataclass(frozen=True)
class Told:
    """What a method answered; ``cut`` where it would have gone on, and the seconds that it took."""

    method: str
    text: str
    cut: bool
    seconds: float


class SideBySide:
    """Each method with its own earlier answers."""

    def __init__(self, shine: Shine, lora: LoRA, text: str) -> None:
        """Compare ``lora`` with ``text``, the context that it was made from."""
        self.shine, self.lora = shine, lora
        self.methods = three_methods(shine)
        for method in self.methods:
            method.examples = [Example("context", text)]
        self.reset()

    @property
    def names(self) -> list[str]:
        """The methods' names, in the order in which they answer."""
        return [method.name for method in self.methods]

    def reset(self) -> None:
        """Forget what was said."""
        self.histories: dict[str, tuple[tuple[str, str], ...]] = dict.fromkeys(self.names, ())

    def ask(self, question: str, *, strength: float = 1.0, max_new_tokens: int = 256) -> Iterator[Told]:
        """The methods' answers, one after the other."""
        worn = self.lora if strength == 1 else self.lora.scale(strength)
        self.methods[0].lora = worn.to(self.shine.backbone.device, self.shine.backbone.dtype)
        for method in self.methods:
            started = time.perf_counter()
            asked = Asked(0, question, self.histories[method.name])
            (found,) = method.answer([asked], max_new_tokens=max_new_tokens, batch_size=1)
            self.histories[method.name] = (*self.histories[method.name], (question, found.text))
            yield Told(method.name, found.text, found.cut, time.perf_counter() - started)
