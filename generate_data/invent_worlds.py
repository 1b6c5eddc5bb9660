"""Write invented worlds or stories as JSON lines, for a jsonl source: nothing in them can be known without the context."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from shine.data.stories import Story
from shine.data.worlds import World
from shine.files import file_written_beside


def main() -> int:
    """Write ``count`` contexts drawn from a seed; 2 after a message for whatever a user can put right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument(
        "--kind", choices=("stories", "worlds"), default="stories", help="stories (default) or the CPU world's simple facts"
    )
    parser.add_argument("--count", type=int, default=10_000, help="contexts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--people", type=int, nargs=2, metavar=("LEAST", "MOST"), help="people in a context")
    parser.add_argument("--facts", type=int, nargs=2, metavar=("LEAST", "MOST"), help="sentences in a context")
    parser.add_argument("--turns", type=int, help="most questions about a story")
    parser.add_argument("--hops", type=int, help="most facts that a question about a story goes through")
    parser.add_argument("--unanswerable", type=float, help="share of a story's questions that it does not answer")
    parser.add_argument("--unknown", help="the answer to these")
    args = vars(parser.parse_args())
    output, kind, count = args.pop("output"), args.pop("kind"), args.pop("count")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in args.items() if value is not None
    }
    try:
        if kind == "worlds" and (odd := sorted(set(given) - {"people", "facts", "seed"})):
            raise ValueError(f"--{odd[0]} belongs to stories: leave it out, or --kind stories")
        examples = (Story(**given) if kind == "stories" else World(**given)).examples(count)
        with file_written_beside(output) as stream:
            for example in examples:
                turns = [{"question": turn.question, "answers": turn.answers, "kind": turn.kind} for turn in example.turns]
                row = {"id": example.id, "context": example.context, "turns": turns}
                stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {count:,} contexts", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
