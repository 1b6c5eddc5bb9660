"""Reconstruction and completion: how much of a context its adapter gives back (``test_pretrain.py``)."""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from shine.chat import END, IGNORE, encode_prompt, token_ids
from shine.config import EvaluationConfig
from shine.data.batching import chunks, collate
from shine.data.examples import Example
from shine.data.pieces import hide_end
from shine.data.samples import PretrainSamples, Sample
from shine.evaluation.methods import Asked, Method
from shine.evaluation.qa import Clock
from shine.metrics import exact_prefix_ratio, f1, perplexity

TASKS = ("reconstruct", "complete")


@dataclass(frozen=True)
class Recall:
    """One text given back under one task.

    Attributes:
        length: tokens of the text.
        bucket: the smallest configured length that holds it.
        loss: mean loss a token of the text and its end, given everything before it.
        exact_prefix: share of the text's tokens given before the first error, greedily.
        em: 1.0 when the text came back whole, to the letter.
        f1: of the words, as for answers.
    """

    source: str
    id: str
    task: str
    method: str
    length: int
    bucket: int
    tokens: int
    loss: float
    exact_prefix: float
    em: float
    f1: float
    prediction: str


def recall(method: Method, source: str, examples: Sequence[Example], config: EvaluationConfig, *, clock: Clock) -> Iterator[Recall]:
    """Ask ``method`` to give back every text, reconstructed and completed."""
    # Texts of one length together, so that little is padded.
    ordered = sorted(examples, key=lambda example: len(example.context))
    for task in TASKS:
        for group in chunks(ordered, config.batch_size):
            started = time.perf_counter()
            method.prepare([_visible(example, task, config.seed) for example in group])
            clock.encode += time.perf_counter() - started
            started = time.perf_counter()
            yield from _recall_group(method, source, group, task, config)
            clock.answer += time.perf_counter() - started


def _recall_group(method: Method, source: str, group: Sequence[Example], task: str, config: EvaluationConfig) -> Iterator[Recall]:
    asked = [Asked(index, _request(method, task, config)) for index in range(len(group))]
    targets = [token_ids(method.tokenizer, example.context) for example in group]
    losses = _losses(method, asked, group)
    outputs = method.answer_ids(asked, max_new_tokens=max(map(len, targets)) + 8)
    for example, target, loss, output in zip(group, targets, losses, outputs, strict=True):
        text = str(method.tokenizer.decode(output)).strip()
        yield Recall(
            source,
            example.id,
            task,
            method.name,
            len(target),
            _bucket(len(target), config),
            len(target) + 1,
            loss,
            exact_prefix_ratio(output, target),
            float(text == example.context.strip()),
            f1(text, [example.context]),
            text,
        )


def _bucket(length: int, config: EvaluationConfig) -> int:
    bounds = sorted({*config.lengths, config.stage.context_length})
    # Cut at a token, a text may tokenise to a little more than the limit when it is read again.
    return bounds[min(bisect_left(bounds, length), len(bounds) - 1)]


def _visible(example: Example, task: str, seed: int) -> str:
    if task == "reconstruct":
        return example.context
    return hide_end(example.context, random.Random(f"{seed} {example.id}").uniform(*PretrainSamples.HIDE))


def _request(method: Method, task: str, config: EvaluationConfig) -> str:
    if method.name == "shine":
        return str(getattr(config.backbone.task_tokens, task))
    return config.prompts.repeat if task == "reconstruct" else config.prompts.complete


@torch.no_grad()
def _losses(method: Method, asked: Sequence[Asked], group: Sequence[Example]) -> list[float]:
    samples = []
    for question, example in zip(asked, group, strict=True):
        prompt = encode_prompt(method.tokenizer, method.messages(question), assistant_prefix=method.assistant_prefix)
        target = token_ids(method.tokenizer, example.context + END)
        samples.append(Sample(example.id, [0], prompt + target, [IGNORE] * len(prompt) + target))
    batch = collate(samples, pad_id=method.tokenizer.pad_token_id).to(method.backbone.device)
    logits = method.backbone.label_logits(
        batch.input_ids, batch.input_mask, label_positions=batch.label_positions, lora=method.worn(asked)
    )
    losses = F.cross_entropy(logits, batch.label_ids, reduction="none")
    return [float(part.mean()) for part in losses.split([sample.label_count for sample in samples])]


def summarise(results: Sequence[Recall]) -> dict[str, object]:
    """Perplexity, exact-prefix ratio, EM and F1 (percent) of each task, over all texts and by length bucket."""
    summary: dict[str, object] = {}
    for task in TASKS:
        mine = [result for result in results if result.task == task]
        buckets: dict[int, list[Recall]] = defaultdict(list)
        for result in mine:
            buckets[result.bucket].append(result)
        summary[task] = {**_scores(mine), "lengths": {str(bound): _scores(buckets[bound]) for bound in sorted(buckets)}}
    return {"em": _mean(results, "em"), "f1": _mean(results, "f1"), "texts": len({result.id for result in results}), **summary}


def _scores(results: Sequence[Recall]) -> dict[str, float]:
    tokens = sum(result.tokens for result in results)
    loss = sum(result.loss * result.tokens for result in results) / tokens
    return {
        "perplexity": perplexity(loss),
        "exact_prefix": _mean(results, "exact_prefix"),
        "em": _mean(results, "em"),
        "f1": _mean(results, "f1"),
        "texts": len(results),
    }


def _mean(results: Sequence[Recall], name: str) -> float:
    return 100 * sum(getattr(result, name) for result in results) / len(results)
