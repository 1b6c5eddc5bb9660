"""Answering: adapters of different contexts side by side, one adapter merged into the weights, and turns that reuse their prompt.

    python benchmarks/generate.py                                      # SmolLM2-135M, on two cores
    python benchmarks/generate.py --model qwen3-8b --batch 16

Every way writes the same number of new tokens after the same prompts, greedily, with a KV cache. The recipe's way is one question
after the other in float32; what encoding anew for each question costs beside is in ``evaluate.py``. Useful tokens are those of the
questions and of the answers. A merged adapter is compared with the same one worn by every question. That an adapter does side by
side what it does alone is looked at by what it changes of the hidden states.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from machine import FORWARD_FORMULA, alternate, first_runs, ratio_with_spread, show_limits, show_profile, tf32
from recipe import as_published
from subject import DTYPES, MODELS, Subject, load, tokens
from torch import Tensor
from torch.nn import functional as F

from shine.backbone import Backbone
from shine.flops import answering_flops
from shine.lora import LoRA
from shine.prompt_cache import PromptCache

RECIPE = "recipe: one by one, float32"
WANTED = ("one by one", "side by side")
"""The ways that must be so many times apart."""
MERGED = {
    "one by one": "one by one, one adapter merged",
    "side by side, one adapter worn": "side by side, one adapter merged",
}
"""Ways that wear adapters of batch one, and the same with one inside the weights."""
MOST_APART = 0.03
"""What bfloat16 may change of the loss of what was written."""
FARTHEST, FARTHEST_IN_FLOAT32 = 0.4, 0.01
"""What rounding may change of the effect of any adapter (`effects_apart`): on SmolLM2-135M up to 0.23 was seen in bfloat16, where
the effect of another context's adapter is 0.53 away or more.
"""


def main() -> None:
    """Measure the ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=16, help="contexts side by side (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a question (default: %(default)s)")
    parser.add_argument("--context", type=int, default=344, help="tokens of a context (default: %(default)s)")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="of a conversation (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of ours; auto: bfloat16, or float32 where that is slow")
    parser.add_argument("--without-recipe", action="store_true", help="leave the published way out")
    parser.add_argument("--brief", action="store_true", help="one by one and side by side, and nothing else")
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time, and nothing else")
    args = parser.parse_args()
    subject = load(args.model, device=args.device, dtype=args.dtype)
    with torch.inference_mode():
        lora = subject.hypernetwork(subject.backbone, tokens(args.batch, args.context, subject.backbone), None)
    ways = answering(subject, lora, prompt=args.prompt, new=args.new, recipe=not (args.without_recipe or args.brief))
    if args.brief:
        ways = {name: ways[name] for name in WANTED}
    if args.profile:
        show_profile(ways["side by side"], subject.device)
        return
    rates = show_limits(subject.backbone, rows=(1, args.batch))
    print(f"\n{args.model}: {args.batch} questions of {args.prompt} tokens, {args.new} new tokens each")
    peaks, said = first_runs(ways, subject.device, needed="side by side")
    if RECIPE not in ways:
        subject.forget_precise()
    seconds = alternate(dict[str, Callable[[], object]](ways), rounds=args.rounds, device=subject.device, warm_up=0)
    useful = args.batch * (args.prompt + args.new)
    for name, times in seconds.items():
        spent, ratio = median(times), ratio_with_spread(seconds["one by one"], times)
        print(
            f"{name:34} {spent:8.3f} s  {args.batch / spent:6.2f} answers/s  {useful / spent:6,.0f} useful tokens/s  "
            f"peak {peaks[name] / 2**30:5.2f} GiB  {ratio} times as fast as one by one"
        )
    flops = args.batch * answering_flops(subject.backbone, prompt=args.prompt, new=args.new, rank=lora.rank)
    share = flops / median(seconds["side by side"]) / rates[args.batch, subject.backbone.dtype]
    print(
        f"share of the {subject.dtype} matrix rate at {args.batch} rows, side by side: {share:.0%} of {flops / 1e12:.2f} TFLOP "
        f"({FORWARD_FORMULA})"
    )
    for worn, merged in MERGED.items():
        if {worn, merged} <= seconds.keys():
            print(f"{merged}, against wearing it: {ratio_with_spread(seconds[worn], seconds[merged])} times as fast")
    same = sum(torch.equal(*rows) for rows in zip(*(said[name] for name in WANTED), strict=True))
    print(f"{same} of {args.batch} answers are the same side by side and one by one")
    if RECIPE in ways:
        print(f"against the recipe: {ratio_with_spread(seconds[RECIPE], seconds['side by side'])} times as fast")
        compare(subject, lora, said[RECIPE], prompt=args.prompt)
    limit = rates[args.batch, subject.backbone.dtype] / rates[1, subject.backbone.dtype]
    print(f"The products of a decoding step alone would allow {limit:.1f} times as many answers a second side by side.")
    if args.brief:
        return
    talks = conversation(subject, lora.select([0]), turns=args.turns, prompt=args.prompt, new=args.new)
    spent = alternate(talks, rounds=args.rounds, device=subject.device)
    print(
        f"a conversation of {args.turns} turns: {median(spent['kept']):.3f} s with what earlier turns computed kept, "
        f"{median(spent['anew']):.3f} s without: {ratio_with_spread(spent['anew'], spent['kept'])} times as fast"
    )


