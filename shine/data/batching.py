"""How samples become batches: order, left padding, and where the labels are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from shine.chat import IGNORE
from shine.data.samples import Sample, StageSamples
from shine.lora import LoRA

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Samples side by side, left-padded to the longest of the batch. A context that several samples share is there once.

    Attributes:
        ids: the samples' names.
        context_ids: ``[C, T_context]``, ``C <= B``.
        context_mask: ``[C, T_context]``, or ``None`` when nothing is padded.
        context_of: ``[B]``, which context each sample has, or ``None`` when each has its own.
        input_ids: ``[B, T]``, the conversations.
        input_mask: ``[B, T]``, or ``None`` when nothing is padded.
        label_positions: ``[N]``, where the labels are in the flattened ``[B * T]`` conversations.
        label_ids: ``[N]``, the labels.
        tokens: context and conversation tokens, padding not counted.
    """

    ids: tuple[str, ...]
    context_ids: Tensor
    context_mask: Tensor | None
    context_of: Tensor | None
    input_ids: Tensor
    input_mask: Tensor | None
    label_positions: Tensor
    label_ids: Tensor
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def worn(self, adapters: LoRA) -> LoRA:
        """The adapter of each sample, where ``adapters`` are those of the contexts."""
        return adapters if self.context_of is None else adapters.select(self.context_of)


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of at most ``size`` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def evenly_spread(count: int, most: int) -> list[int]:
    """Up to ``most`` of ``count`` places, from first to last."""
    chosen = min(count, most)
    return [number * count // chosen for number in range(chosen)]


def even_chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of at most ``size`` items, as few as there can be, no two of which differ by more than one."""
    count = -(-len(items) // size)
    ends = [len(items) * number // count for number in range(count + 1)]
    return [items[start:end] for start, end in pairwise(ends)]


def pad_left(rows: Sequence[Sequence[int]], *, value: int, multiple: int = 1) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as ``[B, T]`` with their mask, ``None`` when nothing is padded; ``T`` is a multiple of ``multiple``."""
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    ids = torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])
    if all(len(row) == width for row in rows):
        return ids, None
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def collate(samples: Sequence[Sample], *, pad_id: int, multiple: int = 1) -> Batch:
    """Samples to one batch, both lengths padded to a multiple of ``multiple``: fewer different shapes, where these cost."""
    contexts: dict[tuple[int, ...], int] = {}
    context_of = [contexts.setdefault(tuple(sample.context_ids), len(contexts)) for sample in samples]
    context_ids, context_mask = pad_left(list(contexts), value=pad_id, multiple=multiple)
    input_ids, input_mask = pad_left([sample.input_ids for sample in samples], value=pad_id, multiple=multiple)
    labels = pad_left([sample.labels for sample in samples], value=IGNORE, multiple=multiple)[0].flatten()
    positions = (labels != IGNORE).nonzero().squeeze(1)
    return Batch(
        ids=tuple(sample.id for sample in samples),
        context_ids=context_ids,
        context_mask=context_mask,
        context_of=torch.tensor(context_of) if len(contexts) < len(samples) else None,
        input_ids=input_ids,
        input_mask=input_mask,
        label_positions=positions,
        label_ids=labels[positions],
        tokens=sum(sample.tokens for sample in samples),
    )


@dataclass(frozen=True)
class _Drawn:
    """A batch, and the states of the stream, (epoch, offset), where it begins and ends."""

    batch: list[Sample]
    begin: tuple[int, int]
    end: tuple[int, int]


@dataclass
class SampleStream:
    """Global batches of samples without end, in an order that (seed, epoch, offset) fixes for any number of ranks.

    ``epoch`` and ``offset`` say where the next batch begins; setting them continues a stream exactly.

    Attributes:
        window: so many batches at a time are put together by length; zero leaves each epoch's order random.
        together: up to so many samples of one example stand side by side, so that they can share its context.
        ahead: make the next batch in a thread while this one is used. State and tally are those of the batches handed out.
    """

    samples: StageSamples
    batch_size: int
    seed: int
    window: int = 0
    together: int = 1
    epoch: int = 0
    offset: int = 0
    ahead: bool = False

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-batch") if self.ahead else None
        self._next: Future[_Drawn] | None = None
        self._ordered_epoch: int | None = None

    def __iter__(self) -> Iterator[list[Sample]]:
        return self

    def __next__(self) -> list[Sample]:
        """The next ``batch_size`` samples, across the end of an epoch where it comes."""
        begin = self.epoch, self.offset
        # Waited for also where the state was set anew and it is of no use: one draws at a time.
        drawn = self._draw(*begin) if self._next is None else self._next.result()
        if drawn.begin != begin:
            drawn = self._draw(*begin)
        self.epoch, self.offset = drawn.end
        for sample in drawn.batch:
            self.samples.tally.add(context_dropped=sample.context_dropped, conversation_dropped=sample.conversation_dropped)
        self._next = None if self._thread is None else self._thread.submit(self._draw, *drawn.end)
        return drawn.batch

    def _draw(self, epoch: int, offset: int) -> _Drawn:
        begin, batch = (epoch, offset), list[Sample]()
        while len(batch) < self.batch_size:
            batch.append(self.samples.sample(int(self._order(epoch)[offset]), epoch=epoch))
            offset += 1
            if offset == len(self.samples):
                epoch, offset = epoch + 1, 0
        return _Drawn(batch, begin, (epoch, offset))

    def _order(self, epoch: int) -> Tensor:
        if self._ordered_epoch != epoch:
            self._ordered, self._ordered_epoch = self._draw_order(epoch), epoch
        return self._ordered

    def _draw_order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        count = len(self.samples)
        order = torch.randperm(count, generator=generator)
        heads = order
        if self.together > 1:
            order, heads = _side_by_side(order, torch.tensor(self.samples.examples), most=self.together)
        if not self.window:
            return order
        # The first samples of an epoch complete the batch that the epoch before has begun.
        begun = -epoch * count % self.batch_size
        # Samples that stand side by side go by the length of their first, and so stay there.
        lengths = torch.as_tensor(self.samples.lengths)[heads]
        pieces = [order[:begun]]
        for places in torch.arange(count)[begun:].split(self.window * self.batch_size):
            batches = order[places[lengths[places].argsort(stable=True)]].split(self.batch_size)
            # A batch that is not full stays last, so that the others stay whole.
            whole = len(batches) - (len(batches[-1]) < self.batch_size)
            places = torch.randperm(whole, generator=generator).tolist()
            pieces += [*(batches[place] for place in places), *batches[whole:]]
        return torch.cat(pieces)


def _side_by_side(order: Tensor, examples: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """``order`` ``[N]`` of samples, in which up to ``most`` samples of one example follow the first of them.

    Args:
        examples: ``[N]``, the example that each sample is of.

    Returns:
        The new order, and at each place the first of the samples that stand together there.
    """
    by_example = examples[order].argsort(stable=True)
    grouped = examples[order][by_example]
    begins = torch.searchsorted(grouped, grouped)
    nth = torch.arange(len(order)) - begins
    place = torch.empty_like(order)
    place[by_example] = by_example[begins + nth - nth % most]
    sorted_places, arranged = place.sort(stable=True)
    return order[arranged], order[sorted_places]
