"""Two gloo ranks train what one process trains."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import losses_of, stage_config, train_config
from torch import Tensor

from shine.checkpoint import WEIGHTS_FILE
from shine.training import step
from shine.training.loop import train


def poison(monkeypatch: pytest.MonkeyPatch, *, call: int) -> None:
    """Make the losses of the ``call``-th micro-batch of this process not a number."""
    calls, real = itertools.count(1), step.label_losses

    def label_losses(*args: Any) -> tuple[Tensor, Tensor]:
        losses, right = real(*args)
        return (losses * float("nan") if next(calls) == call else losses), right

    monkeypatch.setattr(step, "label_losses", label_losses)


def run_rank(rank: int, size: int, port: int, folder: str, output: str, poisoned: int | None, changes: dict[str, Any]) -> None:
    """The body of one rank's process; ``poisoned`` is the micro-batch of rank 1 whose losses are not a number."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 1 and poisoned is not None:
            poison(monkeypatch, call=poisoned)
        train(train_config(folder, Path(output), **changes))


def run_ranks(size: int, folder: str, output: Path, *, poisoned: int | None = None, **changes: Any) -> list[int | None]:
    """Train with ``size`` processes and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, size, port, folder, str(output), poisoned, changes)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
    return [process.exitcode for process in ranks]


def test_two_ranks_train_what_one_trains(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config("mqa", micro_batch_size=1, save_every=10)
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "two", stage=stage) == [0, 0]
    train(train_config(tiny_backbone_folder, tmp_path / "one", stage=stage))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "one")


def test_a_bad_number_on_one_rank_skips_the_step_on_both(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a rank and step: the third of rank 1 belongs to step 2, the sixth of one process too."""
    stage = stage_config("mqa", micro_batch_size=1, steps=5)
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "two", stage=stage, poisoned=3) == [0, 0]
    poison(monkeypatch, call=6)
    train(train_config(tiny_backbone_folder, tmp_path / "one", stage=stage))
    for name in ("one", "two"):
        losses = losses_of(tmp_path / name)
        assert [index for index, loss in enumerate(losses) if not math.isfinite(loss)] == [1]
    assert losses_of(tmp_path / "two")[2:] == pytest.approx(losses_of(tmp_path / "one")[2:], rel=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "one")


def assert_same_weights(first: Path, second: Path) -> None:
    """The final checkpoints of two runs agree to what summation order leaves open."""
    two, one = (load_file(run / "final" / WEIGHTS_FILE) for run in (first, second))
    for name, tensor in one.items():
        if name.endswith("qkv.bias"):
            # The gradient of a key bias is zero in exact arithmetic; Adam turns its rounding into steps.
            third = tensor.shape[0] // 3
            tensor[third : 2 * third] = two[name][third : 2 * third]
        torch.testing.assert_close(tensor, two[name], rtol=0.0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_that_ranks_cannot_share_is_refused(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config(batch_size=3, micro_batch_size=1)
    assert run_ranks(2, tiny_backbone_folder, tmp_path, stage=stage) == [1, 1]
