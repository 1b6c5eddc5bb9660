"""What each part of our training step is worth: the step as it is, and with one thing at a time done otherwise, in turns.

    python benchmarks/ablations.py                                     # SmolLM2-135M, two samples of mqa
    python benchmarks/ablations.py --rows pretrain --only "fused attention" "all logits"
    python benchmarks/ablations.py --model qwen3-0.6b --batch 8         # random weights of that shape, on a GPU

Each way does the same arithmetic on what is read in the end, so its loss must be ours to rounding, which is printed beside it. Not
part of `make bench`: it says where the time of ours comes from, not how it stands to anything else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from machine import alternate, first_runs, ratio_with_spread
from packing import packed
from recipe import unread_logits
from subject import DTYPES, MODELS, Subject, attending, examples, load
from torch import Tensor, nn
from torch.nn import functional as F
from train_step import MOST_APART, ROWS, Ours, lengths_of, padding

from shine import attention, m2p
from shine.backbone import Backbone
from shine.data.batching import Batch
from shine.wearing import LayerLoRA

Ablation = Callable[[Subject], AbstractContextManager[object]]
OURS, AGAIN = "ours", "ours again"
"""The step as it is, as the first and as the last of a round: what they differ by is noise."""


def main() -> None:
    """Measure the ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["mqa"])
    parser.add_argument("--batch", type=int, help="samples in a batch (default: two of mqa, one of the others)")
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS), metavar="WAY", help=", ".join(ABLATIONS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16, or float32 where that is slow")
    args = parser.parse_args()
    subject = load(args.model, device=args.device, dtype=args.dtype)
    for row in args.rows:
        measure(subject, row, batch=args.batch, only=args.only, rounds=args.rounds)


def measure(subject: Subject, row: str, *, batch: int | None, only: list[str], rounds: int) -> None:
    """Print seconds, peak memory and loss of ours and of each way; a loss that is another one ends the program."""
    samples = examples(lengths_of(row, batch), vocabulary_size=subject.backbone.vocabulary_size)
    step = Ours(subject, samples)
    losses: dict[str, float] = {}

    def run(name: str) -> None:
        with ABLATIONS.get(name, nullcontext)(subject):
            step()
        losses[name] = step.loss

    ways: dict[str, Callable[[], object]] = {name: partial(run, name) for name in (OURS, *only, AGAIN)}
    # The first step makes the optimizer's moments, which all later ones hold.
    step()
    title, _ = ROWS[row]
    print(f"\n{title}: {len(samples)} sample(s), {padding(samples):.1%} padding, {subject.dtype}")
    peaks, _ = first_runs(ways, subject.device, needed=OURS)
    seconds = alternate(ways, rounds=rounds, device=subject.device, warm_up=0)
    for name, spent in seconds.items():
        apart = abs(losses[name] - losses[OURS]) / losses[OURS]
        ratio = f"  {ratio_with_spread(spent, seconds[OURS])} times as long, loss {apart:.2%} apart" if name != OURS else ""
        print(f"  {name:24} {median(spent):8.3f} s  peak {peaks[name] / 2**30:5.2f} GiB{ratio}", flush=True)
        if apart > MOST_APART:
            raise SystemExit(f"{name} does not compute the same: that is more than rounding explains")


@contextmanager
def all_logits(subject: Subject) -> Iterator[None]:
    """Vocabulary logits of the context pass too, and of every position of the conversation, labelled or not, at once."""
    backbone = subject.backbone
    read = backbone.memory_states

    def memory_states(*args: Any, **kwargs: Any) -> Tensor:
        with unread_logits(backbone):
            return read(*args, **kwargs)

    def losses(hypernetwork: nn.Module, backbone: Backbone, batch: Batch, _targets: None) -> tuple[Tensor, Tensor]:
        lora = batch.worn(hypernetwork(backbone, batch.context_ids, batch.context_mask, dtype=backbone.dtype))
        logits = backbone.wide_logits(backbone.hidden(batch.input_ids, batch.input_mask, lora=lora)).flatten(0, 1)
        labelled = logits[batch.label_positions - 1]
        return F.cross_entropy(labelled, batch.label_ids, reduction="none"), labelled.argmax(-1) == batch.label_ids

    with patch.object(backbone, "memory_states", memory_states), patch("shine.training.step.label_losses", losses):
        yield


@contextmanager
def labels_at_once(subject: Subject) -> Iterator[None]:
    """The logits of all labels in one piece."""
    with patch.object(subject.backbone, "label_chunks", lambda hidden: [slice(0, len(hidden))]):
        yield


@contextmanager
def fused_attention(subject: Subject) -> Iterator[None]:
    """PyTorch's fused attention, in the backbone and in the M2P transformer; ours on a GPU already."""
    with attending(subject.backbone, attention.FUSED), patch.object(m2p, "mix", F.scaled_dot_product_attention):
        yield


@contextmanager
def blocks_of_queries(_subject: Subject) -> Iterator[None]:
    """Attention of the backbone in blocks of queries however long the sequence, where ours takes the fused kernel in float32."""
    with patch.object(attention, "_fused_is_better", lambda *_: False):
        yield


class _Apart(LayerLoRA):
    """A product with ``A`` for each linear, though some read the same."""

    def add(self, path: str, _group: tuple[str, ...], x: Tensor, output: Tensor) -> Tensor:
        return super().add(path, (path,), x, output)


class _Summed(LayerLoRA):
    """The update as autograd has it, a tensor of its own that is added to another."""

    def add(self, path: str, group: tuple[str, ...], x: Tensor, output: Tensor) -> Tensor:
        return output + torch.matmul(self._project(path, group, x), self._lora[path][1].to(output.dtype)).view_as(output)


@contextmanager
def worn_as(kind: type[LayerLoRA], _subject: Subject) -> Iterator[None]:
    """Another way to wear a LoRA."""
    with patch("shine.backbone.LayerLoRA", kind):
        yield


@contextmanager
def checkpointing(subject: Subject) -> Iterator[None]:
    """Activations computed again in the backward pass."""
    with patch.object(subject.backbone, "activation_checkpointing", True):
        yield


@contextmanager
def one_thread(_subject: Subject) -> Iterator[None]:
    """One thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ABLATIONS: dict[str, Ablation] = {
    "all logits": all_logits,
    "labels at once": labels_at_once,
    "fused attention": fused_attention,
    "blocks of queries": blocks_of_queries,
    "A of each linear alone": partial(worn_as, _Apart),
    "updates summed": partial(worn_as, _Summed),
    "packed rows": lambda subject: packed(subject.backbone),
    "checkpointing": checkpointing,
    "one thread": one_thread,
}


if __name__ == "__main__":
    main()
