"""The loss of labels, without ever holding the logits of all of them.

Each chunk of labels gets its logits, its losses and the gradient of its hidden states in one go. The head is frozen, so this is
the arithmetic of one pass forwards and one backwards, as with all logits at once. PyTorch's own `linear_cross_entropy` (2.13)
rounds the losses of a bfloat16 model to bfloat16, and is several times slower on a CPU (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shine.backbone import Backbone
from shine.data.batching import Batch
from shine.lora import LoRA
from shine.training.distillation import Targets


def label_losses(
    hypernetwork: nn.Module, backbone: Backbone, batch: Batch, targets: Targets | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of each label ``[N]``, float32 at least, and whether the greedy choice was right ``[N]``; contexts are LoRA only.

    Args:
        targets: what a teacher expects at the labels, of which the loss takes its share.
    """
    adapters = hypernetwork(backbone, batch.context_ids, batch.context_mask, dtype=backbone.dtype)
    return losses_under(batch.worn(adapters), backbone, batch, targets)


def losses_under(lora: LoRA, backbone: Backbone, batch: Batch, targets: Targets | None = None) -> tuple[Tensor, Tensor]:
    """`label_losses` where the adapter of each sample is there already."""
    hidden = backbone.label_hidden(batch.input_ids, batch.input_mask, label_positions=batch.label_positions, lora=lora)
    chunks = backbone.label_chunks(hidden)
    if torch.is_grad_enabled() and hidden.requires_grad:
        losses, right = _InChunks.apply(hidden, backbone, batch.label_ids, targets, chunks)
        return losses, right
    parts = [_losses(hidden[chunk], backbone, batch.label_ids[chunk], _of(targets, chunk)) for chunk in chunks]
    losses, right = (torch.cat(each) for each in zip(*parts, strict=True))
    return losses, right


def _of(targets: Targets | None, chunk: slice) -> Targets | None:
    return None if targets is None else targets[chunk]


def _losses(hidden: Tensor, backbone: Backbone, labels: Tensor, targets: Targets | None) -> tuple[Tensor, Tensor]:
    logits = backbone.wide_logits(hidden)
    losses = F.cross_entropy(logits, labels, reduction="none")
    if targets is not None:
        losses = targets.mixed_into(losses, logits)
    return losses, logits.detach().argmax(-1) == labels


class _InChunks(torch.autograd.Function):
    """`_losses` of one chunk after the other, each with the gradient of its hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, backbone: Backbone, labels: Tensor, targets: Targets | None, chunks: Sequence[slice]
    ) -> tuple[Tensor, Tensor]:
        slopes, parts = torch.empty_like(hidden), []
        for chunk in chunks:
            with torch.enable_grad():
                states = hidden[chunk].detach().requires_grad_()
                # Not the leaf: FlopCounterMode hooks what goes into modules, and autograd.grad refuses hooks of leaves.
                losses, right = _losses(states.view_as(states), backbone, labels[chunk], _of(targets, chunk))
                [slopes[chunk]] = torch.autograd.grad(losses.sum(), states)
            parts.append((losses.detach(), right))
        ctx.save_for_backward(slopes)
        losses, right = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor, _of_right: Tensor) -> tuple[Tensor | None, ...]:
        [slopes] = ctx.saved_tensors
        # In the losses' type: the share of a label, rounded to bfloat16, would change the learning rate.
        return (slopes.to(of_losses.dtype) * of_losses[:, None]).to(slopes.dtype), None, None, None, None
