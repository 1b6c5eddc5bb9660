"""Which model a hypernetwork was trained on: a fingerprint of its configuration, its tokenizer and some of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_SAMPLES = 64


@dataclass(frozen=True)
class Fingerprint:
    """Short hashes; two models that answer alike have the same three.

    Attributes:
        config: of the architecture and its sizes.
        tokenizer: of the vocabulary.
        weights: of some values of every matrix, rounded to bfloat16, so that the type a model is held in does not matter. Where
            only this one differs, the other model is a variant of the same: quantised, dequantised or tuned.
    """

    config: str
    tokenizer: str
    weights: str

    def __str__(self) -> str:
        return f"{self.config}-{self.tokenizer}-{self.weights}"

    def is_variant_of(self, other: Fingerprint) -> bool:
        """The same architecture and vocabulary with other weights."""
        return (self.config, self.tokenizer) == (other.config, other.tokenizer) and self.weights != other.weights


@torch.no_grad()
def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """The fingerprint of a model and its tokenizer as they are in memory."""
    config = {name: getattr(model.config, name, None) for name in _SHAPE}
    config["rope_theta"] = (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta")
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2:
            flat = parameter.detach().flatten()
            sample = flat[:: max(flat.numel() // _SAMPLES, 1)][:_SAMPLES].to("cpu", torch.bfloat16)
            weights.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return Fingerprint(_short(config), _short(sorted(tokenizer.get_vocab().items())), weights.hexdigest()[:12])


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
