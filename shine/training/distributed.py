"""The ranks of a run, as ``torchrun`` sets them up; one process is simply a run of one rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


class SharedRefusalError(ValueError):
    """What one rank refuses, on every rank: one of them says it."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``size`` ranks; rank 0 writes and speaks."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

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

    def largest(self, value: int, *, device: torch.device) -> int:
        """The largest of the ranks' numbers, on every rank; zero when all are zero."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: T) -> list[T]:
        """The ranks' values in order, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def of_first(self, values: Sequence[float], *, device: torch.device) -> list[float]:
        """Rank 0's numbers, on every rank: what all must decide alike is decided by one."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        return shared.tolist()

    def ask_first(self, find: Callable[[], T]) -> T:
        """What ``find`` returns on rank 0, on every rank.

        Raises:
            ValueError: ``find`` raised one; on every rank, so that none waits for another.
        """
        return self._ask(find, of=0)

    def ask_first_of_machine(self, find: Callable[[], T]) -> T:
        """What ``find`` returns on the first rank of each machine, on every rank of that machine.

        Raises:
            ValueError: ``find`` raised one somewhere; on every rank of every machine.
        """
        return self._ask(find, of=self.rank - self.local_rank)

    def _ask(self, find: Callable[[], T], *, of: int) -> T:
        if self.size == 1:
            return find()
        found: list[T] = []
        with self.together():
            if self.rank == of:
                found = [find()]
        return self.gather(found)[of][0]

    def check_equal(self, module: nn.Module, *, step: int) -> None:
        """Make sure that every rank holds the same parameters; where each holds its own part of them, nothing can be compared.

        Raises:
            RuntimeError: they have drifted apart; on every rank.
        """
        if self.size == 1 or any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            return
        own = torch.stack([_bit_sum(parameter) for parameter in module.parameters()])
        least, most = own.clone(), own.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        names = [name for (name, _), differs in zip(module.named_parameters(), (least != most).tolist(), strict=True) if differs]
        if names:
            raise RuntimeError(
                f"after step {step} the ranks hold different values of {len(names)} parameters, {names[0]} among them: the run "
                "cannot be trusted from here; resume from an earlier step directory, and look at the machine"
            )

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The ranks of one machine go through the block after each other, so that only one at a time holds what it needs in it.

        Raises:
            ValueError: the block raised one somewhere; on every rank, so that none waits for another.
        """
        if self.size == 1:
            yield
            return
        # Machines may have different numbers of ranks, and all ranks must meet equally often.
        for turn in range(max(self.gather(self.local_size))):
            with self.together():
                if turn == self.local_rank:
                    yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks leave the block, in which they do not talk, or none does.

        Raises:
            ValueError: the block raised one somewhere; on every rank, so that none waits for another.
        """
        if self.size == 1:
            yield
            return
        refusal = ""
        try:
            yield
        except ValueError as error:
            refusal = str(error)
        if refusals := [text for text in self.gather(refusal) if text]:
            raise SharedRefusalError(refusals[0])


def _bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns: equal for equal tensors, and hardly ever for others; one pass, no copy."""
    bits = tensor.detach().view(torch.int64 if tensor.element_size() == 8 else torch.int32)
    return bits.sum(dtype=torch.int64)


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that ``torchrun`` describes in the environment, if it does, and leave it at a good end.

    Inside another such block it is the same ranks, and the outer block leaves: a group cannot be joined a second time.

    Args:
        device: where the run computes (``auto``, ``cpu``, ``cuda``); it decides how ranks talk.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if dist.is_initialized():
        yield _ranks()
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE={size} is set and LOCAL_RANK is not: start several ranks with torchrun, or unset WORLD_SIZE")
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"{local_rank + 1} ranks on this machine and {torch.cuda.device_count()} GPUs: start fewer ranks")
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    # Not where an error came out: leaving waits for the others, who may wait for this rank. They feel the end of its process.
    yield _ranks()
    dist.destroy_process_group()


def _ranks() -> Ranks:
    size = dist.get_world_size()
    return Ranks(dist.get_rank(), size, int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def silent(_text: str) -> None:
    """In place of ``print`` on ranks whose words another says."""
