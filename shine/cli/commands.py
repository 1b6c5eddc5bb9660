"""What the subcommands of ``shine`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

Commands = argparse._SubParsersAction  # the public return type of add_subparsers, which argparse gives no public name
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The configurations beside the package; they are not installed with it."""


def add_command(
    commands: Commands[argparse.ArgumentParser], name: str, *, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A subcommand whose ``--help`` ends with examples, a command a line."""
    lines = "\n".join(f"  {line}" if line else "" for line in examples.strip().splitlines())
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{lines}",
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
