"""What the subcommands of ``shine`` share."""

from __future__ import annotations

import argparse

Commands = argparse._SubParsersAction  # the public return type of add_subparsers, which argparse gives no public name


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
