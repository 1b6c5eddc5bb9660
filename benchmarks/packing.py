"""A batch as one row without padding, to see what it would bring: not how SHINE computes.

Contexts, each with its memory tokens, follow each other in one row, and so do conversations. Positions start anew with each of
them, attention stays inside it, and each piece of a row of conversations wears an adapter of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from subject import attending
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from shine import attention
from shine.backbone import Backbone
from shine.lora import LoRA
from shine.wearing import LayerLoRA

PACKED = "packed"


@contextmanager
def packed(backbone: Backbone) -> Iterator[None]:
    """Inside, both passes of a training step over padded batches are made over rows without padding.

    Raises:
        ValueError: activations are to be computed again, by when the lengths of the row at hand are others.
    """
    if backbone.activation_checkpointing:
        raise ValueError("packed rows do not go with activation checkpointing: load the backbone without it")
    rows = _Rows(backbone)
    AttentionInterface.register(PACKED, rows.attend)
    AttentionMaskInterface.register(PACKED, lambda *_args, **_kwargs: None)
    with ExitStack() as stack:
        stack.enter_context(attending(backbone, PACKED))
        stack.enter_context(patch.object(backbone, "memory_states", rows.memory_states))
        stack.enter_context(patch.object(backbone, "hidden", rows.hidden))
        stack.enter_context(patch("shine.backbone.LayerLoRA", rows.wear))
        yield


class _Rows:
    """The two passes, and how long the pieces of the row at hand are; the backward pass does not need to know."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.lengths: list[int] = []
        self._worn: LoRA | None = None
        self._alone: list[LoRA] = []

    def memory_states(self, context_ids: Tensor, context_mask: Tensor | None, *, memory_tokens: Tensor, meta_lora: LoRA) -> Tensor:
        """As `Backbone.memory_states`."""
        backbone, count = self.backbone, memory_tokens.shape[0]
        embed = backbone.model.get_input_embeddings()
        pieces = [torch.cat([embed(ids), memory_tokens.to(backbone.dtype)]) for ids in _pieces(context_ids, context_mask)]
        self.lengths = [len(piece) for piece in pieces]
        ends = torch.tensor(self.lengths, device=context_ids.device).cumsum(0)
        places = (ends[:, None] - count + torch.arange(count, device=ends.device)).flatten()
        wearing = backbone._wearing
        # The whole row of each layer; what is not at a memory token is let go with it.
        wearing.tap, wearing.tap_tokens = [], sum(self.lengths)
        try:
            with backbone.wearing(meta_lora):
                backbone.model.base_model(inputs_embeds=torch.cat(pieces)[None], position_ids=self._positions(), use_cache=False)
            states = [state[0].index_select(0, places).unflatten(0, (len(pieces), count)) for state in wearing.tap]
        finally:
            wearing.tap = None
        return torch.stack(states, dim=1)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, *, lora: LoRA | None) -> Tensor:
        """As `Backbone.hidden`; zero at padded positions."""
        pieces = _pieces(input_ids, attention_mask)
        self.lengths = [len(piece) for piece in pieces]
        row = torch.cat(pieces)[None]
        with self.backbone.wearing(lora):
            states = self.backbone.model.base_model(input_ids=row, position_ids=self._positions(), use_cache=False)
        filled = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        found = states.last_hidden_state[0]
        spread: Tensor = found.new_zeros(filled.numel(), found.shape[-1]).index_put((filled.flatten().nonzero()[:, 0],), found)
        return spread.unflatten(0, tuple(filled.shape))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        """What transformers calls, one piece of the row after the other."""
        pieces = zip(*(states.split(self.lengths, dim=2) for states in (query, key, value)), strict=True)
        mixed = [attention.attend(q, k, v, causal=True, scale=scaling).transpose(1, 2) for q, k, v in pieces]
        return torch.cat(mixed, dim=1), None

    def wear(self, lora: LoRA) -> LayerLoRA:
        """What a layer wears: as ever where one adapter serves the whole row."""
        if lora.batch == 1:
            return LayerLoRA(lora)
        if self._worn is not lora:
            # Once for all layers of a pass.
            self._worn, self._alone = lora, [lora.select([number]) for number in range(lora.batch)]
        return _WornInPieces(lora, self._alone, self.lengths)

    def _positions(self) -> Tensor:
        device = self.backbone.device
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])[None]


class _WornInPieces(LayerLoRA):
    """Each piece of the one row wears an adapter of its own."""

    def __init__(self, lora: LoRA, alone: Sequence[LoRA], lengths: Sequence[int]) -> None:
        super().__init__(lora)
        self._lengths, self._alone = lengths, [LayerLoRA(each) for each in alone]
        self._row: Tensor | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def add(self, path: str, group: tuple[str, ...], x: Tensor, output: Tensor) -> Tensor:
        """As `LayerLoRA.add`."""
        if self._row is not x:
            # The same pieces for all linears of one input, which know by them that they share it.
            self._row, self._inputs = x, x.split(self._lengths, dim=1)
        updates = [
            torch.bmm(worn._project(path, group, given), worn._lora[path][1].to(x.dtype))
            for worn, given in zip(self._alone, self._inputs, strict=True)
        ]
        return output.add_(torch.cat(updates, dim=1))


def _pieces(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows of ``[B, T]`` without their padding."""
    return list(ids) if mask is None else [row[seen.bool()] for row, seen in zip(ids, mask, strict=True)]
