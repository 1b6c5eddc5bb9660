"""A training step: ours, the published recipe's, and an ordinary LoRA fine-tuning step, in turns on the same examples.

    python benchmarks/train_step.py                                    # SmolLM2-135M, on two cores
    python benchmarks/train_step.py --model qwen3-8b --batch 1          # random weights of that shape, on a GPU
    python benchmarks/train_step.py --profile shine                     # where our step spends its time, or recipe, or peft
    python benchmarks/train_step.py --rows 1qa --questions 4            # four questions of one context, which ours reads once

Useful tokens are those of contexts and conversations; padding and memory tokens are not counted. A share of the matrix rate is the
arithmetic of `shine.flops` over the time, over the rate at which this machine multiplies matrices of the model's shapes. Where the
recipe's float32 does not fit beside the rest (Qwen3-8B on 80 GB), that is said and the others go on.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import torch
from float64 import in_float64
from machine import alternate, first_runs, ratio_with_spread, show_limits, show_profile
from peft import LoraConfig, get_peft_model
from recipe import recipe_flops, recipe_step
from subject import DTYPES, MODELS, Subject, examples, load
from torch import Tensor, nn

from shine.chat import IGNORE
from shine.config import StageConfig
from shine.data.batching import collate, pad_left
from shine.data.samples import Sample
from shine.flops import fine_tuning_flops, training_flops
from shine.training.distributed import Ranks
from shine.training.guard import Guard
from shine.training.optimizer import build_optimizer
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
MOST_APART_IN_FLOAT64 = 1e-6
"""What is left open in float64, of a loss and of its gradient. Random labels are hardly easier under the right LoRA than under
none, so it is the gradient that tells whether both learn the same.
"""
SHORT, SHORT_PADDED = ((40, 24, 10), (25, 36, 12)), 48
"""Samples that are compared in float64, and to how many tokens the recipe pads them."""
UNCLIPPED = 1e9
"""The norm is computed as ever, and whole gradients can be compared."""
ROWS_OF_LIMIT = 1024
"""Tokens at once at which the matrix rate is measured."""


def main() -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["pretrain", "mqa"])
    parser.add_argument("--batch", type=int, help="samples in a batch (default: two of mqa, one of the others)")
    parser.add_argument("--questions", type=int, default=1, help="conversations about each context (as 1qa can have them)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of ours; auto: bfloat16, or float32 where that is slow")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in our backward pass")
    parser.add_argument("--without", nargs="+", choices=("recipe", "peft"), default=[], help="leave a comparison out")
    parser.add_argument("--profile", choices=WAYS, help="print where a step of this way spends its time, and nothing else")
    args = parser.parse_args()
    # PEFT calls what transformers deprecates.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    subject = load(args.model, device=args.device, dtype=args.dtype, activation_checkpointing=args.checkpointing)
    if args.profile:
        for row in args.rows:
            lengths = lengths_of(row, args.batch)
            samples = examples(lengths, vocabulary_size=subject.backbone.vocabulary_size, of_each=args.questions)
            show_profile(WAYS[args.profile](subject, samples, row), subject.device)
        return
    rates = show_limits(subject.backbone, rows=(ROWS_OF_LIMIT,))
    for row in args.rows:
        lengths = lengths_of(row, args.batch)
        measure(subject, row, lengths, questions=args.questions, rounds=args.rounds, rates=rates, without=args.without)


def measure(
    subject: Subject,
    row: str,
    lengths: Sequence[tuple[int, int, int]],
    *,
    questions: int,
    rounds: int,
    rates: Mapping[tuple[int, torch.dtype], float],
    without: Sequence[str],
) -> None:
    """One row, ``questions`` conversations about each context: seconds of each way in turns, and what they mean."""
    rate, precise_rate = (rates[ROWS_OF_LIMIT, dtype] for dtype in (subject.backbone.dtype, torch.float32))
    title, (context, conversation, _) = ROWS[row]
    samples = examples(lengths, vocabulary_size=subject.backbone.vocabulary_size, of_each=questions)
    useful = sum(sample.tokens for sample in samples)
    # From what holds little to what holds much (the recipe makes the weights in float32): a peak has in it what those before hold.
    subject.forget_precise()
    ways = {name: make(subject, samples, row) for name, make in WAYS.items() if name not in without}
    runs: dict[str, Callable[[], object]] = dict(ways)
    # The first step makes the optimizer's moments, after its own peak; on a GPU another one costs nothing.
    peaks, _ = first_runs(runs, subject.device, warm_up=int(subject.device.type == "cuda"), needed="shine")
    seconds = alternate(runs, rounds=rounds, device=subject.device, warm_up=0)
    flops = sum(useful_flops(subject, *each, questions=questions) for each in lengths)
    print(
        f"\n{title}: {len(samples)} sample(s), {useful:,} useful tokens, {padding(samples):.1%} padding, {flops / 1e12:.2f} TFLOP "
        "(4N a token for frozen linears, 6N for trained ones, attention below the diagonal)"
    )
    for name in runs:
        spent = median(seconds[name])
        print(f"  {name:8} {spent:8.3f} s  {useful / spent:9,.0f} useful tokens/s  peak {peaks[name] / 2**30:6.2f} GiB", flush=True)
    print(f"  share of the {subject.dtype} matrix rate: {flops / median(seconds['shine']) / rate:.0%}")
    if "recipe" in runs:
        padded = len(samples) * recipe_flops(
            subject.backbone, subject.hypernetwork, context_length=context, conversation_length=conversation
        )
        print(f"  the recipe's share of the float32 matrix rate: {padded / median(seconds['recipe']) / precise_rate:.0%}")
        print(f"  against the recipe: {ratio_with_spread(seconds['recipe'], seconds['shine'])} times as fast", end="; ")
        at_its_best = [padded / precise_rate] * rounds
        print(f"against one at the whole float32 rate: {ratio_with_spread(at_its_best, seconds['shine'])}")
        print(
            f"  with every product of both at the matrix rate: {padded / flops * rate / precise_rate:.2f} "
            f"(arithmetic {padded / flops:.2f}, rates {rate / precise_rate:.2f})"
        )
        compare(subject, ways, questions=questions)
    if "peft" in runs:
        against_peft(subject, [each for each in lengths for _ in range(questions)], seconds, flops=flops)


def against_peft(
    subject: Subject, lengths: Sequence[tuple[int, int, int]], seconds: Mapping[str, Sequence[float]], *, flops: float
) -> None:
    """Say how we stand to an ordinary LoRA step, and how much of what arithmetic allows that is."""
    rank = subject.hypernetwork.layout.rank
    plain = sum(fine_tuning_flops(subject.backbone, tokens=c + q, predicted=c + q, rank=rank) for c, q, _ in lengths)
    ratio = ratio_with_spread(seconds["peft"], seconds["shine"])
    print(f"  against a LoRA fine-tuning step over the same tokens: {ratio} times as fast")
    print(f"  arithmetic alone allows {plain / flops:.2f}, {ratio.median / (plain / flops):.2f} of it is reached")


def useful_flops(subject: Subject, read: int, answered: int, labels: int, *, questions: int = 1) -> float:
    """Of our step on one context and so many conversations; what checkpointing computes again is of no use."""
    count = partial(training_flops, subject.backbone, subject.hypernetwork, read=read, recomputed=False)
    encoding = count(answered=0, labels=0)
    return questions * count(answered=answered, labels=labels) - (questions - 1) * encoding


def padding(samples: Sequence[Sample]) -> float:
    """Share of the tokens that our passes see."""
    batch = collate(samples, pad_id=0)
    grids = ((batch.context_ids, batch.context_mask), (batch.input_ids, batch.input_mask))
    filled = sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in grids)
    return 1 - filled / sum(ids.numel() for ids, _ in grids)


def compare(subject: Subject, ways: Mapping[str, Way], *, questions: int) -> None:
    """Say how far our step and the recipe's differ: as they are timed by their losses, and in float64 on short samples by loss and
    gradient; more than rounding ends the program.
    """
    ours, theirs = (ways[name].loss for name in ("shine", "recipe"))
    rounded = abs(ours - theirs) / theirs
    print(f"  losses {ours:.4f} and {theirs:.4f}, {rounded:.2%} apart", end="; ")
    try:
        difference, turned = exactly_apart(subject, questions=questions)
    except torch.OutOfMemoryError:
        print("not compared in float64: out of memory")
        difference = turned = 0.0
    else:
        print(f"of short samples in float64 {difference:.1e}, gradients {turned:.1e}")
    if rounded > MOST_APART or max(difference, turned) > MOST_APART_IN_FLOAT64:
        raise SystemExit("the two steps do not compute the same: that is more than rounding explains")


def exactly_apart(subject: Subject, *, questions: int) -> tuple[float, float]:
    """How far our step and the recipe's are apart in float64, relative to the recipe's: their losses, and their gradients."""
    exact = in_float64(subject)
    samples = examples(SHORT, vocabulary_size=subject.backbone.vocabulary_size, of_each=questions)
    ours = Ours(exact, samples)
    ours()
    found = gradient(exact.hypernetwork)
    loss = recipe_step(
        exact.hypernetwork,
        exact.backbone,
        samples,
        optimizer=still(torch.optim.AdamW(exact.hypernetwork.parameters())),
        context_length=SHORT_PADDED,
        conversation_length=SHORT_PADDED,
        clip=UNCLIPPED,
    )
    learned = gradient(exact.hypernetwork)
    return abs(ours.loss - loss) / loss, float((found - learned).norm() / learned.norm())


def lengths_of(row: str, batch: int | None) -> list[tuple[int, int, int]]:
    """Context, conversation and label tokens of each sample."""
    if row != "mqa":
        return [ROWS[row][1]] * (batch or 1)
    known = [(context, conversation, labels) for context, conversation, labels in json.loads(MQA_LENGTHS.read_text())]
    mean = sum(context + conversation for context, conversation, _ in known) / len(known)
    batch = batch or 2
    # As training makes micro-batches: neighbours in length by `length_window`, of which those of like contexts are put together.
    near = sorted(sorted(known, key=lambda lengths: abs(lengths[0] + lengths[1] - mean))[: 8 * batch])
    starts = range(len(near) - batch + 1)
    return min((near[start : start + batch] for start in starts), key=lambda some: (some[-1][0] - some[0][0], some))


class HasGroups(Protocol):
    """An optimizer of torch's, or several that step together."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


