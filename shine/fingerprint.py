"""Which model a hypernetwork was trained on, and which hypernetwork made a LoRA: fingerprints of shapes, vocabulary and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shine.config import HypernetworkConfig

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

    @classmethod
    def parse(cls, text: str) -> Fingerprint:
        """What ``str`` made of a fingerprint."""
        config, tokenizer, weights = text.split("-")
        return cls(config, tokenizer, weights)

    def is_variant_of(self, other: Fingerprint) -> bool:
        """The same architecture and vocabulary with other weights."""
        return (self.config, self.tokenizer) == (other.config, other.tokenizer) and self.weights != other.weights


@torch.no_grad()
def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """The fingerprint of a model and its tokenizer as they are in memory."""
    matrices = ((name, parameter) for name, parameter in model.named_parameters() if parameter.dim() == 2)
    return Fingerprint(config_fingerprint(model.config), _short(sorted(tokenizer.get_vocab().items())), _short_of_weights(matrices))


def config_fingerprint(config: PretrainedConfig) -> str:
    """The first part of a backbone's fingerprint, which needs no weights."""
    values = {name: getattr(config, name, None) for name in _SHAPE}
    values["rope_theta"] = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    return _short(values)


@torch.no_grad()
def hypernetwork_fingerprint(config: HypernetworkConfig, weights: Mapping[str, Tensor]) -> str:
    """Of a hypernetwork's shape and of some values of every tensor, rounded to bfloat16: ``config-weights``.

    Args:
        weights: its ``state_dict``, or the tensors of its checkpoint in whatever type they are stored.
    """
    return f"{_short(asdict(config))}-{_short_of_weights(weights.items())}"


def _short_of_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // _SAMPLES, 1)][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
