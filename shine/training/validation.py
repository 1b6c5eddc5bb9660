"""Watching a stage while it trains: loss on unseen examples, and whether the adapters still differ."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.config import SourceConfig, TrainConfig
from shine.data.batching import chunks, collate
from shine.data.examples import Example
from shine.data.samples import AnswerSamples, PretrainSamples, Sample, StageSamples
from shine.data.sources import read_named
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA
from shine.metrics import perplexity
from shine.training.step import label_losses


class Validation:
    """A fixed set of samples of the stage; empty when there is no validation source.

    For pretraining, reconstruction and completion are measured apart. Several sources have equal shares.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        stage = config.stage
        wanted = stage.evaluation_batches * stage.batch_size
        self.examples = _first_of_each(config.data.validation, wanted) if stage.evaluate_every else []
        self.backbone = backbone
        self.pad_id = tokenizer.pad_token_id
        self.micro_batch_size = stage.micro_batch_size
        sets: dict[str, StageSamples] = {}
        if self.examples and stage.name == "pretrain":
            for task in ("reconstruct", "complete"):
                sets[task] = PretrainSamples(
                    self.examples, tokenizer, stage, task_tokens=config.backbone.task_tokens, seed=config.seed, tasks=(task,)
                )
        elif self.examples:
            sets["answers"] = AnswerSamples(self.examples, tokenizer, stage)
        self.tallies = {name: found.tally for name, found in sets.items()}
        self.sets = {
            name: [sample for i in range(min(len(found), wanted)) if (sample := found.sample(i, epoch=0))]
            for name, found in sets.items()
        }

    def __bool__(self) -> bool:
        return any(self.sets.values())

    @torch.no_grad()
    def measure(self, hypernetwork: Hypernetwork) -> dict[str, float]:
        """Loss, perplexity and token accuracy of each set; mean cosine and effective rank of the adapters of different contexts."""
        results: dict[str, float] = {}
        for name, samples in self.sets.items():
            losses, correct = self._losses(hypernetwork, samples)
            loss = float(losses.mean())
            results |= {
                f"validation/{name}/loss": loss,
                f"validation/{name}/perplexity": perplexity(loss),
                f"validation/{name}/accuracy": float(correct.float().mean()),
            }
        lora = self._adapters(hypernetwork, next(iter(self.sets.values())))
        if lora.batch > 1:
            cosine = lora.cosine()
            off_diagonal = cosine[~torch.eye(lora.batch, dtype=torch.bool, device=cosine.device)]
            results["validation/adapter_cosine"] = float(off_diagonal.mean())
        results["validation/adapter_effective_rank"] = float(lora.effective_rank())
        return results

    def _losses(self, hypernetwork: Hypernetwork, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            label_losses(hypernetwork, self.backbone, collate(group, pad_id=self.pad_id).to(self.backbone.device))
            for group in chunks(samples, self.micro_batch_size)
        ]
        losses, correct = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(correct)

    def _adapters(self, hypernetwork: Hypernetwork, samples: Sequence[Sample], *, most: int = 16) -> LoRA:
        # One context may have many samples (1qa); different adapters can only be asked of different contexts.
        contexts = {tuple(sample.context_ids): sample for sample in samples}
        chosen = list(contexts.values())[:most]
        batches = [collate(group, pad_id=self.pad_id).to(self.backbone.device) for group in chunks(chosen, self.micro_batch_size)]
        return LoRA.stack([hypernetwork(self.backbone, batch.context_ids, batch.context_mask) for batch in batches])


def _first_of_each(sources: Mapping[str, SourceConfig], wanted: int) -> list[Example]:
    """As many examples as the evaluation can look at (more would be read and tokenised for nothing), the sources taking turns."""
    readers = [read_named({name: source}, "data.validation") for name, source in sources.items()]
    turns = itertools.zip_longest(*(itertools.islice(reader, wanted) for reader in readers))
    found = (example for turn in turns for example in turn if example is not None)
    return list(itertools.islice(found, wanted))
