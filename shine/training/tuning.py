"""The loop that trains a reader (`shine.training.reader`): the samples, order, optimizer and schedule of a stage of SHINE's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from shine.config import TrainConfig
from shine.data.batching import SampleStream
from shine.data.build import build_samples
from shine.host_memory import keep_freed_memory
from shine.loading import load_backbone
from shine.lora import LoRA
from shine.training.distributed import Ranks
from shine.training.guard import Guard
from shine.training.optimizer import build_optimizer, learning_rate
from shine.training.reader import Reader, in_prompt
from shine.training.step import training_step

TRAINING_FILE = "training.json"
"""Beside a reader: its rank and alpha, the stage and the data that it learned, and its losses."""


@dataclass(frozen=True)
class TrainedReader:
    """A reader, and how it came about.

    Attributes:
        lora: of batch one.
        losses: of each optimizer step.
    """

    lora: LoRA
    losses: tuple[float, ...]


def train_reader(config: TrainConfig, *, rank: int, alpha: float, say: Callable[[str], None] = print) -> TrainedReader:
    """Train a reader on the samples of a stage, in one process.

    Args:
        config: a training run of SHINE's, whose backbone, data, stage and seed are taken.
        rank, alpha: of the LoRA, on every linear that SHINE writes for; its update is scaled by ``alpha / rank``.

    Raises:
        ValueError: the data or the sizes do not fit.
    """
    stage = config.stage
    backbone, tokenizer = load_backbone(config.backbone, targets=config.hypernetwork.targets)
    keep_freed_memory(backbone.device)
    reader = Reader(backbone, rank=rank, alpha=alpha, seed=config.seed)
    samples = build_samples(
        config.data.train, "data.train", tokenizer, stage, task_tokens=config.backbone.task_tokens, seed=config.seed, say=say
    )
    stream = SampleStream(samples, stage.batch_size, config.seed, window=stage.length_window)
    total = stage.steps if stage.steps is not None else max(math.ceil(stage.epochs * len(samples) / stage.batch_size), 1)
    optimizer, guard, losses = build_optimizer(reader, stage, dtype=backbone.dtype), Guard(stage), list[float]()
    for step in range(total):
        rate = learning_rate(step, stage=stage, total_steps=total)
        optimizer.set_rate(rate)
        result = training_step(
            reader,
            backbone,
            [in_prompt(sample, tokenizer) for sample in next(stream)],
            optimizer=optimizer,
            micro_batch_size=stage.micro_batch_size,
            clip=stage.clip,
            pad_id=tokenizer.pad_token_id,
            pad_to_multiple=stage.pad_to_multiple,
            ranks=Ranks(),
            guard=guard,
        )
        guard.check(learning_rate=rate)
        losses.append(result.loss)
        if stage.log_every and (step + 1) % stage.log_every == 0:
            say(f"reader {step + 1}/{total}  loss {result.loss:.4g}  learning_rate {rate:.4g}")
    return TrainedReader(LoRA({path: (a.detach(), b.detach()) for path, (a, b) in reader().items()}), tuple(losses))
