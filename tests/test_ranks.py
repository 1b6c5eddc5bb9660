"""Two gloo ranks train what one process trains."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import losses_of, stage_config, train_config

from shine.checkpoint import WEIGHTS_FILE
from shine.training.loop import train


def run_rank(rank: int, size: int, port: int, folder: str, output: str, changes: dict[str, Any]) -> None:
    """The body of one rank's process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train(train_config(folder, Path(output), **changes))


def run_ranks(size: int, folder: str, output: Path, **changes: Any) -> list[int | None]:
    """Train with ``size`` processes and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, size, port, folder, str(output), changes)) for rank in range(size)]
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
    two, one = (load_file(tmp_path / name / "final" / WEIGHTS_FILE) for name in ("two", "one"))
    for name, tensor in one.items():
        if name.endswith("qkv.bias"):
            # The gradient of a key bias is zero in exact arithmetic; Adam turns its rounding into steps.
            third = tensor.shape[0] // 3
            tensor[third : 2 * third] = two[name][third : 2 * third]
        torch.testing.assert_close(tensor, two[name], rtol=0.0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_batch_that_ranks_cannot_share_is_refused(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config(batch_size=3, micro_batch_size=1)
    assert run_ranks(2, tiny_backbone_folder, tmp_path, stage=stage) == [1, 1]
