"""A backbone as a run wants it: found, loaded, on its device, with a tokenizer that knows the task tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from shine import attention
from shine.backbone import Backbone
from shine.chat import prepare_tokenizer
from shine.config import BackboneConfig
from shine.devices import find_device, room, slow_at_bfloat16
from shine.pretrained import count_parameters, first_line, load_model, load_tokenizer
from shine.zoo import FETCHED, SHIPPED, download_command, resolve


def load_backbone(
    config: BackboneConfig, *, targets: Sequence[str], in_host_memory: bool = False
) -> tuple[Backbone, PreTrainedTokenizerBase]:
    """The frozen model on its device and its tokenizer, which knows the task tokens.

    Under ``torchrun`` each rank takes the CUDA device of its ``LOCAL_RANK``.

    Args:
        config: which model, and how it is held.
        targets: names of the linears that LoRAs touch.
        in_host_memory: leave the weights there, as they are to be used on the device: the caller brings them.

    Raises:
        ValueError: the model is not there, is incomplete or corrupt, or does not fit the configuration; with the remedy.
    """
    device = find_device(config.device)
    path = resolve(config.path)
    dtype = getattr(torch, with_dtype(config).dtype)
    with _told(config, path):
        model = load_model(path, dtype=dtype, attn_implementation=_attention(config.attention, device))
        tokenizer = load_tokenizer(path)
    model = model if in_host_memory else model.to(device)
    backbone = Backbone(model, targets=targets, activation_checkpointing=config.activation_checkpointing)
    prepare_tokenizer(tokenizer, config.task_tokens, embedding_rows=backbone.vocabulary_size)
    return backbone, tokenizer


def with_dtype(config: BackboneConfig, *, ranks: int = 1) -> BackboneConfig:
    """The configuration with the type that ``backbone.dtype=auto`` means on its device.

    That is bfloat16, but float32 on a device that multiplies bfloat16 slowly, where the weights then take no more than half of
    its memory.

    Args:
        config: which model, and how it is held.
        ranks: how many of this machine hold one; if they are to hold the same, one of them asks for all.

    Raises:
        ValueError: there is no such device, or the model is not there; with the remedy.
    """
    if config.dtype != "auto":
        return config
    device = find_device(config.device)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    if slow_at_bfloat16(device):
        path = resolve(config.path)
        with _told(config, path):
            weights = count_parameters(path) * torch.float32.itemsize
        if weights <= room(device, ranks=ranks) / 2:
            dtype = "float32"
    return replace(config, dtype=dtype)


@contextmanager
def _told(config: BackboneConfig, path: str) -> Iterator[None]:
    """What goes wrong with a model's files, with what to do about it."""
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and transformers raise anything, bare Exception included
        raise ValueError(f"cannot load backbone {config.path}: {first_line(error)}; {_load_remedy(config, path)}") from error


def _attention(name: str, device: torch.device) -> str:
    attention.register()
    if name != "auto":
        return name
    return attention.best_on(device)


def variant_name(path: str, backbone: Backbone) -> str | None:
    """What was done to the weights of a model since it was trained, as far as it can be known; ``None`` for nothing.

    ``Q4_1, dequantised`` of a model that SHINE fetched as GGUF; the method of a model that is held quantised.
    """
    if path in FETCHED:
        return f"{PurePosixPath(FETCHED[path].member).stem.rpartition('.')[2]}, dequantised"
    quantised = getattr(backbone.model.config, "quantization_config", None)
    if quantised is None:
        return None
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    return f"quantised: {getattr(method, 'value', method)}"


def _load_remedy(config: BackboneConfig, path: str) -> str:
    if config.attention not in ("auto", "sdpa", attention.BLOCKS, attention.FUSED):
        return f"install what attention {config.attention!r} needs, or set backbone.attention=auto"
    if config.path in FETCHED:
        remedy = f"delete {path} and run `shine fetch {config.path}`"
    elif config.path in SHIPPED:
        remedy = "install SHINE again"
    elif Path(path).is_dir():
        remedy = f"a causal LM's config.json, safetensors and tokenizer belong there: `{download_command(path)}`"
    else:
        folder = f"models/{path.rsplit('/', 1)[-1]}"
        remedy = f"check name and network, or `hf download {path} --local-dir {folder}` and set backbone.path={folder}"
    return remedy
