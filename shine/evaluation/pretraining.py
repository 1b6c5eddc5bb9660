"""Reconstruction and completion: how much of a context its adapter gives back (``test_pretrain.py``)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from shine.chat import END, IGNORE, token_ids
from shine.config import EvaluationConfig
from shine.data.batching import collate
from shine.data.examples import Example
from shine.data.pieces import hide_end
from shine.data.samples import PretrainSamples, Sample
from shine.evaluation.methods import Asked, Method
from shine.evaluation.qa import Clock
from shine.metrics import exact_prefix_ratio, f1

TASKS = ("reconstruct", "complete")


@dataclass(frozen=True)
class Recall:
    """One text given back under one task.

    Attributes:
        context_tokens: tokens of the text.
        tokens: those that the loss is a mean over, the end token among them.
        loss: mean loss a token of the text and its end, given everything before it.
        exact_prefix: share of the text's tokens given before the first error, greedily.
        em: 1.0 when the text came back whole, to the letter.
        f1: of the words, as for answers.
    """

    source: str
    method: str
    id: str
    task: str
    context_tokens: int
    tokens: int
    loss: float
    exact_prefix: float
    em: float
    f1: float
    prediction: str


def recall(
    method: Method, source: str, group: Sequence[Example], config: EvaluationConfig, *, task: str, clock: Clock
) -> list[Recall]:
    """Ask ``method`` to give some texts back under one of `TASKS`."""
    with clock.measure("encode"):
        method.prepare([replace(example, context=_visible(example, task, config.seed)) for example in group])
    tokenizer = method.speaker.tokenizer
    question = method.task_question(getattr(config.backbone.task_tokens, task), _words(task, config))
    asked = [Asked(index, question) for index in range(len(group))]
    targets = [token_ids(tokenizer, example.context) for example in group]
    with clock.measure("answer"):
        losses = _losses(method, asked, group)
        outputs = method.answer_ids(asked, max_new_tokens=max(map(len, targets)) + 8, batch_size=config.batch_size)
    results = []
    for example, target, loss, output in zip(group, targets, losses, outputs, strict=True):
        text = str(tokenizer.decode(output)).strip()
        whole = float(text == example.context.strip())
        results.append(
            Recall(
                source,
                method.name,
                example.id,
                task,
                len(target),
                len(target) + 1,
                loss,
                exact_prefix_ratio(output, target),
                whole,
                f1(text, [example.context]),
                text,
            )
        )
    return results


def _visible(example: Example, task: str, seed: int) -> str:
    if task == "reconstruct":
        return example.context
    return hide_end(example.context, random.Random(f"{seed} {example.id}").uniform(*PretrainSamples.HIDE))


def _words(task: str, config: EvaluationConfig) -> str:
    return config.prompts.repeat if task == "reconstruct" else config.prompts.complete


@torch.no_grad()
def _losses(method: Method, asked: Sequence[Asked], group: Sequence[Example]) -> list[float]:
    speaker, samples = method.speaker, []
    for question, example in zip(asked, group, strict=True):
        prompt = method.prompt(question)
        target = token_ids(speaker.tokenizer, example.context + END)
        samples.append(Sample(example.id, [0], prompt + target, [IGNORE] * len(prompt) + target))
    batch = collate(samples, pad_id=speaker.tokenizer.pad_token_id).to(speaker.backbone.device)
    hidden = speaker.backbone.hidden(batch.input_ids, batch.input_mask, lora=method.worn(asked)).flatten(0, 1)
    counts, losses = [sample.label_count for sample in samples], []
    # One text after the other: with a vocabulary of 150,000 the logits of sixteen long ones are 10 GB.
    for positions, labels in zip(batch.label_positions.split(counts), batch.label_ids.split(counts), strict=True):
        logits = speaker.backbone.logits(hidden[positions - 1])
        losses.append(float(F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)))
    return losses
