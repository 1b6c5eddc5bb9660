"""The ranks of a run, as ``torchrun`` sets them up; one process is simply a run of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``size`` ranks; rank 0 writes and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that ``torchrun`` describes in the environment, if it does, and leave it at the end.

    Args:
        device: where the run computes (``auto``, ``cpu``, ``cuda``); it decides how ranks talk.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"{local_rank + 1} ranks on this machine and {torch.cuda.device_count()} GPUs: start fewer ranks")
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
