"""The memory-to-parameter (M2P) transformer: memory states in, values of a LoRA out (paper, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shine.attention import mix


class M2PLayer(nn.Module):
    """A post-norm transformer layer whose attention runs over one axis of the memory states ``[B, L, M, H]``.

    The feed-forward half looks at each position alone, so only the attention needs to know the axis: it mixes layers
    (axis 1) or memory tokens (axis 2), and the other axis acts as a batch.
    """

    def __init__(self, hidden_size: int, *, heads: int, feed_forward: int, across_layers: bool) -> None:
        super().__init__()
        self.heads = heads
        self.across_layers = across_layers
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.up = nn.Linear(hidden_size, feed_forward)
        self.down = nn.Linear(feed_forward, hidden_size)
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-5)
        nn.init.xavier_uniform_(self.qkv.weight)
        for bias in (self.qkv.bias, self.out.bias):
            nn.init.zeros_(bias)

    def forward(self, states: Tensor) -> Tensor:
        """``[B, L, M, H] -> [B, L, M, H]``."""
        states = self.norm1(states + self._attend(states))
        return self.norm2(states + self.down(F.gelu(self.up(states))))

    def _attend(self, states: Tensor) -> Tensor:
        batch, layers, tokens, hidden = states.shape
        # The linears see the states as they lie: of a transposed tensor torch would copy the weight for every row.
        qkv = self.qkv(states).view(batch, layers, tokens, 3, self.heads, hidden // self.heads)
        # [3, B, the other axis, heads, the mixed axis, D]
        qkv = qkv.permute(3, 0, 2, 4, 1, 5) if self.across_layers else qkv.permute(3, 0, 1, 4, 2, 5)
        other = qkv.shape[2]
        query, key, value = qkv.flatten(1, 2)
        mixed = mix(query, key, value).unflatten(0, (batch, other))
        mixed = mixed.permute(0, 3, 1, 2, 4) if self.across_layers else mixed.permute(0, 1, 3, 2, 4)
        return self.out(mixed.reshape(batch, layers, tokens, hidden))


MEASURED = "m2p.standard."
"""How the names of what a hypernetwork's `StateStandard` measured begin: not trained, and not to be rounded."""


class StateStandard(nn.Module):
    """Takes off what memory states ``[B, L, M, H]`` have in common and brings each dimension of each layer to unit spread.

    Hidden states of a pretrained model are mostly common to all contexts, and a few of their dimensions are enormous: of
    SmolLM2-135M's memory states, untrained, 0.3 to 10 % of the variance that a layer norm leaves differs between contexts
    (docs/training_log.md). Mean and gain are measured once, before training, and stay.
    """

    mean: Tensor
    gain: Tensor

    def __init__(self, *, backbone_layers: int, memory_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(backbone_layers, memory_tokens, hidden_size))
        self.register_buffer("gain", torch.ones(backbone_layers, 1, hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """``[B, L, M, H] -> [B, L, M, H]``."""
        return (states - self.mean) * self.gain

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Take mean and gain from the states of several contexts, ``[B, L, M, H]`` each."""
        count, total, squares = (
            0,
            torch.zeros_like(self.mean, dtype=torch.float64),
            torch.zeros_like(self.mean, dtype=torch.float64),
        )
        for states in batches:
            states = states.double()
            count += len(states)
            total += states.sum(0)
            squares += states.square().sum(0)
        mean = total / count
        # Over the memory tokens together: a few contexts say little about the spread of one number.
        spread = (squares / count - mean.square()).mean(1, keepdim=True).clamp_min(0).sqrt()
        # A dimension in which the contexts do not differ is not blown up to noise.
        least = 1e-3 * spread.median(-1, keepdim=True).values
        self.mean.copy_(mean)
        self.gain.copy_(1 / spread.maximum(least).clamp_min(1e-12))


class M2PTransformer(nn.Module):
    """Layer and token embeddings, then layers that attend across backbone layers and across memory tokens in turn.

    Args:
        hidden_size: ``H`` of the backbone; the states are never projected to another width.
        backbone_layers: ``L``.
        memory_tokens: ``M``.
        layers: depth of this transformer.
        heads: attention heads; must divide ``hidden_size``.
        feed_forward: inner width of the feed-forward half.
        layers_first: whether the first layer attends across backbone layers (published) or across memory tokens.
        standardise: memory states go through `StateStandard` first (not published). The embeddings then start at N(0, 1/2)
            each, so that half of what comes in tells the contexts apart and half is the same for all.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        backbone_layers: int,
        memory_tokens: int,
        layers: int,
        heads: int,
        feed_forward: int,
        layers_first: bool,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"hypernetwork.m2p.heads={heads} does not divide the hidden size {hidden_size}: choose a divisor")
        self.standard: StateStandard | None = None
        if standardise:
            self.standard = StateStandard(backbone_layers=backbone_layers, memory_tokens=memory_tokens, hidden_size=hidden_size)
        self.layer_embedding = nn.Parameter(torch.zeros(backbone_layers, hidden_size))
        self.token_embedding = nn.Parameter(torch.zeros(memory_tokens, hidden_size))
        if standardise:
            for embedding in (self.layer_embedding, self.token_embedding):
                nn.init.normal_(embedding, std=math.sqrt(0.5))
        self.layers = nn.ModuleList(
            M2PLayer(hidden_size, heads=heads, feed_forward=feed_forward, across_layers=(index % 2 == 0) == layers_first)
            for index in range(layers)
        )

    def forward(self, memory_states: Tensor) -> Tensor:
        """``[B, L, M, H] -> [B, L, M, H]``; each layer's ``M x H`` values, read row by row, are its flat LoRA state."""
        if self.standard is not None:
            memory_states = self.standard(memory_states)
        states = memory_states + self.layer_embedding[:, None] + self.token_embedding
        for layer in self.layers:
            states = layer(states)
        return states
