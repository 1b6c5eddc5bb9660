"""A backbone as a run wants it: found, loaded, on its device, with a tokenizer that knows the task tokens."""

from __future__ import annotations

from collections.abc import Sequence
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
    try:
        dtype = getattr(torch, working_dtype(config))
        model = load_model(path, dtype=dtype, attn_implementation=_attention(config.attention, device))
        tokenizer = load_tokenizer(path)
    except Exception as error:  # safetensors, tokenizers and transformers raise anything, bare Exception included
        raise ValueError(f"cannot load backbone {config.path}: {first_line(error)}; {_load_remedy(config, path)}") from error
    model = model if in_host_memory else model.to(device)
    backbone = Backbone(model, targets=targets, activation_checkpointing=config.activation_checkpointing)
    prepare_tokenizer(tokenizer, config.task_tokens, embedding_rows=backbone.vocabulary_size)
    return backbone, tokenizer


def working_dtype(config: BackboneConfig) -> Literal["bfloat16", "float32", "float64"]:
    """The type that ``backbone.dtype`` means on its device.

    ``auto`` is bfloat16, but float32 on a device that multiplies bfloat16 slowly, where the weights then take no more than half
    of its memory.

    Raises:
        ValueError: there is no such device.
        OSError: the model that ``auto`` asks about is not there.
    """
    if config.dtype != "auto":
        return config.dtype
    device = find_device(config.device)
    if not slow_at_bfloat16(device):
        return "bfloat16"
    fits = count_parameters(resolve(config.path)) * torch.float32.itemsize <= room(device, ranks=1) / 2
    return "float32" if fits else "bfloat16"


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
