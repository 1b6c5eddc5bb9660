"""``shine export``: adapters for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shine.cli.commands import Commands, add_command
from shine.cli.models import add_json_option, print_json, strong

if TYPE_CHECKING:
    from shine.lora import LoRA


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine export``."""
    parser = add_command(
        commands,
        "export",
        help="write adapters for other programs",
        description=(
            "Write an adapter for PEFT, exactly, or with --merge the whole backbone with the adapter in its weights.\n"
            "Several adapters get a folder each below FOLDER; --join adds them up instead."
        ),
        examples="""
shine export adapters/notes --format peft --output peft/notes
shine export adapters/one adapters/two --format peft --output peft
shine export adapters/notes --merge --output models/notes --dtype bfloat16
""",
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder that `shine encode` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--format", choices=("peft",), default="peft", help="for whom (default: peft)")
    parser.add_argument("--merge", action="store_true", help="a whole model instead, for plain transformers")
    parser.add_argument("--join", action="store_true", help="one adapter, the sum of all updates")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="multiply the update (default: 1)")
    parser.add_argument("--max-rank", type=int, metavar="N", help="reduce to the nearest update of this rank")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="to store in; default: as it is")
    parser.add_argument("--backbone", metavar="MODEL", help="where the backbone lies, if not where the adapter says")
    add_json_option(parser)
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    import torch

    from shine.checkpoint import output_folder
    from shine.export.peft import write_merged, write_peft
    from shine.lora import LoRA

    output = output_folder(args.output)
    adapters = {path: strong(LoRA.load(path), args.strength) for path in args.adapters}
    folders = {path: output / Path(path).name for path in adapters} if len(adapters) > 1 else dict.fromkeys(adapters, output)
    if args.join:
        adapters, folders = {"sum": LoRA.concat(list(adapters.values()))}, {"sum": output}
    if len(set(folders.values())) < len(folders):
        raise ValueError("two of the adapters have the same name: export them one by one")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    written = []
    for path, lora in adapters.items():
        backbone = args.backbone or _recorded_backbone(path, lora)
        if args.max_rank is not None and lora.rank > args.max_rank:
            lora, share = lora.reduce(args.max_rank)
            if not args.json:
                print(f"{path}: reduced to rank {lora.rank}, {share:.1%} of the update (squared norm) is kept", flush=True)
        write = write_merged if args.merge else write_peft
        folder = write(lora, folders[path], backbone=backbone, dtype=dtype)
        written.append(
            {"adapter": path, "folder": str(folder), "format": "merged" if args.merge else args.format, "rank": lora.rank}
        )
        if not args.json:
            print(folder, flush=True)
    if args.json:
        print_json(written)


def _recorded_backbone(path: str, lora: LoRA) -> str:
    names = {span.backbone.name for spans in lora.provenance for span in spans}
    if len(names) != 1:
        raise ValueError(f"{path}: does not say which one backbone it is for: give --backbone")
    return names.pop()
