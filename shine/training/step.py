"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shine.backbone import Backbone
from shine.data.batching import chunks, collate
from shine.data.samples import Sample
from shine.training.distillation import Teacher
from shine.training.distributed import Ranks
from shine.training.guard import Guard
from shine.training.losses import label_losses
from shine.training.optimizer import Optimizers
from shine.training.parallel import accumulating, whole


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    Attributes:
        loss: mean loss a label.
        gradient_norm: before clipping.
        tokens: context and conversation tokens, padding not counted.
        skipped: why no parameter changed; ``None`` when the step was taken.
    """

    loss: float
    gradient_norm: float
    tokens: int
    skipped: str | None


def training_step(
    hypernetwork: nn.Module,
    backbone: Backbone,
    samples: Sequence[Sample],
    *,
    optimizer: Optimizers,
    micro_batch_size: int,
    clip: float,
    pad_id: int,
    pad_to_multiple: int = 1,
    ranks: Ranks,
    guard: Guard,
    teacher: Teacher | None = None,
) -> StepResult:
    """One optimizer step on a global batch, of which this rank computes its share.

    Every rank holds the whole list of samples, so each knows the global number of labels before its first backward: the loss is
    the sum over all labels of all ranks and micro-batches divided by that number, however they are spread.

    Args:
        hypernetwork: itself, or what `shine.training.parallel.synchronised` made of it.
        samples: the global batch; its size is a multiple of ``ranks.size * micro_batch_size``.
        pad_to_multiple: both lengths of a micro-batch are padded to a multiple of this.
        guard: says whether the step is taken.
        teacher: learned from beside the labels; the loss is then the mixture.
    """
    labels = sum(sample.label_count for sample in samples)
    if micro_batch_size > 1:
        # Contexts of like length together: of samples drawn by their whole length, half of the padding goes.
        samples = sorted(samples, key=lambda sample: len(sample.context_ids))
    micro_batches = chunks(samples, micro_batch_size)[ranks.rank :: ranks.size]
    loss_sum = torch.zeros((), dtype=torch.promote_types(torch.float32, backbone.dtype), device=backbone.device)
    optimizer.zero_grad()
    for index, micro_batch in enumerate(micro_batches):
        batch = collate(micro_batch, pad_id=pad_id, multiple=pad_to_multiple).to(backbone.device)
        last = index + 1 == len(micro_batches)
        targets = None if teacher is None else teacher.targets(micro_batch, multiple=pad_to_multiple)
        with accumulating(hypernetwork, last=last):
            losses, _ = label_losses(hypernetwork, backbone, batch, targets)
            # The engines take the mean over ranks, the loss is a sum over them.
            (losses.sum() * (ranks.size / labels)).backward()
        loss_sum += losses.detach().sum()
    norm = float(whole(nn.utils.clip_grad_norm_(hypernetwork.parameters(), clip)))
    loss = float(ranks.sum(loss_sum)) / labels
    # Loss and norm are global, but nothing promises that ranks sum to the last bit alike: all take the branch of one.
    loss, norm = ranks.of_first((loss, norm), device=backbone.device)
    skipped = guard.verdict(loss, norm)
    if skipped is None:
        optimizer.step()
    return StepResult(loss, norm, sum(sample.tokens for sample in samples), skipped)
