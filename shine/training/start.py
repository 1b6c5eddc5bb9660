"""Where a run begins: at random, from the stage before it, or where it was stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shine.backbone import Backbone
from shine.checkpoint import (
    CONFIG_FILE,
    check_backbone,
    find_checkpoint,
    is_unfinished,
    load_hypernetwork,
    output_folder,
    read_info,
)
from shine.config import TrainConfig
from shine.data.batching import chunks, collate
from shine.data.samples import Sample, StageSamples
from shine.fingerprint import Fingerprint
from shine.hypernetwork import Hypernetwork
from shine.training.monitor import METRICS_FILE
from shine.training.state import find_resume, step_directories

FINAL = "final"
MEASURED_CONTEXTS = 64
"""What the means and spreads of memory states are taken from."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        directory: whose weights it starts from; ``None`` for random ones.
        resumed: it goes on with the run in there.
        finished: there is nothing left to do; ``directory`` is the end.
    """

    directory: Path | None = None
    resumed: bool = False
    finished: bool = False


def starting_point(config: TrainConfig, *, say: Callable[[str], None]) -> Start:
    """Where a run begins: where it resumes, else the checkpoint it names, else at random.

    Raises:
        ValueError: a QA stage with neither, or a fresh run into a folder that holds another.
    """
    output = output_folder(config.output)
    if config.resume == "auto" and (output / FINAL / CONFIG_FILE).exists():
        return Start(output / FINAL, finished=True)
    if config.resume is not None:
        found = find_resume(config.resume, output, say=say)
        if found is not None:
            if found.absolute().parent != output.absolute() and holds_a_run(output):
                raise ValueError(f"resume={found} is not a step of the run in output={output}: choose another output folder")
            return Start(found, resumed=True)
    elif holds_a_run(output):
        on = ", go on with resume=latest" if step_directories(output) else ", start afresh in it with resume=auto"
        on = "" if (output / FINAL).exists() else on
        raise ValueError(f"output={output} holds another run: choose another folder{on}, or delete it")
    if config.checkpoint is not None:
        return Start(find_stage(config.checkpoint))
    if config.stage.name != "pretrain" and not config.from_scratch:
        raise ValueError(
            f"checkpoint: missing; stage {config.stage.name} starts from the stage before it, set checkpoint=<its output folder> "
            "(or from_scratch=true to start from random weights)"
        )
    return Start()


def find_stage(checkpoint: str) -> Path:
    """The checkpoint that a stage starts from.

    Raises:
        ValueError: there is none, or the run that makes it has not ended.
    """
    found = find_checkpoint(checkpoint)
    if is_unfinished(found) and found != Path(checkpoint).expanduser():
        raise ValueError(f"checkpoint={checkpoint}: that run has not ended; finish it, or name a step of it, checkpoint={found}")
    return found


def holds_a_run(output: Path) -> bool:
    """Whether a run got far enough in this folder to be worth keeping: a logged step, a saved one, or its end."""
    metrics = output / METRICS_FILE
    return bool((output / FINAL).exists() or step_directories(output) or (metrics.exists() and metrics.stat().st_size))


def start_hypernetwork(
    config: TrainConfig, backbone: Backbone, samples: StageSamples, *, pad_id: int, found: Fingerprint, start: Start
) -> tuple[Hypernetwork, tuple[str, ...]]:
    """The hypernetwork in ``start`` (see `starting_point`) and the stages behind it; a random one only where that is none.

    Args:
        samples: whose contexts a random one takes its measures from, where it is to standardise memory states.
    """
    torch.manual_seed(config.seed)
    if start.directory is None:
        hypernetwork = Hypernetwork(config.hypernetwork, backbone).to(backbone.device)
        if hypernetwork.m2p.standard is not None:
            groups = chunks(_some_of(samples, seed=config.seed), config.stage.micro_batch_size)
            batches = (collate(group, pad_id=pad_id).to(backbone.device) for group in groups)
            with torch.no_grad():
                states = (hypernetwork.memory_states(backbone, batch.context_ids, batch.context_mask) for batch in batches)
                hypernetwork.m2p.standard.measure(states)
        return hypernetwork, ()
    info = read_info(start.directory)
    hypernetwork = load_hypernetwork(start.directory, backbone, config=config.hypernetwork)
    check_backbone(start.directory, config=config.backbone, found=found)
    stages = info.stages if info is not None else ("released",)
    return hypernetwork, stages[:-1] if start.resumed else stages


def _some_of(samples: StageSamples, *, seed: int, count: int = MEASURED_CONTEXTS) -> list[Sample]:
    return [samples.sample(index, epoch=0) for index in random.Random(seed).sample(range(len(samples)), min(count, len(samples)))]
