"""``shine converse``: contexts and questions from a file, three methods side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from shine.cli.commands import Commands, add_command
from shine.cli.models import add_checkpoint_options


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine converse``."""
    parser = add_command(
        commands,
        "converse",
        help="ask three methods the questions of a file, side by side",
        description=(
            "SHINE (the context as a LoRA), In-Context (the context in the prompt) and Only Question answer the questions of each\n"
            "context in turn. The file has one JSON object a line:\n"
            '{"context": "…", "turns": [{"question": "…", "answers": ["…"]}]}'
        ),
        examples="""
shine converse outputs/mqa examples/conversations.jsonl
shine converse cpu-world examples/conversations_cpu_world.jsonl
""",
    )
    add_checkpoint_options(parser)
    parser.add_argument("file", metavar="FILE", help="contexts with their questions")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="of an answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the answers there: a page if it ends in .md, else JSON lines")
    parser.set_defaults(run=_converse)


def _converse(args: argparse.Namespace) -> None:
    from shine.evaluation.side_by_side import converse_file

    converse_file(
        args.checkpoint,
        args.file,
        backbone=args.backbone,
        allow_variant=args.allow_variant,
        max_new_tokens=args.max_new_tokens,
        output=args.output,
    )
