"""The published three-file format of a hypernetwork, read and written.

``mem_tokens.pt``, ``metanetwork.pth`` and ``metalora.pth`` and no configuration: heads, scale, layout and which attention comes
first cannot be read off the tensors and come from the experiment's configuration.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shine.m2p import MEASURED

RELEASED_FILES = ("mem_tokens.pt", "metanetwork.pth", "metalora.pth")
_RELEASED_LAYER = {
    "self_attn.in_proj_weight": "qkv.weight",
    "self_attn.in_proj_bias": "qkv.bias",
    "self_attn.out_proj.weight": "out.weight",
    "self_attn.out_proj.bias": "out.bias",
    "linear1.weight": "up.weight",
    "linear1.bias": "up.bias",
    "linear2.weight": "down.weight",
    "linear2.bias": "down.bias",
}
_RELEASED_META: dict[str, tuple[str, ...]] = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
_RELEASED_TOP = {"layer_pe": "layer_embedding", "token_pe": "token_embedding"}


def is_released(path: Path) -> bool:
    """Whether this is a directory in the published three-file format."""
    return all((path / name).exists() for name in RELEASED_FILES)


def read_released(directory: Path) -> dict[str, Tensor]:
    """The tensors of a released directory under our names. Nothing is unpickled but tensors and plain containers.

    Raises:
        ValueError: a file is damaged, or holds something else than weights.
    """
    tensors: dict[str, Tensor] = {}
    for name, rename in zip(RELEASED_FILES, (_memory_names, _network_names, _meta_names), strict=True):
        file = directory / name
        content = _unpickle_weights(file)
        try:
            found = rename(content)
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{file}: not laid out as released ({type(error).__name__}: {error}); download it again") from None
        odd = next((key for key, value in found.items() if not isinstance(value, Tensor)), None)
        if odd is not None:
            raise ValueError(f"{file}: {odd} is not a tensor but a {type(found[odd]).__name__}; download it again")
        tensors |= {key: value.detach() for key, value in found.items()}
    return tensors


def _memory_names(content: Any) -> dict[str, Any]:
    return {"memory_tokens": content}


def _network_names(content: Any) -> dict[str, Any]:
    return {"m2p." + _released_name(name): tensor for name, tensor in content.items()}


def _meta_names(content: Any) -> dict[str, Any]:
    return {
        f"meta_lora.layers.{layer}.{name}_proj.{letter}": dict(dict(dict(groups)[group])[name])[letter]
        for layer, groups in content.items()
        for group, names in _RELEASED_META.items()
        for name in names
        for letter in "AB"
    }


def _released_name(name: str) -> str:
    if not name.startswith("transformer_layers."):
        return _RELEASED_TOP.get(name, name)
    _, index, rest = name.split(".", 2)
    return f"layers.{index}.{_RELEASED_LAYER.get(rest, rest)}"


def _unpickle_weights(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file}: not a file of plain weights ({reason}); download it again from its source") from None


def write_released(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the three files; reading them again gives exactly these weights.

    Args:
        weights: the ``state_dict`` of a hypernetwork that touches all seven linears of each layer, as the format demands.

    Raises:
        ValueError: it touches others.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
    if any(name.startswith(MEASURED) for name in weights):
        raise ValueError("the published format has no place for m2p.standardise=true: keep this hypernetwork as it is")
    layers = sorted({int(name.split(".")[2]) for name in weights if name.startswith("meta_lora.")})
    wanted = {f"meta_lora.layers.{layer}.{linear}" for layer in layers for linear in _pairs()}
    if wanted != {name for name in weights if name.startswith("meta_lora.")}:
        raise ValueError(
            "the published format has all seven linears of each layer, this hypernetwork touches others: keep it as it is"
        )
    inner = {ours: theirs for theirs, ours in _RELEASED_LAYER.items()}
    top = {ours: theirs for theirs, ours in _RELEASED_TOP.items()}
    network: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in weights.items():
        if name.startswith("m2p.layers."):
            _, _, index, rest = name.split(".", 3)
            network[f"transformer_layers.{index}.{inner.get(rest, rest)}"] = tensor
        elif name.startswith("m2p."):
            rest = name.removeprefix("m2p.")
            network[top.get(rest, rest)] = tensor
    meta = {
        layer: {
            group: {
                name: {**{ab: weights[f"meta_lora.layers.{layer}.{name}_proj.{ab}"] for ab in "AB"}, "C": None} for name in names
            }
            for group, names in _RELEASED_META.items()
        }
        for layer in layers
    }
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in zip(RELEASED_FILES, (nn.Parameter(weights["memory_tokens"]), network, meta), strict=True):
        torch.save(content, directory / file)


def _pairs() -> list[str]:
    return [f"{name}_proj.{letter}" for names in _RELEASED_META.values() for name in names for letter in "AB"]
