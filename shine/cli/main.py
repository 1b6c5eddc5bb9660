"""The ``shine`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shine.cli import (
    app,
    chat,
    check,
    compare,
    converse,
    data,
    download,
    encode,
    export,
    fetch,
    info,
    judge,
    pull,
    push,
    release,
    report,
    serve_adapter,
    store,
    trust,
    tune_reader,
)

COMMANDS = (
    fetch,
    download,
    encode,
    chat,
    check,
    export,
    info,
    compare,
    store,
    serve_adapter,
    app,
    data,
    converse,
    report,
    judge,
    trust,
    tune_reader,
    release,
    push,
    pull,
)
"""In the order of ``shine --help``. Each module adds one subcommand; what it imports at its top must be quick to import."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 2, after one line on standard error, for whatever a user can put right.

    That is a ``ValueError``, and whatever the system says about a file. A command may end with another code of its own.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {place}{error.strerror or error}; choose another place, or make room and permission there", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shine", description="A context becomes a LoRA.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
