"""What a run needs beside the hypernetwork to go on exactly where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shine.checkpoint import CONFIG_FILE, CheckpointInfo, save_hypernetwork, written_beside
from shine.hypernetwork import Hypernetwork

STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and where in the data the next batch begins."""

    step: int = 0
    epoch: int = 0
    offset: int = 0


def save_state(
    directory: Path,
    hypernetwork: Hypernetwork,
    info: CheckpointInfo,
    *,
    optimizer: torch.optim.Optimizer,
    position: Position,
    terms: Mapping[str, str | int],
) -> None:
    """Write a step directory: beside first, then renamed into place, with ``config.json`` last.

    Args:
        terms: what a run that resumes here must have in common with this one.
    """
    with written_beside(directory) as folder:
        state = {"optimizer": optimizer.state_dict(), "position": asdict(position), "terms": dict(terms)}
        torch.save(state, folder / STATE_FILE)
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


def restore_state(directory: Path, *, optimizer: torch.optim.Optimizer, terms: Mapping[str, str | int]) -> Position:
    """Put a step directory's optimizer state in place and return where it stood.

    Raises:
        ValueError: the state file is damaged, or was written by a run on other terms; the message names each.
    """
    file = directory / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        raise ValueError(f"{file}: damaged ({type(error).__name__}); resume from an earlier step directory") from None
    odd = [
        f"{name} is {value!r} now and was {state['terms'].get(name)!r}"
        for name, value in terms.items()
        if state["terms"].get(name) != value
    ]
    if odd:
        raise ValueError(
            f"resume: {directory} belongs to another run ({'; '.join(odd)}); set them as they were, or start a new run"
        )
    optimizer.load_state_dict(state["optimizer"])
    return Position(**state["position"])


def prune(output: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` step directories."""
    for directory in step_directories(output)[:-keep]:
        shutil.rmtree(directory)
