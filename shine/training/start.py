"""Where a run begins: at random, from the stage before it, or where it was stopped."""

from __future__ import annotations

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
from shine.fingerprint import Fingerprint
from shine.hypernetwork import Hypernetwork
from shine.training.monitor import METRICS_FILE
from shine.training.state import find_resume, step_directories

FINAL = "final"


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
    config: TrainConfig, backbone: Backbone, *, found: Fingerprint, start: Start
) -> tuple[Hypernetwork, tuple[str, ...]]:
    """The hypernetwork in ``start`` (see `starting_point`) and the stages behind it; a random one only where that is none."""
    torch.manual_seed(config.seed)
    if start.directory is None:
        return Hypernetwork(config.hypernetwork, backbone).to(backbone.device), ()
    info = read_info(start.directory)
    hypernetwork = load_hypernetwork(start.directory, backbone, config=config.hypernetwork)
    check_backbone(start.directory, config=config.backbone, found=found)
    stages = info.stages if info is not None else ("released",)
    return hypernetwork, stages[:-1] if start.resumed else stages
