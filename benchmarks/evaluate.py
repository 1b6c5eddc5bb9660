"""How many questions a second are answered, with contexts side by side against one by one.

    python benchmarks/evaluate.py                                      # SmolLM2-135M on invented stories
    python benchmarks/evaluate.py sets=squad data.test.squad.path=data/squad --contexts 16 --rounds 5

The contexts are different ones of like length, as an evaluation puts them together. Both ways encode the contexts, wear their
adapters and answer greedily through what ``test.py`` runs; they take turns. Without ``checkpoint=`` the hypernetwork is a random
one: what it knows does not change how long it takes. The machine's own rates stand above, and below what they would allow.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from machine import alternate, configured, ratio_with_spread, show_limits

from shine.chat import token_ids
from shine.checkpoint import load_hypernetwork
from shine.config import EvaluationConfig
from shine.data.examples import Example
from shine.data.sources import read_named
from shine.data.tally import Tally
from shine.evaluation import qa
from shine.evaluation.methods import Method, Shine, Speaker
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone
from shine.pretrained import without_progress_bars


class Runner:
    """The two ways, with the time that each part of each run took."""

    def __init__(self, method: Method, examples: Sequence[Example], config: EvaluationConfig) -> None:
        self.method, self.examples, self.config = method, examples, config
        self.clocks: dict[int, list[qa.Clock]] = {}
        self.answers: dict[int, list[str]] = {}

    def run(self, size: int) -> None:
        """Encode and answer ``size`` contexts at a time."""
        clock, config = qa.Clock(), replace(self.config, batch_size=size)
        rows = []
        for start in range(0, len(self.examples), size):
            group = self.examples[start : start + size]
            rows += qa.predict(self.method, "set", group, config, kind="squad", conversations=False, clock=clock)
        self.clocks.setdefault(size, []).append(clock)
        self.answers[size] = [row.prediction for row in rows]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=16, help="side by side (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=1, help="at most, of each context (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="timed ones (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="as for test.py")
    args = parser.parse_intermixed_args()
    config = configured(
        EvaluationConfig,
        "test",
        ["hypernetwork.rank=6", "hypernetwork.meta_rank=32", "sets=stories", "max_new_tokens=32", *args.overrides],
    )
    with without_progress_bars():
        backbone, tokenizer = load_backbone(config.backbone, targets=config.hypernetwork.targets)
    torch.manual_seed(config.seed)
    hypernetwork = Hypernetwork(config.hypernetwork, backbone).to(backbone.device)
    if config.checkpoint is not None:
        hypernetwork = load_hypernetwork(config.checkpoint, backbone, config=config.hypernetwork)
    speaker = Speaker(backbone, tokenizer, config.prompts, config.backbone.baseline_prefix)
    tally, length = Tally(), config.stage.context_length
    found = read_named(config.data.test, "data.test", tally=tally)
    usable = qa.usable_examples(found, tokenizer, context_length=length, questions=True, tally=tally)
    ranked = sorted(itertools.islice(usable, 10 * args.contexts), key=lambda example: len(token_ids(tokenizer, example.context)))
    if len(ranked) < args.contexts:
        parser.error(f"data.test holds {len(ranked)} contexts with questions: set --contexts to at most that")
    # Neighbours in length, as an evaluation puts them together; from the middle.
    first = (len(ranked) - args.contexts) // 2
    examples = [replace(example, turns=example.turns[: args.questions]) for example in ranked[first : first + args.contexts]]
    rates = show_limits(backbone, rows=(1, args.contexts, 256))
    runner = Runner(Shine("shine", speaker, hypernetwork), examples, config)
    together, alone = f"{args.contexts} at a time", "one by one"
    runs = {together: lambda: runner.run(args.contexts), alone: lambda: runner.run(1)}
    seconds = alternate(runs, rounds=args.rounds, device=backbone.device)
    show(runner, seconds, sizes={together: args.contexts, alone: 1})
    limit = rates[args.contexts, backbone.dtype] / rates[1, backbone.dtype]
    print(f"The products of a decoding step alone would allow {limit:.1f} times as many questions a second.")


def show(runner: Runner, seconds: dict[str, list[float]], *, sizes: dict[str, int]) -> None:
    """Print both ways, the ratio of their rates with its spread, and the same for each part."""
    count = sum(len(example.turns) for example in runner.examples)
    for name, size in sizes.items():
        clocks = runner.clocks[size][-len(seconds[name]) :]
        encode, answer = (statistics.median(getattr(clock, part) for clock in clocks) for part in ("encode", "answer"))
        median = statistics.median(seconds[name])
        print(f"{name}: {count / median:.2f} questions/s ({median:.1f} s: encoding {encode:.1f}, answering {answer:.1f})")
    together, alone = (runner.clocks[size][-len(seconds[name]) :] for name, size in sizes.items())
    parts = {
        part: ratio_with_spread(*([getattr(c, part) for c in clocks] for clocks in (alone, together)))
        for part in ("encode", "answer")
    }
    first, second = sizes
    print(f"times as many questions a second: {ratio_with_spread(seconds[second], seconds[first])}")
    print(f"of it encoding: {parts['encode']}; answering: {parts['answer']}")
    same = sum(a == b for a, b in zip(*runner.answers.values(), strict=True))
    print(f"{same} of {count} answers are the same to the letter")


if __name__ == "__main__":
    main()
