"""``shine export``: adapters for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shine.cli.commands import Commands, add_command
from shine.cli.models import (
    add_format_options,
    add_json_option,
    add_strength_option,
    check_format_options,
    check_targets,
    positive,
    print_json,
    strong,
    write_format,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shine.lora import LoRA


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine export``."""
    parser = add_command(
        commands,
        "export",
        help="write adapters for other programs",
        description=(
            "Write an adapter for PEFT, exactly; as GGUF for llama.cpp, with a Modelfile for Ollama; or with --merge the whole\n"
            "backbone with the adapter in its weights. Several adapters get a folder each below FOLDER; --join adds them up\n"
            "instead. --check tells whether vLLM or SGLang take what is written, and how to start them; without --output it only\n"
            "tells, also of PEFT folders that are there already."
        ),
        examples="""
shine export adapters/notes --format peft --output peft/notes
shine export adapters/one adapters/two --format peft --output peft
shine export adapters/notes --format gguf --base smollm2:135m --output gguf/notes
shine export adapters/notes --check vllm --output peft/notes
shine export peft/notes --check sglang
shine export adapters/notes --merge --output models/notes --dtype bfloat16
""",
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a folder that `shine encode` wrote")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="where to write")
    add_format_options(parser, ("peft", "gguf"))
    parser.add_argument("--merge", action="store_true", help="a whole model instead, for plain transformers")
    parser.add_argument("--check", choices=("vllm", "sglang"), help="refuse what that engine refuses, and say how to start it")
    parser.add_argument(
        "--server-rank", type=positive, metavar="N", help="with --check: the largest rank your server was started with"
    )
    parser.add_argument("--join", action="store_true", help="one adapter, the sum of all updates")
    add_strength_option(parser)
    parser.add_argument("--max-rank", type=positive, metavar="N", help="reduce to the nearest update of this rank")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="to store in; default: as it is")
    parser.add_argument("--backbone", metavar="MODEL", help="where the backbone lies, if not where the adapter says")
    add_json_option(parser)
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    _refuse_contradictions(args)
    if args.output is None:
        _only_check(args)
        return
    from shine.checkpoint import output_folder
    from shine.export.engines import check_new_folder

    output = output_folder(args.output)
    adapters = _adapters(args.adapters, args)
    folders = dict.fromkeys(adapters, output) if len(adapters) == 1 else {path: output / Path(path).name for path in adapters}
    if len(set(folders.values())) < len(folders):
        raise ValueError("two of the adapters have the same name: export them one by one")
    check_targets(folders.values(), "merged" if args.merge else args.format)
    # All of them before the first is written.
    starts = {}
    for path, (lora, backbone) in adapters.items() if args.check else ():
        check_new_folder(folders[path])
        starts[path] = _check(lora, args, name=folders[path].absolute().name, backbone=backbone)
    written = []
    for path, (lora, backbone) in adapters.items():
        _write(lora, folders[path], args, backbone=backbone)
        kind = "merged" if args.merge else args.format
        found = {"adapter": path, "folder": str(folders[path]), "format": kind, "rank": lora.rank}
        written.append({**found, "start": starts[path]} if args.check else found)
        if not args.json:
            print(folders[path], flush=True)
    if args.json:
        print_json(written)
    elif args.check:
        _print_starts(set(starts.values()))


def _refuse_contradictions(args: argparse.Namespace) -> None:
    check_format_options(args)
    if args.output is None and args.check is None:
        raise ValueError("nowhere to write: give --output FOLDER (or --check ENGINE, to be told only)")
    if args.merge and args.format != "peft":
        raise ValueError("--merge writes a whole model, not --format gguf: leave one of them out")
    if args.check and (args.merge or args.format != "peft"):
        raise ValueError("--check is for PEFT folders, which vLLM and SGLang load: leave --merge and --format out")
    if args.server_rank and not args.check:
        raise ValueError("--server-rank is what --check compares with: give --check vllm or --check sglang")
    if args.dtype and args.format == "gguf":
        raise ValueError("a GGUF adapter is stored in float32: leave --dtype out")


def _adapters(paths: Sequence[str], args: argparse.Namespace) -> dict[str, tuple[LoRA, str]]:
    """What is to be written, and its backbone, by the path it was read from."""
    from shine.lora import LoRA

    loaded = {path: strong(LoRA.load(path), args.strength) for path in paths}
    if args.join:
        loaded = {"sum": LoRA.concat(list(loaded.values()))}
    adapters = {}
    for path, lora in loaded.items():
        backbone = args.backbone or _recorded_backbone(path, lora)
        _check_shape(lora, backbone, args)
        if args.max_rank is not None and lora.rank > args.max_rank:
            lora, share = lora.reduce(args.max_rank)
            if not args.json:
                print(f"{path}: reduced to rank {lora.rank}, {share:.1%} of the update (squared norm) is kept", flush=True)
        adapters[path] = lora, backbone
    return adapters


def _check_shape(lora: LoRA, backbone: str, args: argparse.Namespace) -> None:
    """Refuse another backbone. What the adapter itself names need not lie on this machine; a merge looks at the weights too."""
    from shine.export.backbones import backbone_config
    from shine.zoo import resolve

    if not args.merge and (args.backbone is not None or Path(resolve(backbone)).is_dir()):
        backbone_config(backbone, lora)


def _write(lora: LoRA, folder: Path, args: argparse.Namespace, *, backbone: str) -> None:
    import torch

    from shine.export.peft import write_merged

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if args.merge:
        write_merged(lora, folder, backbone=backbone, dtype=dtype)
    else:
        write_format(lora, folder, args, backbone=backbone, dtype=dtype)


def _recorded_backbone(path: str, lora: LoRA) -> str:
    names = {span.backbone.name for spans in lora.provenance for span in spans}
    if len(names) != 1:
        raise ValueError(f"{path}: does not say which one backbone it is for: give --backbone")
    return names.pop()


def _check(lora: LoRA, args: argparse.Namespace, *, name: str, backbone: str) -> str:
    """How to start the engine so that it takes the adapter under this name."""
    from shine.export.engines import ENGINES

    return ENGINES[args.check].check(
        name,
        rank=lora.rank,
        modules={linear.rsplit(".", 1)[-1] for linear in lora},
        base=backbone,
        server_rank=args.server_rank,
    )


def _only_check(args: argparse.Namespace) -> None:
    from shine.export.engines import ENGINES
    from shine.export.peft import CONFIG_FILE

    peft = [path for path in args.adapters if (Path(path).expanduser() / CONFIG_FILE).exists()]
    others = [path for path in args.adapters if path not in peft]
    engine = ENGINES[args.check]
    starts = {path: engine.check_folder(Path(path).expanduser(), server_rank=args.server_rank) for path in peft}
    adapters = _adapters(others, args) if others else {}
    starts |= {
        path: _check(lora, args, name=Path(path).absolute().name, backbone=backbone) for path, (lora, backbone) in adapters.items()
    }
    if args.json:
        print_json([{"adapter": path, "engine": args.check, "start": start} for path, start in starts.items()])
        return
    for path in starts:
        print(f"{path}: {engine.title} takes it")
    _print_starts(set(starts.values()))


def _print_starts(starts: set[str]) -> None:
    for start in sorted(starts):
        print(f"start it with: {start}")
