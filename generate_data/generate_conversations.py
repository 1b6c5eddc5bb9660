"""Write new conversations about any contexts with a model behind an OpenAI-compatible server, each pair checked in a second pass.

Where the contexts come from, the model, its prices and the prompts are in configs/conversations.yaml; the address and the key are
OPENAI_BASE_URL and OPENAI_API_KEY. Started again with the same --output, it goes on where it was stopped.
"""

import argparse
import sys
from pathlib import Path

from shine.cli.collect import load, token_counter
from shine.data.plans import WritingConfig
from shine.data.writing import estimate, write_conversations
from shine.parsing import parse

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "conversations.yaml"


def main() -> int:
    """Say what it will cost, ask, write, say what came of it; 2 after a message for whatever a user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="default: %(default)s")
    parser.add_argument(
        "--output", default="data/conversations.json", help="default: %(default)s; what belongs to it lies beside it"
    )
    parser.add_argument("--tokenizer", default="models/Qwen3-8B", help="whose tokens the lengths count (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="start without asking")
    args = parser.parse_args()
    try:
        config = parse(WritingConfig, load(args.config))
        tokens = token_counter(args.tokenizer)
        ahead = estimate(config, args.output)
        cost = ahead.usage.cost(config.remote)
        read, written = ahead.usage.prompt_tokens, ahead.usage.completion_tokens
        print(
            f"{ahead.contexts:,} contexts to write about, {ahead.checks:,} checks of earlier pairs: "
            f"about {read:,} tokens read, {written:,} written, "
            f"cost {cost:.2f} at the prices given for {config.remote.model}"
        )
        if not args.yes and not agreed():
            print("nothing was asked")
            return 1
        report = write_conversations(config, args.output, tokens=tokens)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on after what {args.output}.*.jsonl hold", file=sys.stderr)
        return 130
    print(report)
    read, written = report.usage.prompt_tokens, report.usage.completion_tokens
    print(f"{read:,} tokens read, {written:,} written, cost {report.usage.cost(config.remote):.2f}; {args.output}")
    return 0


def agreed() -> bool:
    """Whether the user wants to go on."""
    if not sys.stdin.isatty():
        raise ValueError("nobody to ask whether that may be spent: start with --yes")
    return input("go on? [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__":
    sys.exit(main())
