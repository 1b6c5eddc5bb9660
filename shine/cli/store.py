"""``shine store``: a folder of adapters by name."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from shine.cli.commands import Commands, add_command
from shine.cli.models import (
    add_document_options,
    add_json_option,
    add_strength_option,
    describe,
    encode_document,
    load_shine,
    positive,
    print_json,
    read_inputs,
    strong,
)

if TYPE_CHECKING:
    from shine.store import Entry


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine store`` and its own subcommands."""
    parser = add_command(
        commands,
        "store",
        help="keep adapters by name: list, add, update, forget, compose",
        description="A store is a plain folder of adapters; each context has versions, and several compose into one adapter.",
        examples="""
shine store add adapters notes notes.txt --model cpu-world
shine store update adapters notes notes-of-today.txt --model cpu-world
shine store list adapters
shine store compose adapters notes handbook --output adapters-now --strength 0.5
shine store forget adapters notes
""",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, about in (("add", "encode a text under a new name"), ("update", "encode a new version of a text")):
        action = _add_action(actions, name, about, _write, f"shine store {name} adapters notes notes.txt --model cpu-world")
        _add_names(action, "name")
        action.add_argument("text", metavar="TEXT", help="a file, or - for standard input")
        add_document_options(action)
        action.set_defaults(action=name)
    listing = _add_action(
        actions, "list", "say what is in it", _list, "shine store list adapters\nshine store list adapters --json"
    )
    listing.add_argument("store", metavar="STORE", help="the folder")
    add_json_option(listing)
    forget = _add_action(actions, "forget", "remove a context and its versions", _forget, "shine store forget adapters notes")
    _add_names(forget, "name")
    add_json_option(forget)
    compose = _add_action(
        actions,
        "compose",
        "write one adapter that holds several, the sum of their updates",
        _compose,
        "shine store compose adapters notes handbook --output adapters-now --strength 0.5\n"
        "shine store compose adapters notes handbook --output adapters-now --max-rank 8 --json",
    )
    _add_names(compose, "names", nargs="+")
    compose.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write")
    add_strength_option(compose)
    compose.add_argument("--max-rank", type=positive, metavar="N", help="reduce the sum to the nearest update of this rank")
    add_json_option(compose)


def _add_action(
    actions: Commands[argparse.ArgumentParser], name: str, about: str, run: object, examples: str
) -> argparse.ArgumentParser:
    action = add_command(actions, name, help=about, description=f"{about[0].upper()}{about[1:]}.", examples=examples)
    action.set_defaults(run=run)
    return action


def _add_names(parser: argparse.ArgumentParser, name: str, *, nargs: str | None = None) -> None:
    parser.add_argument("store", metavar="STORE", help="the folder")
    parser.add_argument(name, metavar="NAME", nargs=nargs, help="what the context is called")


def _write(args: argparse.Namespace) -> None:
    documents = read_inputs([args.text], args)
    from shine.store import Store

    if len(documents) > 1:
        raise ValueError(f"{args.text} holds {len(documents)} documents: a store keeps one text under a name; give one")
    store = Store(args.store)
    # Refused before anything is encoded.
    known = {entry.name: entry for entry in store.list()}
    if args.action == "add" and args.name in known:
        raise ValueError(f"{args.name!r} is in {store.folder} already: update it, or choose another name")
    if args.action == "update" and args.name not in known:
        store.entry(args.name)
    entry = getattr(store, args.action)(args.name, encode_document(load_shine(args), documents[0], args))
    if args.json:
        print_json(_describe(entry))
    elif args.name in known and known[args.name].version == entry.version:
        print(f"{entry.folder}  (the same text: nothing changed)")
    else:
        print(entry.folder)


def _list(args: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    from shine.evaluation.tables import show
    from shine.store import Store

    entries = Store(args.store).list()
    for entry in entries:
        if entry.damage is not None:
            print(f"note: {entry.name} is damaged: {entry.damage}, or forget it", file=sys.stderr)
    if args.json:
        print_json([_describe(entry) for entry in entries])
        return
    if not entries:
        print(f"{args.store} holds no adapter yet")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column, justify in (("name", "left"), ("version", "right"), ("tokens", "right"), ("rank", "right")):
        table.add_column(column, justify="right" if justify == "right" else "left")
    for column in ("context", "backbone", "made"):
        table.add_column(column)
    for entry in entries:
        spans = entry.provenance
        table.add_row(
            entry.name,
            str(entry.version),
            f"{sum(span.context.tokens for span in spans):,}" if spans else "",
            f"{sum(span.rank for span in spans):,}" if spans else "",
            ", ".join(span.context.sha256[:12] for span in spans) if entry.damage is None else "damaged",
            ", ".join(sorted({span.backbone.name for span in spans})),
            max((span.date for span in spans), default=""),
        )
    show(table)


def _forget(args: argparse.Namespace) -> None:
    from shine.store import Store

    Store(args.store).forget(args.name)
    if args.json:
        print_json({"name": args.name, "forgotten": True})
    else:
        print(f"forgot {args.name}")


def _compose(args: argparse.Namespace) -> None:
    from shine.store import Store

    lora = strong(Store(args.store).compose(args.names), args.strength)
    if args.max_rank is not None:
        lora, _ = lora.reduce(args.max_rank)
    folder = lora.save(args.output)
    if args.json:
        print_json({"folder": str(folder), **describe(lora)})
    else:
        kept = min((span.kept for spans in lora.provenance for span in spans), default=1.0)
        reduced = f", {kept:.1%} of the update (squared norm) kept" if kept < 0.9995 else ""
        print(f"{folder}  (rank {lora.rank}, {len(args.names)} contexts{reduced})")


def _describe(entry: Entry) -> dict[str, object]:
    contexts = [asdict(span) for span in entry.provenance]
    found = {"name": entry.name, "version": entry.version, "folder": str(entry.folder), "contexts": contexts}
    return found if entry.damage is None else {**found, "damage": entry.damage}
