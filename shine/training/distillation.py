"""Learning from what the frozen model itself would say if it saw the context.

Beside the label stands the whole distribution of the in-context model at each position of the answer: the forward
Kullback-Leibler divergence from it, over its most likely tokens and the rest as one more outcome. This is not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.config import DistillationConfig
from shine.data.batching import collate
from shine.data.samples import Sample
from shine.lora import LoRA
from shine.training.reader import in_prompt, read_reader

LEAST = 1e-9
"""Of a probability, before its logarithm: what the most likely tokens leave over may round to nothing."""


@dataclass(frozen=True)
class Targets:
    """What the teacher expects at each label.

    Attributes:
        ids: ``[N, k]``, its most likely tokens.
        logs: ``[N, k + 1]``, float32, their log-probabilities, with that of all others together.
        share: of the loss that is the divergence from it.
    """

    ids: Tensor
    logs: Tensor
    share: float

    def __getitem__(self, labels: slice) -> Targets:
        """Of some of the labels."""
        return Targets(self.ids[labels], self.logs[labels], self.share)

    def mixed_into(self, losses: Tensor, logits: Tensor) -> Tensor:
        """The labels' losses ``[N]`` with this share of divergence in them, for the model's logits ``[N, V]``."""
        return (1 - self.share) * losses + self.share * self.divergence(logits)

    def divergence(self, logits: Tensor) -> Tensor:
        """``KL(teacher || model)`` of each label ``[N]`` for the model's logits ``[N, V]``."""
        logs = with_rest(F.log_softmax(logits.float(), dim=-1).gather(1, self.ids))
        return (self.logs.exp() * (self.logs - logs)).sum(1)


def with_rest(logs: Tensor) -> Tensor:
    """Log-probabilities of some outcomes ``[N, k]`` with that of all others together in one more column."""
    rest = (1 - logs.exp().sum(1, keepdim=True)).clamp(min=LEAST)
    return torch.cat([logs, rest.log()], dim=1)


class Teacher:
    """The backbone with the context in its prompt, under the LoRA of a reader where one is given.

    Raises:
        ValueError: the reader is missing, or does not fit the backbone.
    """

    def __init__(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase, config: DistillationConfig) -> None:
        self.backbone, self.tokenizer, self.config = backbone, tokenizer, config
        self.reader: LoRA | None = None
        if config.reader is not None:
            self.reader = read_reader(config.reader, backbone).to(backbone.device, backbone.dtype)

    @torch.no_grad()
    def targets(self, samples: Sequence[Sample], *, multiple: int = 1) -> Targets:
        """What it expects at the labels of a micro-batch, in the order in which `shine.data.batching.collate` has them."""
        shown = [in_prompt(sample, self.tokenizer) for sample in samples]
        batch = collate(shown, pad_id=self.tokenizer.pad_token_id, multiple=multiple).to(self.backbone.device)
        hidden = self.backbone.label_hidden(
            batch.input_ids, batch.input_mask, label_positions=batch.label_positions, lora=self.reader
        )
        logits = (self.backbone.wide_logits(hidden[chunk]) for chunk in self.backbone.label_chunks(hidden))
        found = [F.log_softmax(part.float(), dim=-1).topk(self.config.top, dim=-1) for part in logits]
        logs, ids = (torch.cat(each) for each in zip(*found, strict=True))
        return Targets(ids, with_rest(logs), self.config.share)
