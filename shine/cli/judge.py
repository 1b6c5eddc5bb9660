"""``shine judge``: a language model's opinion of the answers of an evaluation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from shine.cli.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine judge``."""
    parser = add_command(
        commands,
        "judge",
        help="let a model behind an OpenAI-compatible server judge the answers of an evaluation",
        description=(
            "Ask a model about every answer in the output folder of test.py or test_pwc.py and write its verdicts beside them.\n"
            "OPENAI_BASE_URL and OPENAI_API_KEY say where it is. Going on asks only for what is missing or has failed."
        ),
        examples="shine judge outputs/test --model gpt-4.1-mini\nshine report outputs/test",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output folder of an evaluation")
    parser.add_argument("--model", required=True, help="its name on the server")
    parser.add_argument("--prompt", type=Path, help="a file with another system prompt; it must ask for the same JSON")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=6, help="before a call counts as failed (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of an attempt (default: %(default)s)")
    parser.add_argument(
        "--options", type=json.loads, default={"temperature": 0}, help="sent along (default: '{\"temperature\": 0}')"
    )
    parser.set_defaults(run=_judge)


def _judge(args: argparse.Namespace) -> None:
    from shine.config import RemoteConfig
    from shine.evaluation import judge
    from shine.evaluation.tables import judge_table, show
    from shine.parsing import parse

    values = {name: getattr(args, name) for name in ("model", "concurrency", "attempts", "timeout", "options")}
    prompt = judge.PROMPT if args.prompt is None else args.prompt.read_text(encoding="utf-8")
    show(judge_table(judge.judge(args.folder, parse(RemoteConfig, values), prompt=prompt, say=print)))
