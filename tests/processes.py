"""Training in processes of its own: several gloo ranks, or one that can be killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from exact import install_exact_norms
from runs import train_config
from torch import Tensor, nn

from shine import loading
from shine.cli.stages import train_and_evaluate
from shine.training import loop, stage, step
from shine.training.monitor import METRICS_FILE
from shine.training.stage import train
from shine.training.validation import Validation

# Forked from a server that has imported what takes long, a process starts in a fraction of a second. The server does not find
# the modules beside this one: it would leave them out without a word.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "torch", "transformers.models.qwen3.modeling_qwen3", "transformers.models.llama.modeling_llama", "shine.cli.stages"]
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong on rank 1: ``where``, in its ``call``-th micro-batch; for ``validation``, ``norm`` and ``draws`` (which is no
    fault: each pass draws random numbers) from that call on; for ``speed`` it is good at the other type than this machine is; a
    name that a run uses while it is set up refuses."""

    where: Literal[
        "loss",
        "gradient",
        "weight",
        "death",
        "validation",
        "norm",
        "draws",
        "speed",
        "look_into",
        "load_backbone",
        "build_samples",
        "Validation",
        "load_state",
        "Monitor",
    ]
    call: int = 1

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.where in ("validation", "norm"):
            self._disagree(monkeypatch)
            return
        if self.where == "speed":
            found = loading.slow_at_bfloat16
            monkeypatch.setattr(loading, "slow_at_bfloat16", lambda device: not found(device))
            return
        for module in (stage, loop):
            if hasattr(module, self.where):
                monkeypatch.setattr(module, self.where, self._refuse)
                return
        calls, real = itertools.count(1), step.label_losses

        def label_losses(hypernetwork: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
            losses, right = real(hypernetwork, *args)
            call = next(calls)
            if self.where == "draws" and call >= self.call:
                random.random(), torch.rand(3)
            if self.where == "draws" or call != self.call:
                return losses, right
            parameter = next(hypernetwork.parameters())
            if self.where == "loss":
                losses = losses * float("nan")
            elif self.where == "gradient":
                handle = parameter.register_hook(lambda gradient: [handle.remove(), gradient * float("nan")][1])
            elif self.where == "weight":
                parameter.data.view(-1)[3] += 1e-3
            else:
                raise MemoryError("rank 1 has run out of memory")
            return losses, right

        monkeypatch.setattr(step, "label_losses", label_losses)

    def _refuse(self, *_args: Any, **_options: Any) -> None:
        raise ValueError(f"rank 1 has no {self.where}")

    def _disagree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rank 1 measures a thousandfold of what rank 0 does."""
        calls, measure, clip = itertools.count(1), Validation.measure, nn.utils.clip_grad_norm_

        def factor() -> float:
            return 1e3 if next(calls) >= self.call else 1.0

        def measured(*args: Any) -> dict[str, float]:
            by = factor()
            return {name: value * by for name, value in measure(*args).items()}

        if self.where == "validation":
            monkeypatch.setattr(Validation, "measure", measured)
        else:
            monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * factor())


def run_rank(
    rank: int,
    size: int,
    port: int,
    folder: str,
    output: str,
    fault: Fault | None,
    own_seeds: bool,
    exact: bool,
    changes: dict[str, Any],
) -> None:
    """The body of one rank's process."""
    become_rank(rank, size, port)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if exact:
            install_exact_norms(monkeypatch)
        if rank == 1 and fault is not None:
            fault.install(monkeypatch)
        if own_seeds:
            seed = torch.manual_seed
            monkeypatch.setattr(torch, "manual_seed", lambda value: seed(value + 1000 * rank))
        try:
            train_and_evaluate(train_config(folder, Path(output), **changes))
        except BaseException:
            error_file(Path(output), rank).write_text(traceback.format_exc(), encoding="utf-8")
            raise


def become_rank(rank: int, size: int, port: int) -> None:
    """What ``torchrun`` tells a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def call_on_ranks(size: int, body: Callable[..., object], *args: Any) -> list[int | None]:
    """Call a function in ``size`` processes that are ranks, and return their exit codes; ``None`` for one that hangs."""
    port = free_port()
    ranks = [CONTEXT.Process(target=_call, args=(rank, size, port, body, args)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    return [process.exitcode for process in ranks]


def _call(rank: int, size: int, port: int, body: Callable[..., object], args: tuple[Any, ...]) -> None:
    become_rank(rank, size, port)
    body(*args)


def error_file(output: Path, rank: int) -> Path:
    """Where a rank that fails leaves its traceback: what a forked process prints is not captured."""
    return output.with_name(f"{output.name}-rank-{rank}.err")


def start_ranks(
    size: int,
    folder: str,
    output: Path,
    *,
    fault: Fault | None = None,
    own_seeds: bool = False,
    exact: bool = False,
    **changes: Any,
) -> list[multiprocessing.process.BaseProcess]:
    """Start training with ``size`` processes.

    Args:
        own_seeds: every rank draws other random weights than the configuration's seed says.
        exact: norms and rotations in the backbone's own precision, as the fixture ``exact_norms`` has them in this process.
    """
    port = free_port()
    ranks = [
        CONTEXT.Process(target=run_rank, args=(rank, size, port, folder, str(output), fault, own_seeds, exact, changes))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return list(ranks)


def run_ranks(size: int, folder: str, output: Path, **options: Any) -> list[int | None]:
    """Train with ``size`` processes (see `start_ranks`) and return their exit codes; ``None`` for one that hangs."""
    ranks = start_ranks(size, folder, output, **options)
    for process in ranks:
        process.join(timeout=120)
    return [process.exitcode for process in ranks]


def train_in_process(folder: str, output: Path, **changes: Any) -> multiprocessing.process.BaseProcess:
    """Start a training run of one rank, as `train_config` describes it."""
    process = CONTEXT.Process(target=_train, args=(folder, str(output), changes))
    process.start()
    return process


def _train(folder: str, output: str, changes: dict[str, Any]) -> None:
    train(train_config(folder, Path(output), **changes))


def wait_for_progress(output: Path, process: Any) -> None:
    """Until this process has done a step: the metrics file is newer than the process."""
    file, started = output / METRICS_FILE, time.time()
    while process.is_alive() and (not file.exists() or file.stat().st_mtime < started or not file.stat().st_size):
        time.sleep(0.002)


def wait_for_a_directory_being_written(output: Path, process: Any, *, name: str = "step-*") -> None:
    while process.is_alive() and not list(output.glob(f".{name}.partial")):
        time.sleep(0.0002)
