"""What the subcommands of ``shine`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

Commands = argparse._SubParsersAction  # the public return type of add_subparsers, which argparse gives no public name
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The configurations beside the package; they are not installed with it."""


def closing(examples: str, *, code_1: str | None = None) -> str:
    """What a ``--help`` ends with: examples, a command a line, and the exit codes.

    Args:
        code_1: what exit code 1 says, where there is one.
    """
    lines = "\n".join(f"  {line}" if line else "" for line in examples.strip().splitlines())
    codes = ["0 done", *([] if code_1 is None else [f"1 {code_1}"]), "2 refused, with one line why", "130 Ctrl-C", "143 SIGTERM"]
    return f"examples:\n{lines}\n\nexit codes: {'; '.join(codes)}"


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    *,
    help: str,
    description: str,
    examples: str,
    code_1: str | None = None,
) -> argparse.ArgumentParser:
    """A subcommand whose ``--help`` ends with examples and exit codes, see `closing`."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=closing(examples, code_1=code_1),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def in_clone(path: Path) -> Path:
    """``path``, unless it is one of the configurations of a clone and SHINE is installed without it.

    Raises:
        ValueError: so it is.
    """
    if path.is_relative_to(CONFIGS) and not CONFIGS.is_dir():
        raise ValueError(f"there is no {CONFIGS}: run this in a clone of SHINE, which holds the configurations")
    return path
