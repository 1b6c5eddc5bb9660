"""What a run needs beside the hypernetwork to go on exactly where it stopped."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shine.backbone import Backbone
from shine.checkpoint import CONFIG_FILE, CheckpointInfo, load_hypernetwork, save_hypernetwork, written_beside
from shine.hypernetwork import Hypernetwork

STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and where in the data the next batch begins."""

    step: int = 0
    epoch: int = 0
    offset: int = 0


def save_state(
    directory: Path, hypernetwork: Hypernetwork, info: CheckpointInfo, *, optimizer: torch.optim.Optimizer, position: Position
) -> None:
    """Write a step directory: beside first, then renamed into place, with ``config.json`` last."""
    with written_beside(directory) as folder:
        torch.save({"optimizer": optimizer.state_dict(), "position": asdict(position)}, folder / STATE_FILE)
        save_hypernetwork(folder, hypernetwork, info)


def step_directories(output: Path) -> list[Path]:
    """Complete step directories of a run, oldest first."""
    found = [path for path in output.glob("step-*") if (path / CONFIG_FILE).exists() and (path / STATE_FILE).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_resume(resume: str, output: Path) -> Path:
    """The step directory that ``resume`` means: ``latest`` of this run, or the one it names.

    Raises:
        ValueError: there is none.
    """
    if resume == "latest":
        directories = step_directories(output)
        if not directories:
            raise ValueError(f"resume=latest: {output} holds no complete step directory; start without resume, or name one")
        return directories[-1]
    path = Path(resume).expanduser()
    if not (path / CONFIG_FILE).exists() or not (path / STATE_FILE).exists():
        raise ValueError(f"resume={resume}: not a step directory ({CONFIG_FILE} and {STATE_FILE} must be in it)")
    return path


def restore_state(directory: Path, hypernetwork: Hypernetwork, backbone: Backbone, *, optimizer: torch.optim.Optimizer) -> Position:
    """Put a step directory's weights and optimizer state in place and return where it stood.

    Raises:
        ValueError: the state file is damaged.
    """
    hypernetwork.load_state_dict(load_hypernetwork(directory, backbone).state_dict())
    file = directory / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({error}); resume from an earlier step directory") from None
    optimizer.load_state_dict(state["optimizer"])
    return Position(**state["position"])


def prune(output: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` step directories."""
    for directory in step_directories(output)[:-keep]:
        shutil.rmtree(directory)
