"""The ``shine`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
from shine.cli.commands import closing
from shine.cli.models import in_flags

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
EXAMPLES = """
shine encode notes.txt --model cpu-world --output adapters/notes
shine chat --adapter adapters/notes --model cpu-world --question "Where does Zoran live?"
shine export adapters/notes --format peft --output peft/notes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 2, after one line on standard error, for whatever a user can put right.

    That is a ``ValueError``, and whatever the system says about a file. A command may end with another code of its own. Ctrl-C,
    SIGTERM and a reader of the output who has gone end it at once, with the codes that shells give these, and leave nothing
    half-written.
    """
    try:
        with _stoppable():
            return _run(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The rest of the output, which the interpreter would write at its end, is for nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {place}{error.strerror or error}; choose another place, or make room and permission there", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
        code: int | None = args.run(args)
        return code or 0
    except ValueError as error:
        raise ValueError(in_flags(str(error), args)) from error
    finally:
        # Here, where it can be told that nobody reads.
        sys.stdout.flush()


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM leaves the block as an exception does, so that all on the way is cleaned up; outside the main thread, as ever."""

    def stop(number: int, _: object) -> None:
        # Once: what is being cleaned up is not interrupted.
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shine",
        description="A context becomes a LoRA. `shine COMMAND --help` says more, with examples.",
        epilog=closing(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
