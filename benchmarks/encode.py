"""Encoding a context: against a plain forward pass over as many tokens, and by the length of the context.

    python benchmarks/encode.py                                        # SmolLM2-135M, on two cores
    python benchmarks/encode.py --model qwen3-8b --lengths 256 1024 4096

The plain pass is the backbone's own over context and memory tokens, without vocabulary logits. Encoding does more: the meta LoRA in
every linear and the M2P transformer at the end. How much more is arithmetic (`shine.flops`); what the time adds beyond it is ours.
Below stands the published recipe's way for contexts that it has room for: float32, padded to the maximum, with vocabulary logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from machine import FORWARD_FORMULA, Ratio, alternate, peak_memory, ratio_with_spread, show_limits, show_profile, tf32
from recipe import as_published, compare_adapters, recipe_lora
from subject import DTYPES, MODELS, Subject, load, tokens

from shine.flops import encoding_flops, forward_flops
from shine.lora import LoRA

PADDED = 1150
"""To how many tokens the recipe pads a context."""


def main() -> None:
    """Measure every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[256, 1024, 4096], help="tokens of the context (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of ours; auto: bfloat16, or float32 where that is slow")
    parser.add_argument("--without-recipe", action="store_true", help="leave the published way out")
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time, and nothing else")
    args = parser.parse_args()
    subject = load(args.model, device=args.device, dtype=args.dtype)
    if args.profile:
        for length in args.lengths:
            show_profile(encoder(subject, length), subject.device)
        return
    rates = show_limits(subject.backbone, rows=args.lengths)
    print(f"\n{args.model}, {subject.hypernetwork.memory_tokens.shape[0]} memory tokens; arithmetic: {FORWARD_FORMULA}")
    head = f"{'context':>8} {'encoding':>10} {'a token':>10} {'plain pass':>11} {'times as long':>28}"
    print(f"{head} {'arithmetic':>11} {'of it':>6} {'of the rate':>12} {'peak':>10}")
    a_token: list[float] = []
    for length in args.lengths:
        encoding, plain, peak = measure(subject, length, rounds=args.rounds)
        ratio = ratio_with_spread(encoding, plain)
        spent = median(encoding)
        a_token.append(spent / length)
        rate = rates[length, subject.backbone.dtype]
        print(_line(subject, length, spent=spent, plain=median(plain), ratio=ratio, peak=peak, rate=rate), flush=True)
    print(f"\na token of {args.lengths[-1]:,} takes {a_token[-1] / a_token[0]:.2f} times as long as one of {args.lengths[0]:,}")
    if not args.without_recipe:
        try:
            for length in (length for length in args.lengths if length <= PADDED):
                against_the_recipe(subject, length, rounds=args.rounds)
        except torch.OutOfMemoryError:
            print("against the recipe: out of memory")


def against_the_recipe(subject: Subject, length: int, *, rounds: int) -> None:
    """Our encoding and the recipe's in turns, and how far their adapters are apart; more than rounding ends the program."""
    precise, hypernetwork, found = subject.precise, subject.hypernetwork, dict[str, LoRA]()
    ids = tokens(1, length, subject.backbone)
    context = ids[0].tolist()

    @torch.inference_mode()
    def ours() -> None:
        found["ours"] = hypernetwork(subject.backbone, ids, None)

    @torch.inference_mode()
    def theirs() -> None:
        with as_published():
            found["theirs"] = recipe_lora(hypernetwork, precise, context, context_length=PADDED)

    ours()
    peak = peak_memory(theirs, subject.device)
    seconds = alternate({"ours": ours, "theirs": theirs}, rounds=rounds, device=subject.device, warm_up=0)
    with torch.inference_mode(), tf32():
        exact = hypernetwork(precise, ids, None)
    apart = compare_adapters(found["theirs"], ours=found["ours"], exact=exact)
    rates = [length / median(seconds[name]) for name in ("ours", "theirs")]
    print(
        f"a context of {length:,} against the recipe: {rates[0]:,.0f} and {rates[1]:,.0f} useful tokens/s, "
        f"{ratio_with_spread(seconds['theirs'], seconds['ours'])} times as fast; peak of the recipe {peak / 2**30:.2f} GiB; "
        f"{apart}"
    )


def encoder(subject: Subject, length: int) -> Callable[[], None]:
    """What encodes one context of this length."""
    context = tokens(1, length, subject.backbone)

    @torch.inference_mode()
    def encode() -> None:
        subject.hypernetwork(subject.backbone, context, None)

    return encode


def measure(subject: Subject, length: int, *, rounds: int) -> tuple[list[float], list[float], int]:
    """Seconds of encoding and of the plain pass in each round, and the bytes held while encoding."""
    backbone, hypernetwork = subject.backbone, subject.hypernetwork
    longer = tokens(1, length + hypernetwork.memory_tokens.shape[0], backbone)

    encode = encoder(subject, length)

    @torch.inference_mode()
    def read() -> None:
        backbone.hidden(longer, None, lora=None)

    runs: dict[str, Callable[[], object]] = {"encode": encode, "read": read}
    # The run that is looked at is the warm-up too.
    read()
    peak = peak_memory(encode, subject.device)
    seconds = alternate(runs, rounds=rounds, device=subject.device, warm_up=0)
    return seconds["encode"], seconds["read"], peak


def _line(subject: Subject, length: int, *, spent: float, plain: float, ratio: Ratio, peak: int, rate: float) -> str:
    memory = subject.hypernetwork.memory_tokens.shape[0]
    more = encoding_flops(subject.backbone, subject.hypernetwork, read=length)
    allowed = more / forward_flops(subject.backbone, tokens=length + memory, predicted=0)
    spread = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return (
        f"{length:>8,} {spent:>8.3f} s {spent / length * 1e6:>7,.0f} us {plain:>9.3f} s {spread:>28} {allowed:>11.2f} "
        f"{ratio.median / allowed:>6.2f} {more / spent / rate:>12.0%} {peak / 2**30:>6.2f} GiB"
    )


if __name__ == "__main__":
    main()
