"""The training loop: the same for the three stages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.checkpoint import (
    CheckpointInfo,
    effective_config,
    find_checkpoint,
    load_hypernetwork,
    read_info,
    save_hypernetwork,
    written_beside,
)
from shine.config import TrainConfig
from shine.data.batching import SampleStream
from shine.data.samples import build_samples
from shine.data.sources import look_into, read_named
from shine.hypernetwork import Hypernetwork
from shine.training.distributed import Ranks, join_ranks
from shine.training.monitor import METRICS_FILE, Monitor
from shine.training.optimizer import build_optimizer, learning_rate
from shine.training.state import Position, find_resume, prune, restore_state, save_state
from shine.training.step import training_step
from shine.training.validation import Validation
from shine.zoo import load_backbone

CONFIG_FILE = "run.json"
FINAL = "final"


def train(config: TrainConfig) -> Path:
    """Train one stage and return the directory of its final checkpoint.

    Raises:
        ValueError: whatever does not fit together, with the remedy: a missing checkpoint or source, ranks, sizes.
    """
    with join_ranks(config.backbone.device) as ranks:
        start = starting_point(config)
        # Every rank has looked at the output folder before the first one writes into it.
        ranks.wait()
        shape = effective_config(start, config.hypernetwork)
        look_into(config.data.train, "data.train")
        look_into(config.data.validation, "data.validation")
        if ranks.first and shape != config.hypernetwork:
            print(f"the hypernetwork is that of {start}, not the one configured: {shape}", flush=True)
        backbone, tokenizer = load_backbone(config.backbone, targets=shape.targets)
        return _Run(config, backbone, tokenizer, ranks, start=start).go()


class _Run:
    def __init__(
        self, config: TrainConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, *, start: Path | None
    ) -> None:
        stage = config.stage
        if stage.batch_size % (ranks.size * stage.micro_batch_size):
            raise ValueError(
                f"stage.batch_size={stage.batch_size} must be a multiple of ranks x micro_batch_size = "
                f"{ranks.size} x {stage.micro_batch_size}: change one of them"
            )
        self.config, self.stage, self.ranks = config, stage, ranks
        self.backbone, self.tokenizer = backbone, tokenizer
        self.output = Path(config.output).expanduser()
        self.hypernetwork, before = start_hypernetwork(config, backbone, start=start)
        self.info = CheckpointInfo(config.backbone, self.hypernetwork.config, (*before, stage.name))
        self.optimizer = build_optimizer(self.hypernetwork, stage)
        samples = build_samples(
            read_named(config.data.train, "data.train"), tokenizer, stage, task_tokens=config.backbone.task_tokens, seed=config.seed
        )
        self.stream = SampleStream(samples, stage.batch_size, config.seed)
        self.total = stage.steps if stage.steps is not None else max(math.ceil(stage.epochs * len(samples) / stage.batch_size), 1)
        self.validation = Validation(config, backbone, tokenizer, read_named(config.data.validation, "data.validation"))
        self.step = 0
        if config.resume is not None:
            assert start is not None
            self._restore(start)

    def go(self) -> Path:
        title = f"{self.stage.name} {Path(self.config.backbone.path).name}"
        with Monitor(self.output, start=self.step, total=self.total, title=title, quiet=not self.ranks.first) as monitor:
            if self.ranks.first:
                (self.output / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
            monitor.say(describe(self.hypernetwork, self.backbone, samples=len(self.stream.samples), steps=self.total))
            model: nn.Module = self.hypernetwork
            if self.ranks.size > 1:
                model = DistributedDataParallel(self.hypernetwork)
            for line in self._notes():
                monitor.say(line)
            try:
                while self.step < self.total:
                    self._train_step(model, monitor)
                    self.step += 1
                    if _due(self.step, self.stage.evaluate_every, last=self.total) and self.validation:
                        monitor.record(self.validation.measure(self.hypernetwork))
                    if _due(self.step, self.stage.save_every) and self.step < self.total:
                        self._save(monitor)
            finally:
                monitor.say(f"{self.stage.name}, samples drawn: {self.stream.samples.tally}")
        return self._finish()

    def _notes(self) -> Iterator[str]:
        for name, tally in self.validation.tallies.items():
            yield f"validation {name}: {tally}"
        if self.stage.evaluate_every and not self.validation:
            yield "stage.evaluate_every is set and data.validation holds no usable sample: nothing is evaluated while training"
        if self.stage.warmup_steps >= self.total:
            yield f"stage.warmup_steps={self.stage.warmup_steps}, steps={self.total}: the learning rate never reaches its peak"

    def _train_step(self, model: nn.Module, monitor: Monitor) -> None:
        rate = learning_rate(self.step, stage=self.stage, total_steps=self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = training_step(
            model,
            self.backbone,
            next(self.stream),
            optimizer=self.optimizer,
            micro_batch_size=self.stage.micro_batch_size,
            clip=self.stage.clip,
            pad_id=self.tokenizer.pad_token_id,
            ranks=self.ranks,
        )
        monitor.advance(tokens=result.tokens, loss=result.loss)
        if result.skipped:
            monitor.say(f"step {self.step + 1}: the gradient is not finite, step skipped on every rank")
        if _due(self.step + 1, self.stage.log_every, last=self.total):
            monitor.record({"loss": result.loss, "learning_rate": rate, "gradient_norm": result.gradient_norm})

    def _save(self, monitor: Monitor) -> None:
        if self.ranks.first:
            directory = self.output / f"step-{self.step:06d}"
            position = Position(self.step, self.stream.epoch, self.stream.offset)
            save_state(directory, self.hypernetwork, self.info, optimizer=self.optimizer, position=position, terms=self._terms())
            prune(self.output, keep=self.stage.keep)
            monitor.say(f"saved {directory}")
        self.ranks.wait()

    def _restore(self, directory: Path) -> None:
        position = restore_state(directory, optimizer=self.optimizer, terms=self._terms())
        self.step, self.stream.epoch, self.stream.offset = position.step, position.epoch, position.offset

    def _terms(self) -> dict[str, str | int]:
        """What must be the same when this run is resumed, or it would be another run."""
        samples = len(self.stream.samples)
        return {
            "stage": self.stage.name,
            "seed": self.config.seed,
            "batch_size": self.stage.batch_size,
            "steps": self.total,
            "samples": samples,
        }

    def _finish(self) -> Path:
        directory = self.output / FINAL
        if self.ranks.first:
            with written_beside(directory) as folder:
                save_hypernetwork(folder, self.hypernetwork, self.info)
        self.ranks.wait()
        return directory


def starting_point(config: TrainConfig) -> Path | None:
    """The directory whose weights a run starts from: where it resumes, else the checkpoint it names, else none.

    Raises:
        ValueError: a QA stage with neither, or a fresh run into a folder that holds another.
    """
    output = Path(config.output).expanduser()
    if config.resume is not None:
        return find_resume(config.resume, output)
    if any((output / name).exists() for name in (FINAL, METRICS_FILE)):
        raise ValueError(f"output={output} holds another run: choose another folder, go on with resume=latest, or delete it")
    if config.checkpoint is not None:
        return find_checkpoint(config.checkpoint)
    if config.stage.name != "pretrain" and not config.from_scratch:
        raise ValueError(
            f"checkpoint: missing; stage {config.stage.name} starts from the stage before it, set checkpoint=<its output folder> "
            "(or from_scratch=true to start from random weights)"
        )
    return None


def start_hypernetwork(config: TrainConfig, backbone: Backbone, *, start: Path | None) -> tuple[Hypernetwork, tuple[str, ...]]:
    """The hypernetwork in ``start`` (see `starting_point`) and the stages behind it; a random one only where that is none."""
    torch.manual_seed(config.seed)
    if start is None:
        return Hypernetwork(config.hypernetwork, backbone).to(backbone.device), ()
    info = read_info(start)
    hypernetwork = load_hypernetwork(start, backbone, config=config.hypernetwork, trained_on=config.backbone)
    stages = info.stages if info is not None else ("released",)
    return hypernetwork, stages[:-1] if config.resume is not None else stages


def describe(hypernetwork: Hypernetwork, backbone: Backbone, *, samples: int, steps: int) -> str:
    """One line on what is about to be trained."""
    trained = sum(parameter.numel() for parameter in hypernetwork.parameters())
    frozen = sum(parameter.numel() for parameter in backbone.model.parameters())
    return (
        f"{trained:,} trained parameters over {frozen:,} frozen ones; {hypernetwork.memory_tokens.shape[0]} memory tokens; "
        f"{samples:,} samples, {steps:,} steps"
    )


def _due(step: int, every: int, *, last: int | None = None) -> bool:
    return every > 0 and (step % every == 0 or step == last)
