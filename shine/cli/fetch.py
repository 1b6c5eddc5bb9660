"""``shine fetch``: a backbone onto this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from shine.cli.commands import Commands, add_command
from shine.cli.models import add_json_option, print_json


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine fetch``."""
    parser = add_command(
        commands,
        "fetch",
        help="get a backbone onto this machine",
        description=(
            "Download a backbone that SHINE knows, check it, convert it once, and print its folder.\n"
            "The cache is $SHINE_CACHE, by default ~/.cache/shine."
        ),
        examples="shine fetch smollm2-135m\nshine fetch smollm2-135m --gguf models\nshine fetch smollm2-135m --json",
    )
    parser.add_argument("name", metavar="NAME", help="for instance smollm2-135m")
    parser.add_argument("--gguf", metavar="FOLDER", type=Path, help="put its GGUF file, for llama.cpp, into FOLDER instead")
    add_json_option(parser)
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    # Imported here because it brings torch and transformers, seconds that --help should not take.
    from shine.zoo import FETCHED, fetch, fetch_gguf

    place = fetch(args.name) if args.gguf is None else fetch_gguf(args.name, args.gguf)
    if args.json:
        files = [place] if place.is_file() else list(place.iterdir())
        size = sum(file.stat().st_size for file in files)
        print_json({"name": args.name, "path": str(place), "bytes": size, "licence": FETCHED[args.name].licence})
    else:
        print(place)
