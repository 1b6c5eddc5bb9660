"""The ``shine`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 2, after one line on standard error, for whatever a user can put right."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shine", description="A context becomes a LoRA.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_fetch(commands)
    _add_release(commands)
    return parser


def _add_fetch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "fetch",
        help="get a backbone onto this machine",
        description="Download a backbone that SHINE knows, check it, convert it once, and print its folder.",
        epilog="example:\n  shine fetch smollm2-135m\n\nThe cache is $SHINE_CACHE, by default ~/.cache/shine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="for instance smollm2-135m")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    # Imported here because it brings torch and transformers, seconds that --help should not take.
    from shine.zoo import fetch

    print(fetch(args.name))


def _add_release(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "release",
        help="write a hypernetwork in the published three-file format",
        description="Write a checkpoint as mem_tokens.pt, metanetwork.pth and metalora.pth, for code that reads these.",
        epilog="example:\n  shine release outputs/mqa checkpoints/mine/iftpwc/checkpoint-epoch-2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or a checkpoint in it")
    parser.add_argument("folder", metavar="FOLDER", help="where to write; made if it is not there")
    parser.set_defaults(run=_release)


def _release(args: argparse.Namespace) -> None:
    from shine.checkpoint import output_folder, read_weights
    from shine.released import RELEASED_FILES, write_released

    folder = output_folder(args.folder)
    if there := [name for name in RELEASED_FILES if (folder / name).exists()]:
        raise ValueError(f"{folder}: {there[0]} is there already; name another folder")
    write_released(folder, read_weights(args.checkpoint))
    print(folder)


if __name__ == "__main__":
    sys.exit(main())
