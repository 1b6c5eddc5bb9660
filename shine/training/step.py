"""One optimizer step, and the loss it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from shine.backbone import Backbone
from shine.data.batching import Batch, chunks, collate
from shine.data.samples import Sample
from shine.training.distributed import Ranks


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    Attributes:
        loss: mean loss a label.
        gradient_norm: before clipping; not finite when the step was skipped.
        tokens: context and conversation tokens, padding not counted.
        skipped: the gradient was not finite, so no parameter changed.
    """

    loss: float
    gradient_norm: float
    tokens: int
    skipped: bool


def label_losses(hypernetwork: nn.Module, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of each label ``[N]``, float32, and whether the greedy choice was right ``[N]``, the contexts seen as LoRA only."""
    lora = hypernetwork(backbone, batch.context_ids, batch.context_mask)
    logits = backbone.label_logits(batch.input_ids, batch.input_mask, label_positions=batch.label_positions, lora=lora)
    return F.cross_entropy(logits, batch.label_ids, reduction="none"), logits.detach().argmax(-1) == batch.label_ids


def training_step(
    hypernetwork: nn.Module,
    backbone: Backbone,
    samples: Sequence[Sample],
    *,
    optimizer: torch.optim.Optimizer,
    micro_batch_size: int,
    clip: float,
    pad_id: int,
    ranks: Ranks,
) -> StepResult:
    """One optimizer step on a global batch, of which this rank computes its share.

    Every rank holds the whole list of samples, so each knows the global number of labels before its first backward: the loss is
    the sum over all labels of all ranks and micro-batches divided by that number, however they are spread.

    Args:
        hypernetwork: itself, or wrapped in DDP.
        samples: the global batch; its size is a multiple of ``ranks.size * micro_batch_size``.
    """
    labels = sum(sample.label_count for sample in samples)
    micro_batches = chunks(samples[ranks.rank :: ranks.size], micro_batch_size)
    loss_sum = torch.zeros((), device=backbone.device)
    optimizer.zero_grad(set_to_none=True)
    for index, micro_batch in enumerate(micro_batches):
        batch = collate(micro_batch, pad_id=pad_id).to(backbone.device)
        last = index + 1 == len(micro_batches)
        with nullcontext() if last or not isinstance(hypernetwork, DistributedDataParallel) else hypernetwork.no_sync():
            losses, _ = label_losses(hypernetwork, backbone, batch)
            # DDP takes the mean over ranks, the loss is a sum over them.
            (losses.sum() * (ranks.size / labels)).backward()
        loss_sum += losses.detach().sum()
    norm = nn.utils.clip_grad_norm_(hypernetwork.parameters(), clip)
    # The norm is of the reduced gradient, equal on every rank: all of them take the same branch.
    skipped = not bool(norm.isfinite())
    if not skipped:
        optimizer.step()
    return StepResult(float(ranks.sum(loss_sum)) / labels, float(norm), sum(sample.tokens for sample in samples), skipped)
