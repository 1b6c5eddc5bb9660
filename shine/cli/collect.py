"""What ``generate_data/build_mqa.py`` and ``build_1qa.py`` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shine.cli.commands import in_clone
from shine.data.collection import build_collection, check_output, check_parts, without_parts
from shine.data.histograms import draw_lengths
from shine.data.plans import CollectionConfig
from shine.parsing import parse


def run(config: Path, *, output: str, description: str, argv: Sequence[str] | None = None) -> int:
    """Build the collection that ``config`` lists; exit code 2 after a message for whatever a user can put right.

    Args:
        config: the list of parts, beside the script.
        output: where the collection goes if nothing else is said.
        description: what the script does.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=config, help="the parts: folder, licence and share of each (default: %(default)s)")
    parser.add_argument("--output", default=output, help="the file to write; its manifest and histograms go beside it")
    parser.add_argument("--leave-out", action="append", default=[], metavar="PART", help="build without a part; can be repeated")
    parser.add_argument("--tokenizer", default="models/Qwen3-8B", help="whose tokens the lengths count (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        collection = without_parts(parse(CollectionConfig, load(args.config)), args.leave_out)
        check_parts(collection)
        check_output(args.output)
        reports = build_collection(collection, args.output, tokens=token_counter(args.tokenizer), say=_say)
        draw_lengths({name: report.lengths for name, report in reports.items()}, f"{args.output}.lengths.png")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _say(f"{args.output}: {sum(report.items for report in reports.values()):,} items")
    return 0


def load(path: str | Path) -> Any:
    """The plain values of a YAML file, its references to the environment resolved.

    Raises:
        ValueError: it cannot be read, or belongs to a clone that is not there.
    """
    in_clone(Path(path))
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def token_counter(name: str) -> Any:
    """How many tokens a text has for the tokenizer of a backbone: a name that SHINE knows, a folder, or a hub id."""
    from transformers import AutoTokenizer

    from shine.zoo import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    backend = tokenizer.backend_tokenizer
    return lambda text: len(backend.encode(text, add_special_tokens=False))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
