"""Answering: adapters of different contexts side by side, one adapter merged into the weights, and turns that reuse their prompt.

    python benchmarks/generate.py                                      # SmolLM2-135M, on two cores
    python benchmarks/generate.py --model qwen3-8b --batch 16

Every way writes the same number of new tokens after the same prompts, greedily, with a KV cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from machine import alternate, peak_memory, ratio_with_spread, show_limits
from subject import MODELS, Subject, load, tokens
from torch import Tensor

from shine.backbone import Backbone
from shine.lora import LoRA
from shine.prompt_cache import PromptCache


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
    args = parser.parse_args()
    subject = load(args.model, device=args.device)
    rates = show_limits(subject.backbone, rows=(1, args.batch))
    print(f"\n{args.model}: {args.batch} questions of {args.prompt} tokens, {args.new} new tokens each")
    with torch.inference_mode():
        lora = subject.hypernetwork(subject.backbone, tokens(args.batch, args.context, subject.backbone), None)
    ways = answering(subject, lora, prompt=args.prompt, new=args.new)
    seconds = alternate(ways, rounds=args.rounds, device=subject.device)
    for name, times in seconds.items():
        ratio = ratio_with_spread(seconds["one by one"], times)
        print(f"{name:34} {median(times):8.3f} s  {args.batch / median(times):7.2f} answers/s  {ratio} times as fast as one by one")
    talks = conversation(subject, lora.select([0]), turns=args.turns, prompt=args.prompt, new=args.new)
    spent = alternate(talks, rounds=args.rounds, device=subject.device)
    print(
        f"a conversation of {args.turns} turns: {median(spent['kept']):.3f} s with what earlier turns computed kept, "
        f"{median(spent['anew']):.3f} s without: {ratio_with_spread(spent['anew'], spent['kept'])} times as fast"
    )
    limit = rates[args.batch, subject.backbone.dtype] / rates[1, subject.backbone.dtype]
    print(f"The products of a decoding step alone would allow {limit:.1f} times as many answers a second side by side.")
    print(f"peak, side by side: {peak_memory(ways['side by side'], subject.device) / 2**30:.2f} GiB")


def answering(subject: Subject, lora: LoRA, *, prompt: int, new: int) -> dict[str, Callable[[], object]]:
    """Ways to answer one question under each adapter of ``lora``; each takes the whole batch through."""
    questions = tokens(lora.batch, prompt, subject.backbone)
    seen = torch.ones_like(questions)

    def generate(backbone: Backbone, rows: slice, lora: LoRA | None) -> None:
        backbone.generate(questions[rows], seen[rows], lora=lora, max_new_tokens=new, min_new_tokens=new, stop_ids=None, pad_id=0)

    rows = [slice(number, number + 1) for number in range(lora.batch)]
    alone = [lora.select([number]) for number in range(lora.batch)]
    merged = subject.backbone.merged(alone[0])

    def one_by_one() -> None:
        for row, adapter in zip(rows, alone, strict=True):
            generate(subject.backbone, row, adapter)

    def one_by_one_merged() -> None:
        for row in rows:
            generate(merged, row, None)

    return {
        "one by one": one_by_one,
        "one by one, one adapter merged": one_by_one_merged,
        "side by side": lambda: generate(subject.backbone, slice(None), lora),
        "side by side, one adapter merged": lambda: generate(merged, slice(None), None),
        "side by side, no adapter": lambda: generate(subject.backbone, slice(None), None),
    }


def conversation(subject: Subject, lora: LoRA, *, turns: int, prompt: int, new: int) -> dict[str, Callable[[], Tensor]]:
    """A conversation about one context: each turn adds a question and its answer, with a cache of the prompt and without."""
    backbone = subject.backbone
    questions = tokens(turns, prompt, backbone)

    def talk(kept: PromptCache | None) -> Tensor:
        if kept is not None:
            kept.wear(lora)
        said = questions[:1, :0]
        for question in questions.split(1):
            said = torch.cat([said, question], dim=1)
            options = {"max_new_tokens": new, "min_new_tokens": new, "stop_ids": None, "pad_id": 0}
            said = torch.cat([said, backbone.generate(said, torch.ones_like(said), lora=lora, cache=kept, **options)], dim=1)
        return said

    return {"kept": lambda: talk(PromptCache()), "anew": lambda: talk(None)}


if __name__ == "__main__":
    main()
