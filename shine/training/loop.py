"""The training loop: the same for the three stages."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, save_hypernetwork
from shine.config import TrainConfig
from shine.data.batching import SampleStream
from shine.data.build import build_samples
from shine.data.samples import Sample, StageSamples
from shine.data.tally import Tally
from shine.devices import find_device, matrix_rate, room
from shine.downloads import revision_of
from shine.files import written_beside
from shine.fingerprint import fingerprint
from shine.loading import variant_name
from shine.training.distillation import Teacher
from shine.training.distributed import Ranks, SharedRefusalError, silent
from shine.training.guard import Guard
from shine.training.monitor import BAD_STEPS_FILE, Monitor
from shine.training.needs import estimate
from shine.training.optimizer import build_optimizer, learning_rate
from shine.training.owner import Owner
from shine.training.parallel import restore_optimizer, shard, shard_backbone, synchronised, whole_optimizer, whole_weights
from shine.training.provenance import differences
from shine.training.start import FINAL, Start, start_hypernetwork
from shine.training.state import RUN_FILE, RunState, load_state, prune, restore_rng, rng_state, save_state, set_aside
from shine.training.step import StepResult, training_step
from shine.training.stop import StoppedError, StopRequest
from shine.training.validation import Validation
from shine.zoo import resolve


class Run:
    """One stage on one rank, from what was loaded to its final checkpoint, or on from a step directory of its own.

    Args:
        start: what it begins from.
        request: whether a signal has asked for its end.
        record: what tells this run from others, written beside each save.
        owner: of the output folder, on the rank that writes there.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        *,
        start: Start,
        request: StopRequest,
        record: dict[str, Any],
        owner: Owner | None,
    ) -> None:
        stage = config.stage
        self.config, self.stage, self.ranks, self.request, self.owner = config, stage, ranks, request, owner
        self.backbone, self.tokenizer = backbone, tokenizer
        self.output = Path(config.output).expanduser()
        self.record = record
        found = fingerprint(backbone.model, tokenizer)
        if config.backbone.shard and ranks.size > 1:
            shard_backbone(backbone, ranks, find_device(config.backbone.device))
        samples = self._build_samples()
        with ranks.together():
            self.hypernetwork, before = start_hypernetwork(
                config, backbone, samples, pad_id=tokenizer.pad_token_id, found=found, start=start
            )
            self.validation = Validation(config, backbone, tokenizer)
            self.teacher = None if stage.distillation is None else Teacher(backbone, tokenizer, stage.distillation)
        stages, revision = (*before, stage.name), revision_of(resolve(config.backbone.path))
        variant = variant_name(config.backbone.path, backbone)
        shape, length = self.hypernetwork.config, stage.context_length
        self.info = CheckpointInfo(config.backbone, shape, stages, found, revision, variant, length)
        if config.engine == "fsdp" and ranks.size > 1:
            shard(self.hypernetwork, ranks)
        self.optimizer = build_optimizer(self.hypernetwork, stage, dtype=backbone.dtype)
        self.stream = SampleStream(
            samples,
            stage.batch_size,
            config.seed,
            window=stage.length_window,
            together=stage.conversations_per_context,
            ahead=True,
        )
        self.fingerprint = samples.fingerprint
        self.total = stage.steps if stage.steps is not None else max(math.ceil(stage.epochs * len(samples) / stage.batch_size), 1)
        self.guard = Guard(stage)
        self.step = 0
        self.best: float | None = None
        self.resumed_notes = self._restore(start.directory) if start.resumed and start.directory is not None else []

    def _build_samples(self) -> StageSamples:
        config, tokens = self.config, self.config.backbone.task_tokens
        # The first rank of a machine builds what is not there yet, and says so.
        say: Callable[[str], None] = print if self.ranks.local_rank == 0 else silent
        with self.ranks.one_by_one():
            return build_samples(
                config.data.train, "data.train", self.tokenizer, self.stage, task_tokens=tokens, seed=config.seed, say=say
            )

    def go(self) -> Path:
        """Train to the last step."""
        title = f"{self.stage.name} {Path(self.config.backbone.path).name}"
        with self.ranks.together():
            monitor = Monitor(self.output, start=self.step, total=self.total, title=title, rank=self.ranks.rank)
        with monitor:
            with monitor.paused():
                if self.ranks.first:
                    (self.output / RUN_FILE).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
                for line in self._needs().splitlines():
                    monitor.say(line)
                model = synchronised(self.hypernetwork, self.ranks, self.config.engine)
                for line in self._notes():
                    monitor.say(line)
            self.request.patient = True
            try:
                while self.step < self.total:
                    self._advance(model, monitor)
            finally:
                monitor.say(self._cut_report())
        return self._finish()

    def _needs(self) -> str:
        """What is about to be trained, and what it will take."""
        samples, memory = self.stream.samples, self.hypernetwork.memory_tokens.shape[0]
        device = self.backbone.device
        self.rate = matrix_rate(device, self.backbone.dtype)
        needs = estimate(self.config, self.backbone, self.hypernetwork, samples, steps=self.total, ranks=self.ranks.size)
        self.flops_per_token = needs.flops_per_token
        passes = self.total * self.stage.batch_size / len(samples)
        sources = ", ".join(self.config.data.train)
        first = f"{len(samples):,} samples of {sources} ({passes:.3g} passes over them), {memory} memory tokens"
        described = needs.describe(rate=self.rate, ranks=self.ranks.size, device_type=device.type)
        warning = needs.warning(room=room(device, ranks=self.ranks.local_size), config=self.config, ranks=self.ranks.size)
        return "\n".join(filter(None, (first, described, warning)))

    def _cut_report(self) -> str:
        return f"{self.stage.name}, samples drawn: {self.stream.samples.tally}"

    def _advance(self, model: nn.Module, monitor: Monitor) -> None:
        """One optimizer step, and what is due after it."""
        self._train_step(model, monitor)
        self.step += 1
        if _due(self.step, self.stage.check_every, last=self.total):
            self.ranks.check_equal(self.hypernetwork, step=self.step)
        if _due(self.step, self.stage.evaluate_every, last=self.total) and self.validation:
            with monitor.paused():
                self._evaluate(monitor)
        stopped_by = self.ranks.largest(self.request.look(), device=self.backbone.device)
        unfinished = self.step < self.total
        # A run at a constant rate may go on after its end.
        wanted = stopped_by or _due(self.step, self.stage.save_every) if unfinished else self.stage.schedule == "constant"
        if wanted:
            with monitor.paused():
                self._save(monitor)
        if unfinished and stopped_by:
            text = f"{signal.Signals(stopped_by).name}: saved after step {self.step:,} and stopped; resume=latest goes on"
            raise StoppedError(text, signal_number=stopped_by)

    def _notes(self) -> Iterator[str]:
        yield from self.resumed_notes
        for name, tally in self.validation.tallies.items():
            yield f"validation {name}: {tally}"
        if self.stage.evaluate_every and not self.validation:
            yield "stage.evaluate_every is set and data.validation holds no usable sample: nothing is evaluated while training"
        if self.stage.warmup_steps >= self.total:
            yield f"stage.warmup_steps={self.stage.warmup_steps}, steps={self.total}: the learning rate never reaches its peak"

    def _train_step(self, model: nn.Module, monitor: Monitor) -> None:
        rate = learning_rate(self.step, stage=self.stage, total_steps=self.total)
        self.optimizer.set_rate(rate)
        samples = next(self.stream)
        result = training_step(
            model,
            self.backbone,
            samples,
            optimizer=self.optimizer,
            micro_batch_size=self.stage.micro_batch_size,
            clip=self.stage.clip,
            pad_id=self.tokenizer.pad_token_id,
            pad_to_multiple=self.stage.pad_to_multiple,
            ranks=self.ranks,
            guard=self.guard,
            teacher=self.teacher,
        )
        monitor.advance(tokens=result.tokens, loss=result.loss)
        if _due(self.step + 1, self.stage.log_every, last=self.total):
            scalars = {"loss": result.loss, "learning_rate": rate, "gradient_norm": result.gradient_norm}
            # Share of the matrix rate this device was measured at, by the arithmetic that `shine.training.needs` counts.
            mfu = monitor.tokens_per_second * self.flops_per_token / (self.rate * self.ranks.size)
            if self.owner is not None:
                self.owner.beat()
            monitor.record({**scalars, "skipped_steps": self.guard.skipped, "mfu": mfu})
        if result.skipped is not None:
            self._report_bad(result, samples, monitor)
            try:
                self.guard.check(learning_rate=rate)
            except ValueError as error:
                # The weights are still those of the last good step. All ranks are here: they have judged alike.
                self.step += 1
                with monitor.paused():
                    self._save(monitor)
                raise SharedRefusalError(str(error)) from None

    def _report_bad(self, result: StepResult, samples: list[Sample], monitor: Monitor) -> None:
        """Say that a step was not taken, and write down which samples it was made of."""
        monitor.say(f"step {self.step + 1}: {result.skipped}, not taken by any rank; its samples are in {BAD_STEPS_FILE}")
        row = {"reason": result.skipped, "loss": result.loss, "gradient_norm": result.gradient_norm}
        monitor.record_bad({**row, "samples": [sample.id for sample in samples]})

    def _evaluate(self, monitor: Monitor) -> None:
        scalars = self.validation.measure(self.hypernetwork)
        monitor.record(scalars)
        monitor.show_answers(self.validation.answers(self.hypernetwork))
        losses = [value for name, value in scalars.items() if name.endswith("/loss")]
        [loss] = self.ranks.of_first([sum(losses) / len(losses)], device=self.backbone.device)
        # What is not finite is no measure: it would be the best for ever, or never be beaten.
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best = loss
            weights = whole_weights(self.hypernetwork)
            if self.ranks.first:
                directory = self.output / f"best-{self.step:06d}"
                with written_beside(directory) as folder:
                    save_hypernetwork(folder, weights, self.info)

    def _save(self, monitor: Monitor) -> None:
        if self.owner is not None:
            self.owner.beat()
        rng = self.ranks.gather(rng_state())
        weights = whole_weights(self.hypernetwork)
        optimizer = whole_optimizer(self.hypernetwork, self.optimizer)
        if self.ranks.first:
            directory = self.output / f"step-{self.step:06d}"
            state = RunState(
                step=self.step,
                epoch=self.stream.epoch,
                offset=self.stream.offset,
                optimizer=optimizer,
                guard=self.guard.state(),
                tally=self.stream.samples.tally.state(),
                best=self.best,
                samples=len(self.stream.samples),
                data=self.fingerprint,
                rng=rng,
            )
            save_state(directory, weights, self.info, state=state, run=self.record)
            prune(self.output, keep=self.stage.keep)
            # Not sooner: a run that is killed before this save goes on from one whose best was the one before.
            prune(self.output, keep=1, kind="best")
            monitor.say(f"saved {directory}; {self._cut_report()}")
        self.ranks.wait()

    def _differences(self, directory: Path, state: RunState, record: dict[str, Any]) -> tuple[list[str], list[str]]:
        """What differs from the run that wrote a step directory, free and binding, which is refused unless told."""
        free, binding = differences(_asked(record), _asked(self.record))
        if (state.samples, state.data) != (len(self.stream.samples), self.fingerprint):
            now = f"{len(self.stream.samples):,} (fingerprint {self.fingerprint})"
            binding.append(f"the training samples: {state.samples:,} (fingerprint {state.data}) -> {now}")
        if binding and not self.config.allow_changes:
            raise ValueError(
                f"resume: {directory} belongs to a run with another configuration:\n  " + "\n  ".join(binding) + "\n"
                "set these as they were, or allow_changes=true to go on with a run that nothing else reproduces"
            )
        return free, binding

    def _restore(self, directory: Path) -> list[str]:
        """Go on where a step directory stands; what differs from the run that wrote it is returned, to be said."""
        # One rank at a time: each holds the whole of the optimizer's state, until only those do who need it.
        with self.ranks.one_by_one():
            state = load_state(directory)
            record = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
            free, binding = self._differences(directory, state, record)
            if not self.ranks.first:
                state = replace(state, optimizer={})
        anew = record["config"]["stage"]["optimizer"] != self.stage.optimizer
        if not anew:
            restore_optimizer(self.hypernetwork, self.optimizer, dict(state.optimizer))
        self.step, self.best = state.step, state.best
        self.stream.epoch, self.stream.offset = state.epoch, state.offset % len(self.stream.samples)
        self.stream.samples.tally = Tally.of(state.tally)
        self.guard = Guard(self.stage, **state.guard)
        if self.ranks.rank < len(state.rng):
            restore_rng(state.rng[self.ranks.rank])
        found = self.record["versions"]
        changed = [f"{name}: {old} -> {found.get(name)}" for name, old in record["versions"].items() if old != found.get(name)]
        if len(state.rng) != self.ranks.size:
            changed.append(f"ranks: {len(state.rng)} -> {self.ranks.size}")
        if anew:
            changed.append("the moments of the optimizer begin anew: it is another one")
        later = set_aside(self.output, step=self.step) if self.ranks.first else []
        if later:
            changed.append(f"what lay after that step is in {self.output / 'abandoned'}: {', '.join(path.name for path in later)}")
        return [f"goes on after step {self.step:,} of {directory}", *(f"changed: {line}" for line in binding + free + changed)]

    def _finish(self) -> Path:
        directory = self.output / FINAL
        weights = whole_weights(self.hypernetwork)
        if self.ranks.first:
            with written_beside(directory) as folder:
                save_hypernetwork(folder, weights, self.info)
            prune(self.output, keep=1, kind="best")
        self.ranks.wait()
        return directory


def _asked(record: dict[str, Any]) -> dict[str, Any]:
    """The configuration that was asked for, where the shape of a checkpoint may have stood in for the hypernetwork's."""
    return {**record["config"], "hypernetwork": record["asked"]}


def _due(step: int, every: int, *, last: int | None = None) -> bool:
    return every > 0 and (step % every == 0 or step == last)
