"""How much arithmetic a pass is, in FLOPs; a multiplication with its addition is two.

A linear of ``N`` weights costs ``2 N`` a token forward, ``2 N`` for the gradient of its input and ``2 N`` for that of its weights:
4 N a token in training where it is frozen, 6 N where it is trained. Attention counts its scores and its mixture on one side of the
diagonal. The attention of the M2P transformer, norms, activations, softmax and embeddings are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shine.backbone import Backbone
from shine.hypernetwork import Hypernetwork


def training_flops(
    backbone: Backbone, hypernetwork: Hypernetwork, *, read: int, answered: int, labels: int, recomputed: bool = True
) -> float:
    """A training step on one sample.

    Args:
        read: context tokens.
        answered: tokens of the conversation.
        labels: those of them that are learned; only they meet the vocabulary.
        recomputed: with the second forward pass of activation checkpointing, where that is on; without it, what is of use.
    """
    memory = hypernetwork.memory_tokens.shape[0]
    again = 2 if backbone.activation_checkpointing and recomputed else 0
    linears = (4 + again) * _weights(backbone.layers) * (read + memory + answered)
    meta = (6 + again) * (read + memory) * sum(parameter.numel() for parameter in hypernetwork.meta_lora.parameters())
    generated = (6 + again) * answered * adapter_parameters(backbone, hypernetwork.layout.rank)
    attention = (6 + again) * _attention(backbone) * ((read + memory) ** 2 + answered**2)
    return linears + meta + generated + attention + 4 * labels * _vocabulary(backbone) + 3 * _m2p(backbone, hypernetwork)


def encoding_flops(backbone: Backbone, hypernetwork: Hypernetwork, *, read: int) -> float:
    """Making the LoRA of one context of ``read`` tokens."""
    tokens = read + hypernetwork.memory_tokens.shape[0]
    meta = 2 * tokens * sum(parameter.numel() for parameter in hypernetwork.meta_lora.parameters())
    return forward_flops(backbone, tokens=tokens, predicted=0) + meta + _m2p(backbone, hypernetwork)


def forward_flops(backbone: Backbone, *, tokens: int, predicted: int) -> float:
    """The plain model on one sequence, with vocabulary logits of the ``predicted`` positions."""
    linears = 2 * _weights(backbone.layers) * tokens
    return linears + 2 * _attention(backbone) * tokens**2 + 2 * predicted * _vocabulary(backbone)


def answering_flops(backbone: Backbone, *, prompt: int, new: int, rank: int) -> float:
    """Writing ``new`` tokens after ``prompt`` ones with a KV cache, under a LoRA of ``rank`` (zero: without one).

    The last token written is not read.
    """
    tokens = prompt + new - 1
    return forward_flops(backbone, tokens=tokens, predicted=new) + 2 * tokens * adapter_parameters(backbone, rank)


def fine_tuning_flops(backbone: Backbone, *, tokens: int, predicted: int, rank: int) -> float:
    """A training step of an ordinary LoRA of ``rank`` on one sequence of the frozen model."""
    linears = (4 * _weights(backbone.layers) + 6 * adapter_parameters(backbone, rank)) * tokens
    return linears + 6 * _attention(backbone) * tokens**2 + 4 * predicted * _vocabulary(backbone)


def adapter_parameters(backbone: Backbone, rank: int) -> int:
    """Values of a LoRA of ``rank`` for every target linear of the backbone."""
    return sum(shape.parameters(rank) for row in backbone.linear_shapes for shape in row)


def _weights(modules: Iterable[nn.Module]) -> int:
    return sum(m.weight.numel() for module in modules for m in module.modules() if isinstance(m, nn.Linear))


def _attention(backbone: Backbone) -> int:
    """Multiplied with the square of the length: a forward pass takes two of it."""
    config = backbone.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return len(backbone.linear_shapes) * config.num_attention_heads * head


def _vocabulary(backbone: Backbone) -> int:
    return backbone.vocabulary_size * backbone.hidden_size


def _m2p(backbone: Backbone, hypernetwork: Hypernetwork) -> int:
    """A forward pass of the M2P transformer over every memory state."""
    return 2 * len(backbone.linear_shapes) * hypernetwork.memory_tokens.shape[0] * _weights(hypernetwork.m2p.layers)
