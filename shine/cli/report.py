"""``shine report``: result folders to one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from shine.cli.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine report``."""
    parser = add_command(
        commands,
        "report",
        help="turn evaluations into tables and plots, and compare them",
        description=(
            "Read the output folders of test.py, test_pwc.py and test_pretrain.py and write report.md, its plots and report.json.\n"
            "Evaluations of the same data are compared pair by pair, with 95 % intervals of the difference."
        ),
        examples="shine report outputs/test outputs/test_pwc outputs/test_pretrain --output outputs/report",
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="the output folder of an evaluation")
    parser.add_argument("--output", type=Path, default=Path("outputs/report"), help="where to write (default: %(default)s)")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    # Imported here because it brings matplotlib, a second that --help should not take.
    from shine.checkpoint import output_folder
    from shine.evaluation.report import write_report

    print(write_report(args.folders, output_folder(args.output)))
