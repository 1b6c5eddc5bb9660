"""A training step: ours, the published recipe's, and an ordinary LoRA fine-tuning step, in turns on the same examples.

    python benchmarks/train_step.py                                    # SmolLM2-135M, on two cores
    python benchmarks/train_step.py --model qwen3-8b --batch 1          # random weights of that shape, on a GPU
    python benchmarks/train_step.py --profile                           # where our step spends its time

Useful tokens are those of contexts and conversations; padding and memory tokens are not counted. A share of the matrix rate is the
arithmetic of `shine.flops` over the time, over the rate at which this machine multiplies matrices of the model's shapes. Where the
recipe's float32 does not fit beside the rest (Qwen3-8B on 80 GB), that is said and the others go on.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from machine import alternate, first_runs, ratio_with_spread, show_limits, tf32
from peft import LoraConfig, get_peft_model
from recipe import recipe_flops, recipe_step
from subject import MODELS, Subject, examples, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from shine.chat import IGNORE
from shine.config import StageConfig
from shine.data.batching import pad_left
from shine.data.samples import Sample
from shine.flops import fine_tuning_flops, training_flops
from shine.training.distributed import Ranks
from shine.training.guard import Guard
from shine.training.optimizer import Optimizers, build_optimizer
from shine.training.step import training_step

MQA_LENGTHS = Path(__file__).resolve().parent / "mqa_lengths.json"
"""Context, conversation and label tokens of 64 passages of RACE and SQuAD, each with all its questions, from short to long."""
ROWS = {
    "pretrain": ("full groups of pretraining, 1141/1150", (1141, 1150, 1141)),
    "mqa": ("real mqa lengths (RACE, SQuAD), padded to 1150/1150 by the recipe", (1150, 1150, 0)),
    "1qa": ("long contexts of 1qa, 2380/100", (2380, 100, 30)),
}
MOST_APART = 0.01
"""What bfloat16 may change of a loss."""
MOST_APART_IN_FLOAT32, LEAST_COSINE = 1e-3, 0.999
"""What is left open where both steps compute in float32 (TF32 on a GPU): of the loss, and of the direction of its gradient. Random
labels are hardly easier under the right LoRA than under none, so it is the gradient that tells whether both learn the same.
"""
Anything = TypeVar("Anything", Optimizers, torch.optim.Optimizer, torch.optim.AdamW)
ROWS_OF_LIMIT = 1024
"""Tokens at once at which the matrix rate is measured."""


def main() -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["pretrain", "mqa"])
    parser.add_argument(
        "--batch", type=int, default=2, help="mqa samples in a batch; the other rows take one (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in our backward pass")
    parser.add_argument("--without", nargs="+", choices=("recipe", "peft"), default=[], help="leave a comparison out")
    parser.add_argument("--profile", action="store_true", help="print where our step spends its time, and nothing else")
    args = parser.parse_args()
    # PEFT calls what transformers deprecates.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    subject = load(args.model, device=args.device, activation_checkpointing=args.checkpointing)
    if args.profile:
        for row in args.rows:
            show_profile(subject, lengths_of(row, args.batch))
        return
    rates = show_limits(subject.backbone, rows=(ROWS_OF_LIMIT,))
    for row in args.rows:
        measure(subject, row, batch=args.batch, rounds=args.rounds, rates=rates, without=args.without)


def measure(
    subject: Subject, row: str, *, batch: int, rounds: int, rates: Mapping[tuple[int, torch.dtype], float], without: Sequence[str]
) -> None:
    """One row: seconds of each way in turns, and what they mean."""
    rate, precise_rate = (rates[ROWS_OF_LIMIT, dtype] for dtype in (torch.bfloat16, torch.float32))
    title, (context, conversation, _) = ROWS[row]
    lengths = lengths_of(row, batch)
    samples = examples(lengths, vocabulary_size=subject.backbone.vocabulary_size)
    useful = sum(sample.tokens for sample in samples)
    runs: dict[str, Callable[[], object]] = {"shine": (ours := Ours(subject, samples))}
    if "peft" not in without:
        runs["peft"] = FineTuning(subject, samples)
    if "recipe" not in without:
        # The last: it makes the weights in float32, which the peaks of the others must not count.
        subject.forget_precise()
        runs["recipe"] = (theirs := Theirs(subject, samples, context, conversation))
    # The first step makes the optimizer's moments, after its own peak; on a GPU another one costs nothing.
    peaks, _ = first_runs(runs, subject.device, warm_up=int(subject.device.type == "cuda"))
    learned = gradient(subject.hypernetwork) if "recipe" in runs else None
    seconds = alternate(runs, rounds=rounds, device=subject.device, warm_up=0)
    flops = sum(training_flops(subject.backbone, subject.hypernetwork, read=c, answered=q, labels=n) for c, q, n in lengths)
    print(f"\n{title}: {len(samples)} sample(s), {useful:,} useful tokens, {flops / 1e12:.2f} TFLOP")
    for name in runs:
        spent = median(seconds[name])
        print(f"  {name:8} {spent:8.3f} s  {useful / spent:9,.0f} useful tokens/s  peak {peaks[name] / 2**30:6.2f} GiB", flush=True)
    print(f"  share of the bfloat16 matrix rate: {flops / median(seconds['shine']) / rate:.0%}")
    if learned is not None:
        padded = len(samples) * recipe_flops(
            subject.backbone, subject.hypernetwork, context_length=context, conversation_length=conversation
        )
        bound = padded / flops * rate / precise_rate
        print(f"  against the recipe: {ratio_with_spread(seconds['recipe'], seconds['shine'])} times as fast")
        print(
            f"  with every product of both at the matrix rate: {bound:.2f} "
            f"(arithmetic {padded / flops:.2f}, rates {rate / precise_rate:.2f})"
        )
        # The recipe's was the last of the first runs, so it left the gradient.
        compare(subject, samples, ours=ours.loss, theirs=theirs.loss, learned=learned)
    if "peft" in runs:
        plain = sum(
            fine_tuning_flops(subject.backbone, tokens=c + q, predicted=c + q, rank=subject.hypernetwork.layout.rank)
            for c, q, _ in lengths
        )
        ratio = ratio_with_spread(seconds["peft"], seconds["shine"])
        print(f"  against a LoRA fine-tuning step over the same tokens: {ratio} times as fast")
        print(f"  arithmetic alone allows {plain / flops:.2f}, {ratio.median / (plain / flops):.2f} of it is reached")


def compare(subject: Subject, samples: Sequence[Sample], *, ours: float, theirs: float, learned: Tensor) -> None:
    """Say how far both steps differ, ours in bfloat16 as it is timed and once in float32; more than rounding ends the program.

    Args:
        ours, theirs: losses, in bfloat16 and in float32.
        learned: the recipe's gradient.
    """
    exact = Ours(replace(subject, backbone=subject.precise), samples)
    with tf32():
        exact()
    cosine = float(F.cosine_similarity(gradient(subject.hypernetwork).double(), learned.double(), dim=0))
    rounded, difference = (abs(loss - theirs) / theirs for loss in (ours, exact.loss))
    exactly = f"ours in float32 {difference:.4%}, cosine of gradients {cosine:.5f}"
    print(f"  losses {ours:.4f} and {theirs:.4f}, {rounded:.2%} apart; {exactly}")
    if rounded > MOST_APART or difference > MOST_APART_IN_FLOAT32 or cosine < LEAST_COSINE:
        raise SystemExit("the two steps do not compute the same: that is more than rounding explains")


def lengths_of(row: str, batch: int) -> list[tuple[int, int, int]]:
    """Context, conversation and label tokens of each sample."""
    if row != "mqa":
        return [ROWS[row][1]]
    known = [(context, conversation, labels) for context, conversation, labels in json.loads(MQA_LENGTHS.read_text())]
    mean = sum(context + conversation for context, conversation, _ in known) / len(known)
    # Neighbours in length, as `length_window` makes batches, around the mean.
    return sorted(known, key=lambda lengths: abs(lengths[0] + lengths[1] - mean))[:batch]


class Ours:
    """Our step, whole: collating, both passes, clipping, optimizer."""

    def __init__(self, subject: Subject, samples: Sequence[Sample]) -> None:
        stage = StageConfig("mqa", 8192, 8192, learning_rate=1e-4, warmup_steps=0)
        optimizer = still(build_optimizer(subject.hypernetwork, stage))
        self._step = partial(
            training_step,
            subject.hypernetwork,
            subject.backbone,
            samples,
            optimizer=optimizer,
            micro_batch_size=len(samples),
            clip=1.0,
            pad_id=0,
            ranks=Ranks(),
            guard=Guard(stage),
        )
        self.loss = 0.0

    def __call__(self) -> None:
        self.loss = self._step().loss


class Theirs:
    """The recipe's step."""

    def __init__(self, subject: Subject, samples: Sequence[Sample], context: int, conversation: int) -> None:
        self._subject, self._samples = subject, samples
        self._optimizer = still(torch.optim.AdamW(subject.hypernetwork.parameters()))
        self._lengths = {"context_length": context, "conversation_length": conversation}
        self.loss = 0.0

    def __call__(self) -> None:
        subject = self._subject
        try:
            self.loss = recipe_step(
                subject.hypernetwork, subject.precise, self._samples, optimizer=self._optimizer, **self._lengths
            )
        except torch.OutOfMemoryError:
            # Leaves the device to the others.
            self._optimizer.state.clear()
            subject.forget_precise()
            raise


