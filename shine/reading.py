"""Contexts to LoRAs in batches, and one long context piece by piece within bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.chat import token_ids
from shine.data.batching import pad_left
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA
from shine.pieces import pieces


@dataclass
class Reader:
    """One call of `shine.model.Shine.encode`, whose arguments these are.

    Attributes:
        about: how many pieces there will be, as far as it can be known before.
        done: pieces read so far.
    """

    hypernetwork: Hypernetwork
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    batch_size: int
    max_rank: int | None = None
    progress: Callable[[int, int], object] | None = None
    about: int = 0
    done: int = field(default=0, init=False)

    def each(self, rows: Iterable[Sequence[int]]) -> Iterator[LoRA]:
        """The LoRA, batch one, of each row of token ids; no more than a batch of them is in memory here."""
        waiting = iter(rows)
        while batch := list(islice(waiting, self.batch_size)):
            ids, mask = pad_left(batch, value=self.tokenizer.pad_token_id)
            device = self.backbone.device
            lora = self.hypernetwork(self.backbone, ids.to(device), None if mask is None else mask.to(device))
            yield from (lora.select([index]) for index in range(len(batch)))
            self.done += len(batch)
            if self.progress is not None:
                self.progress(self.done, max(self.about, self.done))

    def whole(self, text: str, ids: Sequence[int], *, overlap: int | None) -> tuple[LoRA, int, float]:
        """The LoRA of a text, of how many pieces it is the sum, and which share of that sum it keeps.

        Args:
            ids: its tokens, as far as it is to be read; more than fit one piece are read whole in several.
        """
        if len(ids) <= self.context_length:
            rows: Iterable[Sequence[int]] = [ids]
        else:
            texts = pieces(self.tokenizer, text, limit=self.context_length, overlap=overlap)
            rows = (token_ids(self.tokenizer, piece) for piece in texts)
        before, kept = self.done, 1.0
        held: list[LoRA] = []
        bound = self.max_rank or full_rank(self.backbone)
        for lora in self.each(rows):
            held.append(lora)
            if sum(part.rank for part in held) > 2 * bound:
                joined, share = LoRA.concat(held).reduce(bound)
                held, kept = [joined], kept * share
        joined, share = LoRA.concat(held).reduce(bound)
        return joined, self.done - before, kept * share


def full_rank(backbone: Backbone) -> int:
    """The rank that holds any update of any linear."""
    return max(shape.largest_rank() for layer in backbone.linear_shapes for shape in layer)
