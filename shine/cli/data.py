"""``shine data``: look at a source, make sure that nothing to be scored was learned, and clear up."""

from __future__ import annotations

import argparse

from shine.cli.commands import Commands, add_command
from shine.cli.sources import SYNTAX

BACKBONE = "smollm2-135m"


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine data`` with its own subcommands."""
    parser = add_command(
        commands,
        "data",
        help="look at data before it is learned",
        description="Look at a source, search training data for what is to be scored, or clear up the indexes made of data.",
        examples=(
            "shine data inspect --source squad:data/squad\n"
            "shine data check experiment=qwen3-8b stage=mqa\n"
            "shine data indexes --prune 30"
        ),
    )
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(below)
    _add_check(below)
    _add_indexes(below)


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
    parser.add_argument("--backbone", default=BACKBONE, help="whose tokenizer counts: a name, folder or hub id (%(default)s)")
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
            "Report each context to be scored that training holds, whole or nearly: at least the threshold of its runs of four\n"
            "words in one training context. What is learned is a run (the words after train.py, or the folder of one that was\n"
            "started; scored are its data.validation and data.test), or sources named by hand. Contexts are looked at uncut."
        ),
        code_1="some were found",
        examples=(
            "shine data check experiment=qwen3-8b stage=mqa\n"
            "shine data check stage=1qa data.train.collection.path=data/mine.json --test musique:data/musique,split=validation\n"
            "shine data check --run outputs/mqa\n"
            "shine data check --train race:data/race/all --train squad:data/squad --test squad:data/squad,split=validation"
        ),
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the run that train.py would start with these words")
    parser.add_argument(
        "--run", dest="run_folder", metavar="FOLDER", help="a run that was started: its output folder, or a checkpoint in it"
    )
    parser.add_argument("--train", action="append", default=[], metavar="SOURCE", help=f"{SYNTAX}; may be given several times")
    parser.add_argument("--test", action="append", default=[], metavar="SOURCE", help="likewise; beside a run's own, or alone")
    parser.add_argument("--threshold", type=float, default=0.4, metavar="SHARE", help="above 0, at most 1 (%(default)s)")
    parser.add_argument("--backbone", help=f"whose tokenizer counts where contexts are joined or cut (a run's own, {BACKBONE})")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from shine.cli.leaks import check, sides

    compared = sides(
        train=args.train,
        test=args.test,
        run=args.run_folder,
        overrides=args.overrides,
        backbone=args.backbone,
        default_backbone=BACKBONE,
    )
    return check(compared, threshold=args.threshold, as_json=args.json)


def _add_indexes(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands,
        "indexes",
        help="list what was tokenised for training, and remove what is not used any more",
        description=(
            "Training reads and tokenises its data once and keeps that below ~/.cache/shine/data (SHINE_CACHE). List these\n"
            "indexes with size, last use and what they were made from, or remove the old ones; what a process has open stays.\n"
            "What was removed is made again when it is needed."
        ),
        examples="shine data indexes\nshine data indexes --prune 30",
    )
    parser.add_argument("--prune", type=float, metavar="DAYS", help="remove what was not used for so many days")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_indexes)


def _indexes(args: argparse.Namespace) -> None:
    from shine.cli.indexes import prune_indexes, show_indexes

    if args.prune is None:
        show_indexes(as_json=args.json)
    else:
        prune_indexes(args.prune, as_json=args.json)