class FineTuning:
    """An ordinary step of PEFT's LoRA on the same tokens, context and conversation one sequence, through transformers' own loss."""

    def __init__(self, subject: Subject, samples: Sequence[Sample]) -> None:
        hypernetwork = subject.hypernetwork
        config = LoraConfig(r=hypernetwork.layout.rank, target_modules=list(hypernetwork.config.targets))
        self._model = get_peft_model(subject.plain(), config, autocast_adapter_dtype=False)
        self._optimizer = still(torch.optim.AdamW(p for p in self._model.parameters() if p.requires_grad))
        ids, mask = pad_left([sample.context_ids + sample.input_ids for sample in samples], value=0)
        labels, _ = pad_left([[IGNORE] * len(sample.context_ids) + sample.labels for sample in samples], value=IGNORE)
        self._ids, self._labels = ids.to(subject.device), labels.to(subject.device)
        self._mask = None if mask is None else mask.to(subject.device)

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        self._model(input_ids=self._ids, attention_mask=self._mask, labels=self._labels, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()


def gradient(hypernetwork: nn.Module) -> Tensor:
    """What the last step left, as one vector in host memory."""
    found = [parameter.grad for parameter in hypernetwork.parameters()]
    return torch.cat([value.flatten().cpu() for value in found if value is not None])


def still(optimizer: Anything) -> Anything:
    """The optimizer at rate zero: it works and changes nothing, so that each round sees the same weights."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def show_profile(subject: Subject, lengths: Sequence[tuple[int, int, int]]) -> None:
    """The operators that take most of one step of ours."""
    step = Ours(subject, examples(lengths, vocabulary_size=subject.backbone.vocabulary_size))
    step()
    cuda = subject.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        step()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
