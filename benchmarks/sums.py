"""What adding adapters up costs in answers: the table of docs/adapters.md on sums and means.

python benchmarks/sums.py                    48 contexts of the CPU world, joined 1, 2, 3, 4 and 8 at a time
python benchmarks/sums.py --contexts 8       fewer of them
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from shine import LoRA, Shine
from shine.data.worlds import World

SEED = 3000
GROUPS = (1, 2, 3, 4, 8)
LONGEST = 16
"""Tokens of an answer; right ones have a few."""


@dataclass(frozen=True)
class Score:
    """Exact answers to the questions of all contexts, each group of which is one adapter: their sum, or their mean."""

    joined: int
    questions: int
    sum: int
    mean: int


def score(shine: Shine, *, contexts: int, joined: int) -> Score:
    """Ask about the first ``contexts`` of the CPU world's test seed, ``joined`` of them in each adapter."""
    examples = [World(seed=SEED).example(index) for index in range(contexts)]
    right = {"sum": 0, "mean": 0}
    for start in range(0, contexts, joined):
        group = examples[start : start + joined]
        total = LoRA.concat([shine.encode(example.context) for example in group])
        for name, lora in (("sum", total), ("mean", total.scale(1 / len(group)))):
            for example in group:
                right[name] += sum(
                    shine.chat(lora, turn.question, max_new_tokens=LONGEST) in turn.answers for turn in example.turns
                )
    return Score(joined, sum(len(example.turns) for example in examples), right["sum"], right["mean"])


def table(scores: Sequence[Score]) -> str:
    """The scores in Markdown."""
    means = ("" if each.joined == 1 else str(each.mean) for each in scores)
    lines = [
        ("contexts joined", *(str(each.joined) for each in scores)),
        ("the sum", *(str(each.sum) for each in scores)),
        ("the mean (`strength` one over the number)", *means),
    ]
    rows = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines]
    return "\n".join([rows[0], "|---" * (len(scores) + 1) + "|", *rows[1:]])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=48, metavar="N", help="how many (default: 48)")
    args = parser.parse_args()
    shine = Shine.from_pretrained("cpu-world", device="cpu")
    scores = [score(shine, contexts=args.contexts, joined=joined) for joined in GROUPS]
    print(f"{scores[0].questions} questions\n\n{table(scores)}")


if __name__ == "__main__":
    main()
