"""``shine data``: look at a source, and make sure that nothing to be scored was learned."""

from __future__ import annotations

import argparse
import json

from shine.cli.commands import Commands, add_command
from shine.cli.sources import SYNTAX


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine data`` with its own subcommands."""
    parser = add_command(
        commands,
        "data",
        help="look at data before it is learned",
        description="Look at a source, or search training data for what is to be scored.",
        examples=(
            "shine data inspect --source squad:data/squad\n"
            "shine data check --train race:data/race/all --test squad:data/squad,split=validation"
        ),
    )
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(below)
    _add_check(below)


def _add_inspect(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "inspect",
        help="show samples of a source and its lengths",
        description=(
            "Print examples of a source as the model sees them, the labels in green (without colors: in brackets), count samples\n"
            "and lengths in tokens, and draw the lengths.\n"
            "The contexts are shown uncut; what a stage would cut at its lengths is counted."
        ),
        examples=(
            "shine data inspect --source squad:data/squad\n"
            "shine data inspect --source race:data/race/all,split=validation,cloze=false --stage 1qa\n"
            "shine data inspect --source jsonl:mine.jsonl --backbone models/Qwen3-8B --histogram lengths.png\n"
            "shine data inspect --source worlds,count=100,seed=1 --json"
        ),
    )
    parser.add_argument("--source", required=True, help=SYNTAX)
    parser.add_argument(
        "--stage", choices=("pretrain", "mqa", "1qa"), help="as which stage learns it; mqa where there are questions"
    )
    parser.add_argument("--backbone", default="smollm2-135m", help="whose tokenizer counts: a name, folder or hub id (%(default)s)")
    parser.add_argument("--examples", type=int, default=5, metavar="N", help="how many to print (%(default)s)")
    parser.add_argument("--context-length", type=int, default=1150, metavar="N", help="most tokens of a context (%(default)s)")
    parser.add_argument("--conversation-length", type=int, default=1150, metavar="N", help="of a conversation (%(default)s)")
    parser.add_argument("--histogram", default="lengths.png", metavar="FILE", help="where the picture goes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON, and no examples")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from shine.cli.inspection import inspect

    inspect(
        args.source,
        stage=args.stage,
        backbone=args.backbone,
        count=args.examples,
        lengths=(args.context_length, args.conversation_length),
        histogram=args.histogram,
        as_json=args.json,
    )


def _add_check(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "check",
        help="search training data for contexts that will be scored",
        description=(
            "Report each context of the test sources that training sources hold, whole or nearly: at least the threshold of its\n"
            "runs of eight words in one training context. Exit code 1 where there is one."
        ),
        examples=(
            "shine data check --train race:data/race/all --train squad:data/squad --test squad:data/squad,split=validation\n"
            "shine data check --train conversations:data/ift_c1qa.json --test musique:data/musique,split=validation --json"
        ),
    )
    parser.add_argument("--train", action="append", required=True, metavar="SOURCE", help=f"{SYNTAX}; may be given several times")
    parser.add_argument("--test", action="append", required=True, metavar="SOURCE", help="likewise")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="SHARE", help="between 0 and 1 (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from shine.cli.sources import parse_source
    from shine.data.sources import read_named
    from shine.data.splits import LeakCheck

    if not 0 < args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: a share above 0, at most 1")
    check = LeakCheck(threshold=args.threshold)
    for text in args.test:
        for example in read_named({text: parse_source(text)}, "--test"):
            check.score(f"{text} {example.id}", example.context)
    for text in args.train:
        for example in read_named({text: parse_source(text)}, "--train"):
            check.train(f"{text} {example.id}", example.context)
    found = check.overlaps
    if args.json:
        print(json.dumps({"scored": check.scored, "trained": check.trained, "overlaps": [asdict(o) for o in found]}, indent=2))
    else:
        for overlap in found[:20]:
            print(f"{overlap.share:4.0%} of {overlap.scored}\n     stands in {overlap.trained}")
        more = " (the 20 largest are shown; --json prints all)" if len(found) > 20 else ""
        print(f"{len(found):,} of {check.scored:,} contexts to be scored stand in {check.trained:,} training contexts{more}")
    return 1 if found else 0
