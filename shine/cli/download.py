"""``shine download``: backbones, released hypernetworks and data sets into their folders."""

from __future__ import annotations

import argparse
import sys

from shine.cli.commands import CONFIGS, Commands, add_command

CATALOGUE = CONFIGS / "downloads.yaml"


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine download``."""
    parser = add_command(
        commands,
        "download",
        help="get backbones, released hypernetworks and data sets",
        description=(
            "Fetch what configs/downloads.yaml lists into its folder below the current one. Sizes and licences are shown first;\n"
            "what is already there is verified and skipped, what was broken off goes on, what is damaged is fetched again.\n"
            "HF_ENDPOINT names a mirror; with HF_HUB_OFFLINE=1 nothing is fetched and what is there is verified."
        ),
        examples=(
            "shine download data --list\n"
            "shine download data squad transmla\n"
            "shine download models qwen3-8b shine-mqa\n"
            "HF_ENDPOINT=https://hf-mirror.com shine download models qwen3-0.6b\n"
            "shine download models qwen3-8b --from modelscope"
        ),
    )
    parser.add_argument("group", choices=("models", "data"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all of the group)")
    parser.add_argument("--from", dest="hub", choices=("huggingface", "modelscope"), default="huggingface")
    parser.add_argument("--list", action="store_true", help="show sizes and licences only")
    parser.add_argument("--catalogue", default=CATALOGUE, help="default: %(default)s")
    parser.set_defaults(run=_download)


def _download(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from shine.cli.collect import load
    from shine.downloads import Item, Listing, fetch, list_files, size_of
    from shine.parsing import parse

    catalogue = parse(dict[str, dict[str, Item]], load(args.catalogue))[args.group]
    if unknown := [name for name in args.names if name not in catalogue]:
        raise ValueError(f"no {unknown[0]!r} among {args.group}: there are {', '.join(catalogue)}")
    items = {name: catalogue[name] for name in args.names or catalogue}
    listings: dict[str, Listing] = {}
    failures: dict[str, str] = {}
    for name, item in items.items():
        try:
            listings[name] = list_files(name, item, hub=args.hub)
        except (ValueError, OSError) as error:
            failures[name] = str(error)
    table = Table("name", "from", "folder", "licence", box=None, pad_edge=False, header_style="bold")
    table.add_column("size", justify="right")
    for name, listing in listings.items():
        item = items[name]
        source = item.modelscope if args.hub == "modelscope" else item.repository
        table.add_row(name, source, item.folder, item.licence, size_of(listing.size))
    table.add_row("", "", "", "", size_of(sum(listing.size for listing in listings.values())))
    if listings:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name, listing in listings.items() if not args.list else ():
        try:
            fetch(name, items[name], listing, hub=args.hub, say=lambda line: print(line, flush=True))
        except (ValueError, OSError) as error:
            failures[name] = str(error)
    if failures:
        lines = "".join(f"\n  {name}: {failures[name].removeprefix(f'{name}: ')}" for name in items if name in failures)
        raise ValueError(f"{len(failures)} of {len(items)} failed:{lines}")
