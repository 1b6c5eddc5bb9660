"""What the benchmarks measure: a backbone and its hypernetwork in two precisions, and examples of stated lengths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from machine import configured, release
from qwen3 import SHAPES, qwen3_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shine import attention
from shine.backbone import Backbone
from shine.chat import IGNORE
from shine.config import HypernetworkConfig, TrainConfig
from shine.data.samples import Sample
from shine.devices import find_device, slow_at_bfloat16
from shine.host_memory import keep_freed_memory
from shine.hypernetwork import Hypernetwork
from shine.pretrained import load_model, without_progress_bars
from shine.zoo import resolve

WITH_WEIGHTS = {
    "smollm2-135m": ("experiment=smollm2", "hypernetwork=default", "hypernetwork.rank=6", "hypernetwork.meta_rank=32"),
    "cpu-world": ("experiment=cpu_world",),
}
"""Models with weights, and what configures their hypernetwork: SmolLM2's is the shape that the published code was timed at."""
QWEN3 = {name.lower(): name for name in SHAPES}
"""Shapes that get random weights on the device: nothing measured here depends on what they are."""
MODELS = (*WITH_WEIGHTS, *QWEN3)


@dataclass(frozen=True)
class Subject:
    """A backbone in the type of its device, the same weights in float32 once they are asked for, and one hypernetwork for both.

    Attributes:
        plain: makes the backbone's model without hooks, on the same weights.
    """

    name: str
    backbone: Backbone
    hypernetwork: Hypernetwork
    device: torch.device
    plain: Callable[[], PreTrainedModel]

    @property
    def dtype(self) -> str:
        """In which ours computes."""
        return str(self.backbone.dtype).removeprefix("torch.")

    @functools.cached_property
    def precise(self) -> Backbone:
        """The weights in float32, for the recipe's way. Made on the device by the first who asks, and not sooner: what has run
        before has had the memory to itself.

        Raises:
            torch.OutOfMemoryError: they do not fit beside the rest.
        """
        model = _same_weights(self.plain(), dtype=torch.float32)
        model.set_attn_implementation(attention.FUSED)
        backbone = Backbone(model, targets=self.hypernetwork.config.targets)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                # As transformers has it, not by the operator that a backbone takes.
                module.__dict__.pop("forward", None)
        return backbone

    def forget_precise(self) -> None:
        """Let the float32 weights go, where nobody else holds them."""
        self.__dict__.pop("precise", None)
        release(self.device)


DTYPES = ("auto", "bfloat16", "float32")


def load(name: str, *, device: str = "auto", dtype: str = "auto", activation_checkpointing: bool = False) -> Subject:
    """One of `MODELS`.

    Args:
        device: ``auto`` takes CUDA where there is some.
        dtype: one of `DTYPES`; ``auto`` is bfloat16, or float32 on a device that is slow at it.
    """
    place = find_device(device)
    keep_freed_memory(place)
    config = configured(TrainConfig, "train", [*WITH_WEIGHTS.get(name, (f"experiment={name}",)), "output=none"])
    attention.register()
    if place.type == "cuda" and dtype == "float32":
        raise SystemExit("--dtype float32 is for a CPU: the float32 rate measured on a GPU is TF32's, which ours does not take")
    if dtype == "auto":
        dtype = "float32" if slow_at_bfloat16(place) else "bfloat16"
    held = getattr(torch, dtype)
    with without_progress_bars():
        model: Any = _with_weights(name, held) if name in WITH_WEIGHTS else _with_random_weights(name, place, held)
    # Not to another type: the frequencies of the rotary embedding are float32 in every model.
    model = model.to(place)
    model.set_attn_implementation(attention.best_on(place))
    plain = functools.partial(_same_weights, _same_weights(model.eval().requires_grad_(False)))
    targets = config.hypernetwork.targets
    backbone = Backbone(model, targets=targets, activation_checkpointing=activation_checkpointing)
    return Subject(name, backbone, _hypernetwork(config.hypernetwork, backbone), place, plain)


@contextmanager
def attending(backbone: Backbone, implementation: str) -> Iterator[None]:
    """Inside, the backbone attends by this ``attn_implementation``."""
    model = backbone.model
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def examples(lengths: Sequence[tuple[int, int, int]], *, vocabulary_size: int, of_each: int = 1) -> list[Sample]:
    """Random tokens of these lengths: of the context, of the conversation, and how many tokens at its end are labels.

    Args:
        of_each: conversations about each context.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary_size, (count,), generator=generator).tolist()

    drawn = []
    for number, (context, conversation, labels) in enumerate(lengths):
        read = draw(context)
        for question in range(of_each):
            ids = draw(conversation)
            marks = [IGNORE] * (conversation - labels) + ids[conversation - labels :]
            drawn.append(Sample(id=f"{number}/{question}", context_ids=read, input_ids=ids, labels=marks))
    return drawn


def tokens(rows: int, length: int, backbone: Backbone) -> Tensor:
    """Random token ids ``[rows, length]`` on the backbone's device."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(backbone.vocabulary_size, (rows, length), generator=generator).to(backbone.device)


def _with_weights(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = load_model(resolve(name), dtype=dtype)
    return model


def _with_random_weights(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = qwen3_config(QWEN3[name])
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _same_weights(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of its own on the same weights, or on copies of them in another type; buffers are the same."""
    kept: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        given = parameter if dtype is None else nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        kept[id(parameter)] = given
    return copy.deepcopy(model, kept)


def _hypernetwork(config: HypernetworkConfig, backbone: Backbone) -> Hypernetwork:
    torch.manual_seed(0)
    with backbone.device:
        hypernetwork = Hypernetwork(config, backbone)
        # A fresh hypernetwork writes almost nothing: with B of the meta LoRA at zero, a fault in it would not show.
        for name, parameter in hypernetwork.named_parameters():
            if name.startswith("meta_lora.") and name.endswith(".B"):
                torch.nn.init.normal_(parameter, std=0.02)
    return hypernetwork