Grouped = TypeVar("Grouped", bound=HasGroups)


class Way(Protocol):
    """One way to do a step, with the loss of its last one."""

    loss: float

    def __call__(self) -> None: ...


class Ours:
    """Our step, whole: collating, both passes, clipping, optimizer."""

    def __init__(self, subject: Subject, samples: Sequence[Sample], _row: str = "") -> None:
        stage = StageConfig("mqa", 8192, 8192, learning_rate=1e-4, warmup_steps=0)
        optimizer = still(build_optimizer(subject.hypernetwork, stage))
        self._step = partial(
            training_step,
            subject.hypernetwork,
            subject.backbone,
            samples,
            optimizer=optimizer,
            micro_batch_size=len(samples),
            clip=UNCLIPPED,
            pad_id=0,
            ranks=Ranks(),
            guard=Guard(stage),
        )
        self.loss = 0.0

    def __call__(self) -> None:
        self.loss = self._step().loss


class Theirs:
    """The recipe's step."""

    def __init__(self, subject: Subject, samples: Sequence[Sample], row: str) -> None:
        self._subject, self._samples = subject, samples
        _, (context, conversation, _) = ROWS[row]
        self._optimizer = still(torch.optim.AdamW(subject.hypernetwork.parameters()))
        self._lengths = {"context_length": context, "conversation_length": conversation}
        self.loss = 0.0

    def __call__(self) -> None:
        subject = self._subject
        try:
            self.loss = recipe_step(
                subject.hypernetwork, subject.precise, self._samples, optimizer=self._optimizer, clip=UNCLIPPED, **self._lengths
            )
        except torch.OutOfMemoryError:
            # Leaves the device to the others.
            self._optimizer.state.clear()
            subject.forget_precise()
            raise


