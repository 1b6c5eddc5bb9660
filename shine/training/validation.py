"""Watching a stage while it trains: loss on unseen examples, and whether the adapters still differ."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.chat import IGNORE, stop_ids, token_counter
from shine.config import SourceConfig, TrainConfig
from shine.data.batching import chunks, collate, evenly_spread
from shine.data.examples import Example
from shine.data.samples import AnswerSamples, PretrainSamples, Sample, StageSamples
from shine.data.sources import read_named
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA
from shine.metrics import perplexity
from shine.training.losses import label_losses, losses_under


class Validation:
    """A fixed set of samples of the stage; empty when there is no validation source.

    For pretraining, reconstruction and completion are measured apart. Several sources have equal shares.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        stage = config.stage
        wanted = stage.evaluation_batches * stage.batch_size
        self.examples = _first_of_each(config.data.validation, wanted, tokenizer) if stage.evaluate_every else []
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_token_id
        self.micro_batch_size = stage.micro_batch_size
        sets: dict[str, StageSamples] = {}
        if self.examples and stage.name == "pretrain":
            for task in ("reconstruct", "complete"):
                sets[task] = PretrainSamples.build(
                    self.examples, tokenizer, stage, task_tokens=config.backbone.task_tokens, seed=config.seed, tasks=(task,)
                )
        elif self.examples:
            sets["answers"] = AnswerSamples.build(self.examples, tokenizer, stage)
        self.tallies = {name: found.tally for name, found in sets.items()}
        # From first to last: the questions of one article stand together in a file.
        self.sets = {
            name: [found.sample(place, epoch=0) for place in evenly_spread(len(found), wanted)] for name, found in sets.items()
        }
        for name, samples in self.sets.items():
            for sample in samples:
                self.tallies[name].add(context_dropped=sample.context_dropped, conversation_dropped=sample.conversation_dropped)

    def __bool__(self) -> bool:
        return any(self.sets.values())

    @torch.no_grad()
    def measure(self, hypernetwork: Hypernetwork) -> dict[str, float]:
        """Loss, perplexity and token accuracy of each set, and how far the adapters of different contexts differ.

        That is their mean cosine, their effective rank, and the gap: the loss of a label under the adapter of another context
        less that under its own. Zero means that the adapters hold nothing of their contexts, whatever the loss.
        """
        results: dict[str, float] = {}
        for name, samples in self.sets.items():
            losses, correct = self._losses(hypernetwork, samples)
            loss = float(losses.mean())
            results |= {
                f"validation/{name}/loss": loss,
                f"validation/{name}/perplexity": perplexity(loss),
                f"validation/{name}/accuracy": float(correct.float().mean()),
            }
        samples = _of_different_contexts(next(iter(self.sets.values())))
        lora = self._adapters(hypernetwork, samples)
        if lora.batch > 1:
            results["validation/adapter_gap"] = self._gap(samples, lora)
            results["validation/adapter_cosine"] = float(lora.pair_cosines().mean())
        results["validation/adapter_effective_rank"] = float(lora.effective_rank())
        return results

    @torch.no_grad()
    def answers(self, hypernetwork: Hypernetwork, *, count: int = 3) -> list[dict[str, str]]:
        """What the model says to the first question of a few samples of each set, beside what it should have said."""
        rows = []
        for name, samples in self.sets.items():
            chosen = [_first_answer(sample) for sample in samples[:count]]
            batch = collate([sample for sample, _ in chosen], pad_id=self.pad_id).to(self.backbone.device)
            gold = [answer for _, answer in chosen]
            said = self.backbone.generate(
                batch.input_ids,
                torch.ones_like(batch.input_ids) if batch.input_mask is None else batch.input_mask,
                lora=batch.worn(hypernetwork(self.backbone, batch.context_ids, batch.context_mask, dtype=self.backbone.dtype)),
                max_new_tokens=min(max(map(len, gold)), 64),
                stop_ids=stop_ids(self.tokenizer),
                pad_id=self.pad_id,
            )
            for (sample, answer), given in zip(chosen, said.tolist(), strict=True):
                texts = {"question": sample.input_ids, "answer": given, "right": answer[:64]}
                decoded = {key: str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for key, ids in texts.items()}
                rows.append({"set": name, "id": sample.id, **decoded})
        return rows

    def _losses(self, hypernetwork: Hypernetwork, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            label_losses(hypernetwork, self.backbone, collate(group, pad_id=self.pad_id).to(self.backbone.device))
            for group in chunks(samples, self.micro_batch_size)
        ]
        losses, correct = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(correct)

    def _adapters(self, hypernetwork: Hypernetwork, samples: Sequence[Sample]) -> LoRA:
        batches = [collate(group, pad_id=self.pad_id).to(self.backbone.device) for group in chunks(samples, self.micro_batch_size)]
        return LoRA.stack([hypernetwork(self.backbone, batch.context_ids, batch.context_mask) for batch in batches])

    def _gap(self, samples: Sequence[Sample], lora: LoRA) -> float:
        """Mean loss of the samples' labels under their neighbours' adapters, less that under their own."""
        means = []
        for shift in (1, 0):
            worn = lora.select([(index + shift) % len(samples) for index in range(len(samples))])
            parts, start = [], 0
            for group in chunks(samples, self.micro_batch_size):
                batch = collate(group, pad_id=self.pad_id).to(self.backbone.device)
                parts.append(losses_under(worn.select(range(start, start + len(group))), self.backbone, batch)[0])
                start += len(group)
            means.append(float(torch.cat(parts).mean()))
        return means[0] - means[1]


def _of_different_contexts(samples: Sequence[Sample], *, most: int = 16) -> list[Sample]:
    """One sample of each of some contexts, from first to last: a context may have many samples (1qa), but has one adapter."""
    found = list({tuple(sample.context_ids): sample for sample in samples}.values())
    return [found[place] for place in evenly_spread(len(found), most)]


def _first_answer(sample: Sample) -> tuple[Sample, list[int]]:
    """The sample up to its first answer, and that answer."""
    begin = next(index for index, label in enumerate(sample.labels) if label != IGNORE)
    end = next((index for index in range(begin, len(sample.labels)) if sample.labels[index] == IGNORE), len(sample.labels))
    prompt = replace(sample, input_ids=sample.input_ids[:begin], labels=sample.labels[:begin])
    return prompt, sample.input_ids[begin:end]


def _first_of_each(sources: Mapping[str, SourceConfig], wanted: int, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """As many examples as the evaluation can look at (more would be read and tokenised for nothing), the sources taking turns."""
    readers = [read_named({name: source}, "data.validation", tokens=token_counter(tokenizer)) for name, source in sources.items()]
    turns = itertools.zip_longest(*(itertools.islice(reader, wanted) for reader in readers))
    found = (example for turn in turns for example in turn if example is not None)
    return list(itertools.islice(found, wanted))