def answering(subject: Subject, lora: LoRA, *, prompt: int, new: int, recipe: bool) -> dict[str, Callable[[], Tensor]]:
    """Ways to answer as many questions as ``lora`` has adapters, each under its own or all under the first; each way takes the
    whole batch through and returns what it wrote.

    The recipe's, where it is asked for, is the last: it makes the weights in float32.
    """
    questions = tokens(lora.batch, prompt, subject.backbone)
    seen = torch.ones_like(questions)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "stop_ids": None, "pad_id": 0}

    def generate(backbone: Backbone, rows: slice, lora: LoRA | None) -> Tensor:
        return backbone.generate(questions[rows], seen[rows], lora=lora, **options)

    rows = [slice(number, number + 1) for number in range(lora.batch)]
    alone = [lora.select([number]) for number in range(lora.batch)]
    # Made by the first who asks, so that the ways before do not hold it.
    merged = functools.cache(lambda: subject.backbone.merged(alone[0]))
    # Once, as an evaluation and a conversation do it, not at each token.
    worn = lora.to(dtype=subject.backbone.dtype)
    worn_alone = [worn.select([number]) for number in range(lora.batch)]

    def one_by_one(backbone: Backbone, adapters: Sequence[LoRA]) -> Tensor:
        return torch.cat([generate(backbone, row, adapter) for row, adapter in zip(rows, adapters, strict=True)])

    def published() -> Tensor:
        with as_published():
            return one_by_one(subject.precise, alone)

    ways: dict[str, Callable[[], Tensor]] = {
        "one by one": lambda: one_by_one(subject.backbone, worn_alone),
        "side by side": lambda: generate(subject.backbone, slice(None), worn),
        "side by side, no adapter": lambda: generate(subject.backbone, slice(None), None),
        "side by side, one adapter worn": lambda: generate(subject.backbone, slice(None), worn_alone[0]),
        "one by one, one adapter merged": lambda: torch.cat([generate(merged(), row, None) for row in rows]),
        "side by side, one adapter merged": lambda: generate(merged(), slice(None), None),
    }
    if recipe:
        ways[RECIPE] = published
    return ways


@torch.inference_mode()
def compare(subject: Subject, lora: LoRA, written: Tensor, *, prompt: int) -> None:
    """Say how far side by side is from what the recipe computes: by the loss of what the recipe wrote, in bfloat16, and by what
    each adapter does (`effects_apart`); more than rounding ends the program."""
    ids = torch.cat([tokens(lora.batch, prompt, subject.backbone), written], dim=1)

    def loss(backbone: Backbone) -> float:
        hidden = backbone.hidden(ids, None, lora=lora.to(dtype=backbone.dtype))[:, prompt - 1 : -1]
        return float(F.cross_entropy(backbone.logits(hidden).float().flatten(0, 1), written.flatten()))

    with tf32():
        ours, theirs = loss(subject.backbone), loss(subject.precise)
    apart = abs(ours - theirs) / theirs
    rounded, exact = effects_apart(subject, lora, ids)
    print(f"losses of what the recipe wrote {ours:.4f} and {theirs:.4f}, {apart:.2%} apart")
    print(f"what an adapter does side by side and alone: {rounded:.1%} apart, in float32 {exact:.4%}")
    if not (apart <= MOST_APART and rounded <= FARTHEST and exact <= FARTHEST_IN_FLOAT32):
        raise SystemExit("the two ways do not compute the same: that is more than rounding explains")


@torch.inference_mode()
def effects_apart(subject: Subject, lora: LoRA, ids: Tensor) -> tuple[float, float]:
    """How far the change that an adapter, side by side, makes to the hidden states of its row of ``ids`` is from the change that it
    makes alone in float32, relative to the latter's norm, in the median over positions: the farthest of all adapters, in bfloat16
    and in float32. Some positions of random tokens are so near an edge that rounding tips them over.

    The adapters are strengthened until they change the states by half. As they come they change a twentieth, and rounding to
    bfloat16 is a third of that: adapters of two contexts, exchanged, would hardly be farther.
    """

    def changes(backbone: Backbone, worn: Sequence[LoRA]) -> Tensor:
        rows = ids.split(len(ids) // len(worn))
        hidden = [backbone.hidden(row, None, lora=each.to(dtype=backbone.dtype)) for row, each in zip(rows, worn, strict=True)]
        return torch.cat(hidden).float() - backbone.hidden(ids, None, lora=None).float()

    def alone(lora: LoRA) -> Tensor:
        return changes(subject.precise, [lora.select([number]) for number in range(lora.batch)])

    strong = lora.scale(float(subject.precise.hidden(ids, None, lora=None).norm() / alone(lora).norm()) / 2)
    expected = alone(strong)
    rounded, exact = (
        float(((changes(backbone, [strong]) - expected).norm(dim=2) / expected.norm(dim=2)).median(dim=1).values.max())
        for backbone in (subject.backbone, subject.precise)
    )
    return rounded, exact


def conversation(subject: Subject, lora: LoRA, *, turns: int, prompt: int, new: int) -> dict[str, Callable[[], Tensor]]:
    """A conversation about one context: each turn adds a question and its answer, with a cache of the prompt and without."""
    backbone = subject.backbone
    # Once, as the product does it.
    worn = lora.to(dtype=backbone.dtype)
    questions = tokens(turns, prompt, backbone)

    def talk(kept: PromptCache | None) -> Tensor:
        if kept is not None:
            kept.wear(worn)
        said = questions[:1, :0]
        for question in questions.split(1):
            said = torch.cat([said, question], dim=1)
            options = {"max_new_tokens": new, "min_new_tokens": new, "stop_ids": None, "pad_id": 0}
            said = torch.cat([said, backbone.generate(said, torch.ones_like(said), lora=worn, cache=kept, **options)], dim=1)
        return said

    return {"kept": lambda: talk(PromptCache()), "anew": lambda: talk(None)}


if __name__ == "__main__":
    main()