class FineTuning:
    """An ordinary step of PEFT's LoRA on the same tokens, context and conversation one sequence, through transformers' own loss."""

    def __init__(self, subject: Subject, samples: Sequence[Sample], _row: str) -> None:
        hypernetwork = subject.hypernetwork
        config = LoraConfig(r=hypernetwork.layout.rank, target_modules=list(hypernetwork.config.targets))
        model = subject.plain()
        if model.dtype == torch.float32:
            # Its own: ours pays in bfloat16 alone on sequences as long as these.
            model.set_attn_implementation("sdpa")
        self._model = get_peft_model(model, config, autocast_adapter_dtype=False)
        self._optimizer = still(torch.optim.AdamW(p for p in self._model.parameters() if p.requires_grad))
        ids, mask = pad_left([sample.context_ids + sample.input_ids for sample in samples], value=0)
        labels, _ = pad_left([[IGNORE] * len(sample.context_ids) + sample.labels for sample in samples], value=IGNORE)
        self._ids, self._labels = ids.to(subject.device), labels.to(subject.device)
        self._mask = None if mask is None else mask.to(subject.device)
        self.loss = 0.0

    def __call__(self) -> None:
        self._optimizer.zero_grad()
        loss = self._model(input_ids=self._ids, attention_mask=self._mask, labels=self._labels, use_cache=False).loss
        loss.backward()
        self.loss = float(loss.detach())
        nn.utils.clip_grad_norm_(self._model.parameters(), UNCLIPPED)
        self._optimizer.step()


WAYS: Mapping[str, Callable[[Subject, Sequence[Sample], str], Way]] = {"peft": FineTuning, "shine": Ours, "recipe": Theirs}


def gradient(hypernetwork: nn.Module) -> Tensor:
    """What the last step left, as one vector in host memory."""
    found = [parameter.grad for parameter in hypernetwork.parameters()]
    return torch.cat([value.flatten().cpu() for value in found if value is not None])


def still(optimizer: Grouped) -> Grouped:
    """The optimizer at rate zero: it works and changes nothing, so that each round sees the same weights."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


if __name__ == "__main__":
    main()
