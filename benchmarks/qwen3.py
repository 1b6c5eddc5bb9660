"""The published shapes of Qwen3, for models with random weights or none."""

from __future__ import annotations

from transformers import Qwen3Config

SHAPES = {
    "Qwen3-0.6B": (1024, 3072, 28, 16),
    "Qwen3-1.7B": (2048, 6144, 28, 16),
    "Qwen3-8B": (4096, 12288, 36, 32),
}
"""Hidden and feed-forward size, layers, attention heads; eight heads of keys and values, heads of 128, 151,936 tokens."""


def qwen3_config(name: str) -> Qwen3Config:
    """The configuration of one of `SHAPES`."""
    hidden, feed_forward, layers, heads = SHAPES[name]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        max_position_embeddings=40_960,
        tie_word_embeddings=name != "Qwen3-8B",
    )
