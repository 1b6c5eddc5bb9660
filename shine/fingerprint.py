"""Which model a hypernetwork was trained on, and which hypernetwork made a LoRA: fingerprints of shapes, tokenizers and weights."""

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
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "rope_parameters",
)
_SAMPLES = 64
_PROBE = (
    "<|im_start|>user\nIn 1987, Zoë's 3.50 € “naïve” café sold 1,024 cups;  it didn't\tclose.\r\n\n"
    "  def f(x): return x**2 != 10_000  # ΑΒΓ абв 中文字 かな عربي हिन्दी 🙂 e\u0301 ﬁ Ⅳ\n<|im_end|>\n"
)
"""What tokenizers cut differently: marks, digits, contractions, runs of spaces, line ends, case, scripts, composed characters."""


@dataclass(frozen=True)
class Fingerprint:
    """Short hashes; two models that answer alike have the same three.

    Attributes:
        config: of the architecture, its sizes, its activation function and how it encodes positions.
        tokenizer: of the vocabulary, the merges, and how a text of many kinds is cut. Not of the tokenizer's own file, which the
            versions of the libraries write differently.
        weights: of some values of every parameter, rounded to bfloat16, so that the type a model is held in does not matter. Where
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
    cuts = {"vocabulary": tokenizer.get_vocab(), "merges": _merges(tokenizer), "probe": tokenizer(_PROBE)["input_ids"]}
    return Fingerprint(config_fingerprint(model.config), _short(cuts), _short_of_weights(model.named_parameters()))


def config_fingerprint(config: PretrainedConfig) -> str:
    """The first part of a backbone's fingerprint, which needs no weights."""
    return _short(_without_none({name: getattr(config, name, None) for name in _SHAPE}))


@torch.no_grad()
def hypernetwork_fingerprint(config: HypernetworkConfig, weights: Mapping[str, Tensor]) -> str:
    """Of a hypernetwork's shape and of some values of every tensor, rounded to bfloat16: ``config-weights``.

    Args:
        weights: its ``state_dict``, or the tensors of its checkpoint in whatever type they are stored.
    """
    return f"{_short(asdict(config))}-{_short_of_weights(weights.items())}"


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend is not None else None
    # A pair is one string or two, as the version of the library has it.
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges or []]


def _without_none(value: Any) -> Any:
    """What is not set is left out by some versions, and ``None`` in others."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_none(inner) for name, inner in value.items() if inner is not None}


def _short_of_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // _SAMPLES, 1)][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
