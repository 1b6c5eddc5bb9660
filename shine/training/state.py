"""What a run needs beside the hypernetwork to go on exactly where it stopped, and the step directories that hold it.

A step directory is written beside and renamed into place. ``manifest.json``, written last, has the size and SHA-256 of every other
file, so that one which a network file system has not finished, or somebody has damaged, is never taken for a whole one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shine.checkpoint import CheckpointInfo, is_unfinished, save_hypernetwork
from shine.files import moved_aside, restore, written_beside
from shine.manifest import damage, write_manifest

STATE_FILE, RUN_FILE = "training_state.pt", "run.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps done; the learning rate is a function of it.
        epoch, offset: where in the data the next batch begins.
        optimizer: its state by parameter name, see `shine.training.parallel.whole_optimizer`.
        guard: the arguments of a `Guard` that goes on judging alike.
        tally: the fields of the `Tally` so far.
        best: the lowest validation loss so far, ``None`` before the first.
        samples, data: how many samples there are, and a fingerprint of them.
        rng: of each rank, see `rng_state`.
    """

    step: int
    epoch: int
    offset: int
    optimizer: Mapping[str, Any]
    guard: Mapping[str, Any]
    tally: Mapping[str, Any]
    best: float | None
    samples: int
    data: str
    rng: Sequence[Mapping[str, Any]]


def save_state(
    directory: Path, weights: Mapping[str, Tensor], info: CheckpointInfo, *, state: RunState, run: Mapping[str, Any]
) -> None:
    """Write a step directory.

    Args:
        weights: the ``state_dict`` of the hypernetwork.
        run: the resolved configuration and what it ran on, see `shine.training.provenance`.
    """
    with written_beside(directory) as folder:
        # Opened here: torch's own writer hides that a disk is full behind a RuntimeError.
        with (folder / STATE_FILE).open("wb") as stream:
            torch.save({name: getattr(state, name) for name in RunState.__dataclass_fields__}, stream)
        (folder / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        save_hypernetwork(folder, weights, info)
        write_manifest(folder)


def load_state(directory: Path) -> RunState:
    """The state in a step directory.

    Raises:
        ValueError: the file cannot be read, or is of another version of SHINE.
    """
    file = directory / STATE_FILE
    try:
        return RunState(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        raise ValueError(f"{file}: damaged ({type(error).__name__}); resume from an earlier step directory") from None


def step_directories(output: Path, *, kind: Literal["step", "best"] = "step") -> list[Path]:
    """The step directories of a run, or its best ones, oldest first; whether they are whole is another question, see `damage`."""
    found = [path for path in output.glob(f"{kind}-*") if path.name.removeprefix(f"{kind}-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(f"{kind}-")))


def newest_whole(output: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest step directory that is whole; those passed over are said."""
    for directory in reversed(step_directories(output)):
        problem = damage(directory)
        if problem is None:
            return directory
        say(f"passed over {directory}: {problem}")
    return None


def find_resume(resume: str, output: Path, *, say: Callable[[str], None]) -> Path | None:
    """The step directory that ``resume`` means.

    Args:
        resume: ``latest`` for the newest whole one of this run, ``auto`` for the same or, where there is none, ``None``: a
            fresh start; anything else names one.

    Raises:
        ValueError: there is none, or the one that was named is not whole.
    """
    if resume in ("latest", "auto"):
        directory = newest_whole(output, say=say)
        if directory is None and resume == "latest":
            raise ValueError(f"resume=latest: {output} holds no whole step directory; name one, or start afresh with resume=auto")
        return directory
    path = Path(resume).expanduser()
    problem = damage(path)
    if problem is not None:
        raise ValueError(f"resume={resume}: not a whole step directory ({problem}); name another, or resume=latest")
    return path


def prune(output: Path, *, keep: int, kind: Literal["step", "best"] = "step") -> None:
    """Delete all but the newest ``keep`` directories of a kind, each out of sight first: a kill leaves no half-deleted one behind.

    What a network file system still holds open stays out of sight until a later `sweep`.
    """
    for directory in step_directories(output, kind=kind)[:-keep]:
        hidden = directory.with_name(f".{directory.name}.{os.getpid()}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(directory.rename(hidden), ignore_errors=True)


def set_aside(output: Path, *, step: int) -> list[Path]:
    """Move what lies after ``step`` in a run's folder, its end too, into ``abandoned/``: what goes on from there is another run.

    Returns:
        What was moved.
    """
    later = [path for path in output.glob("*-*") if is_unfinished(path) and int(path.name.rpartition("-")[2]) > step]
    moved = [path for path in (*sorted(later), output / "final") if path.exists()]
    for path in moved:
        place = output / "abandoned" / path.name
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)
    return moved


def sweep(output: Path) -> None:
    """Remove what a killed run was writing or deleting in its folder, and give back what it was replacing."""
    for aside, place in moved_aside(output):
        restore(place)
        shutil.rmtree(aside, ignore_errors=True)
    for directory in (*output.glob(".*.partial"), *output.glob(".*.deleted")):
        if directory.is_dir():
            shutil.rmtree(directory, ignore_errors=True)


def rng_state() -> dict[str, Any]:
    """The state of this process's random number generators, as plain containers and tensors."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the generators where `rng_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
