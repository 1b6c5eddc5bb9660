"""The memory-to-parameter (M2P) transformer: memory states in, values of a LoRA out (paper, section 3)."""

from __future__ import annotations

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
    ) -> None:
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"hypernetwork.m2p.heads={heads} does not divide the hidden size {hidden_size}: choose a divisor")
        self.layer_embedding = nn.Parameter(torch.zeros(backbone_layers, hidden_size))
        self.token_embedding = nn.Parameter(torch.zeros(memory_tokens, hidden_size))
        self.layers = nn.ModuleList(
            M2PLayer(hidden_size, heads=heads, feed_forward=feed_forward, across_layers=(index % 2 == 0) == layers_first)
            for index in range(layers)
        )

    def forward(self, memory_states: Tensor) -> Tensor:
        """``[B, L, M, H] -> [B, L, M, H]``; each layer's ``M x H`` values, read row by row, are its flat LoRA state."""
        states = memory_states + self.layer_embedding[:, None] + self.token_embedding
        for layer in self.layers:
            states = layer(states)
        return states
