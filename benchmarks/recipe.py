"""The training step, and the evaluation, as the published recipe does them, for comparison.

float32 (on CUDA with TF32); each batch padded to the maximum lengths of the stage; vocabulary logits of every context position,
which nobody reads, and of every position of the conversation, labelled or not; one sample a micro-batch, with a synchronisation
after each; one question after the other, whose context is encoded again for each; PyTorch's fused attention, in the M2P transformer
too; each linear wears its LoRA by itself, and an update is a tensor of its own that is added to another (`as_published`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from machine import tf32
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

from shine import m2p
from shine.backbone import Backbone
from shine.chat import IGNORE, token_ids
from shine.data.batching import pad_left
from shine.data.samples import Sample
from shine.evaluation.methods import Asked, Shine, Speaker
from shine.flops import training_flops
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA
from shine.wearing import LayerLoRA

FARTHEST, FARTHEST_IN_FLOAT32 = 0.25, 0.03
"""What bfloat16 may change of an adapter, relative to its norm (a cosine of 0.97), and what TF32 may, of whose products each is
rounded an eighth as much; a CPU's float32 changes less than a thousandth.
"""


def compare_adapters(theirs: LoRA, *, ours: LoRA, exact: LoRA) -> str:
    """Say how far ours is from the recipe's adapter of the same context, as it is timed and in float32; more than rounding ends the
    program.
    """
    away, exactly = theirs.distance(ours), theirs.distance(exact)
    if not (away <= FARTHEST and exactly <= FARTHEST_IN_FLOAT32):
        raise SystemExit(
            f"the two ways do not compute the same: adapters {away:.1%} apart, in float32 {exactly:.4%}: more than rounding does"
        )
    return f"adapters {away:.1%} apart, in float32 {exactly:.4%}"


def recipe_step(
    hypernetwork: Hypernetwork,
    backbone: Backbone,
    samples: Sequence[Sample],
    *,
    optimizer: torch.optim.Optimizer,
    context_length: int,
    conversation_length: int,
    clip: float = 1.0,
) -> float:
    """One optimizer step; returns the mean loss a label.

    Args:
        backbone: in float32.
        context_length: to which contexts are padded.
        conversation_length: to which conversations are padded.
    """
    labels = sum(sample.label_count for sample in samples)
    total = 0.0
    optimizer.zero_grad()
    with as_published():
        for sample in samples:
            loss = recipe_loss(
                hypernetwork, backbone, sample, context_length=context_length, conversation_length=conversation_length
            )
            (loss / labels).backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(hypernetwork.parameters(), clip)
        optimizer.step()
    return total / labels


def recipe_loss(
    hypernetwork: Hypernetwork, backbone: Backbone, sample: Sample, *, context_length: int, conversation_length: int
) -> Tensor:
    """Sum of the losses of one sample's labels."""
    input_ids, input_mask = _padded(sample.input_ids, conversation_length, value=0, device=backbone.device)
    targets, _ = _padded(sample.labels, conversation_length, value=IGNORE, device=backbone.device)
    lora = recipe_lora(hypernetwork, backbone, sample.context_ids, context_length=context_length)
    with backbone.wearing(lora):
        logits = backbone.model(input_ids=input_ids, attention_mask=input_mask, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], targets[0, 1:], ignore_index=IGNORE, reduction="sum")


def recipe_lora(hypernetwork: Hypernetwork, backbone: Backbone, context: Sequence[int], *, context_length: int) -> LoRA:
    """The adapter of one context, padded to the maximum, with logits that nobody reads."""
    ids, mask = _padded(context, context_length, value=0, device=backbone.device)
    with unread_logits(backbone):
        return hypernetwork(backbone, ids, mask)


class RecipeShine(Shine):
    """SHINE as the published evaluation runs it; it prepares one context at a time.

    Args:
        speaker: of a backbone in float32.
        context_length: to which contexts are padded.
    """

    def __init__(self, name: str, speaker: Speaker, hypernetwork: Hypernetwork, *, context_length: int) -> None:
        super().__init__(name, speaker, hypernetwork)
        self.context_length = context_length

    def adapters(self) -> LoRA:
        (example,) = self.examples
        context = token_ids(self.speaker.tokenizer, example.context)
        with as_published():
            return recipe_lora(self.hypernetwork, self.speaker.backbone, context, context_length=self.context_length)

    def answer_ids(self, asked: Sequence[Asked], *, max_new_tokens: int, batch_size: int) -> list[list[int]]:
        with as_published():
            return super().answer_ids(asked, max_new_tokens=max_new_tokens, batch_size=batch_size)


def recipe_flops(backbone: Backbone, hypernetwork: Hypernetwork, *, context_length: int, conversation_length: int) -> float:
    """Arithmetic of the recipe's step on one sample: padding and unread logits included."""
    lengths = {"read": context_length, "answered": conversation_length, "labels": conversation_length}
    unread = 2 * (context_length + hypernetwork.memory_tokens.shape[0]) * backbone.vocabulary_size * backbone.hidden_size
    return training_flops(backbone, hypernetwork, **lengths, recomputed=False) + unread


class LinearLoRA(LayerLoRA):
    """Each linear by itself: its ``A``, its ``B``, and the update added as autograd has it."""

    def add(self, path: str, _group: tuple[str, ...], x: Tensor, output: Tensor) -> Tensor:
        """``output + (x A) B`` for one adapter."""
        a, b = (factor.to(x.dtype) for factor in self._lora[path])
        return output + torch.matmul(torch.matmul(x, a), b)


@contextmanager
def as_published() -> Iterator[None]:
    """Inside, the backbone wears each LoRA linear by linear, the M2P transformer attends by PyTorch's fused attention, and the
    products of a GPU are TF32."""
    with tf32(), patch("shine.backbone.LayerLoRA", LinearLoRA), patch.object(m2p, "mix", F.scaled_dot_product_attention):
        yield


@contextmanager
def unread_logits(backbone: Backbone) -> Iterator[None]:
    """Project whatever leaves the backbone onto the vocabulary, as calling the whole model does."""

    def project(_module: nn.Module, _args: object, output: BaseModelOutputWithPast) -> None:
        assert output.last_hidden_state is not None
        backbone.logits(output.last_hidden_state)

    handle = backbone.model.base_model.register_forward_hook(project)
    try:
        yield
    finally:
        handle.remove()


def _padded(row: Sequence[int], width: int, *, value: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    ids, mask = pad_left([row], value=value, multiple=width)
    return ids.to(device), None if mask is None else mask.to(device)
