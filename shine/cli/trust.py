"""``shine trust``: what an adapter does beside answering."""

from __future__ import annotations

import argparse
from pathlib import Path

from shine.cli.commands import Commands, add_command
from shine.cli.models import add_checkpoint_options


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine trust``."""
    parser = add_command(
        commands,
        "trust",
        help="measure interference, belief, unanswerable questions, long conversations, collapse",
        description=(
            "With adapters on: do unrelated questions get other answers, does the model say what the context says or what it\n"
            "believed, what does it say to questions that the context does not answer, how long does an adapter last in a\n"
            "conversation of 15 turns, and do adapters differ? On invented worlds, and on your passages. Writes trust.md."
        ),
        examples=(
            "shine trust cpu-world\nshine trust outputs/1qa --squad data/squad/plain_text --file examples/beliefs.jsonl\n"
            "shine trust outputs/1qa --no-worlds --squad data/squad/plain_text --knowledge examples/knowledge.jsonl"
        ),
    )
    add_checkpoint_options(parser)
    parser.add_argument("--contexts", type=int, default=64, help="of each set (default: %(default)s)")
    parser.add_argument("--squad", metavar="FOLDER", help="passages with questions, as SQuAD lays them out (validation split)")
    parser.add_argument("--file", metavar="FILE", help="contexts with questions of your own, JSON lines")
    parser.add_argument("--knowledge", type=Path, metavar="FILE", help="questions of general knowledge: is what it knows left?")
    parser.add_argument("--no-worlds", action="store_true", help="leave the invented worlds out")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of an answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7000, help="of worlds and orders (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/trust"), help="where to write (default: %(default)s)")
    parser.set_defaults(run=_trust)


def _trust(args: argparse.Namespace) -> None:
    from shine.evaluation.trust_report import report_trust

    sources = {"squad": args.squad, "jsonl": args.file}
    page = report_trust(
        args.checkpoint,
        args.output,
        backbone=args.backbone,
        allow_variant=args.allow_variant,
        contexts=args.contexts,
        sources={kind: path for kind, path in sources.items() if path},
        knowledge=args.knowledge,
        worlds=not args.no_worlds,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    print(page)
