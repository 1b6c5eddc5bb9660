"""``shine info``: what an adapter or a checkpoint is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shine.cli.commands import Commands, add_command
from shine.cli.models import add_json_option, print_json


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine info``."""
    parser = add_command(
        commands,
        "info",
        help="say what an adapter or a checkpoint is",
        description=(
            "Print where an adapter comes from (context, hypernetwork, backbone, versions, date), or what a checkpoint holds.\n"
            "Reads adapters of SHINE, what was exported from them, and checkpoints."
        ),
        examples="shine info adapters/notes\nshine info adapters/notes --json\nshine info checkpoints/mine/train",
    )
    parser.add_argument("path", metavar="FOLDER", help="an adapter, an export of one, or a checkpoint")
    add_json_option(parser)
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> None:
    path = Path(args.path).expanduser()
    if args.path == path.name:
        # Imported here because it brings transformers, seconds that the folder of an adapter should not take.
        from shine.zoo import HYPERNETWORKS

        path = HYPERNETWORKS.get(args.path, path)
    if not path.is_dir():
        what = "is a file" if path.is_file() else "no such folder"
        raise ValueError(f"{args.path}: {what}; give the folder of an adapter or a checkpoint")
    found = _adapter(path) or _checkpoint(path)
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))


def _adapter(path: Path) -> dict[str, Any] | None:
    from dataclasses import asdict

    from shine.adapter_files import WEIGHTS_FILE, read_provenance, read_shapes
    from shine.export import gguf, peft

    if (path / peft.PROVENANCE_FILE).exists():
        kind = "PEFT adapter" if (path / peft.CONFIG_FILE).exists() else "merged model"
        return {"kind": kind, "contexts": peft.read_contexts(path)}
    if (path / gguf.ADAPTER_FILE).exists():
        return {"kind": "GGUF adapter", "contexts": gguf.read_contexts(path)}
    if not (path / WEIGHTS_FILE).exists():
        return None
    contexts = [asdict(span) for span in read_provenance(path)]
    return {"kind": "adapter", **read_shapes(path), "contexts": contexts}


def _checkpoint(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from shine.checkpoint import find_checkpoint, read_info, read_weights
    from shine.fingerprint import hypernetwork_fingerprint

    directory = find_checkpoint(path)
    info, weights = read_info(directory), read_weights(directory)
    parameters = sum(tensor.numel() for tensor in weights.values())
    if info is None:
        return {"kind": "released checkpoint", "folder": str(directory), "parameters": parameters}
    recorded = asdict(info)
    recorded["fingerprint"] = None if info.fingerprint is None else str(info.fingerprint)
    own = hypernetwork_fingerprint(info.hypernetwork, weights)
    return {"kind": "checkpoint", "folder": str(directory), "parameters": parameters, "own_fingerprint": own, **recorded}


def _lines(found: Mapping[str, Any]) -> list[str]:
    if found["kind"] in ("checkpoint", "released checkpoint"):
        lines = [f"{found['kind']} {found['folder']}", f"  parameters     {found['parameters']:,}"]
        if found["kind"] == "checkpoint":
            hypernetwork, length = found["hypernetwork"], found["context_length"]
            lines += [
                f"  fingerprint    {found['own_fingerprint']}",
                f"  stages         {', '.join(found['stages']) or 'none recorded'}",
                f"  rank           {hypernetwork['rank']} on {', '.join(hypernetwork['targets'])}",
                f"  reads at once  {f'{length:,} tokens' if length else 'not recorded'}",
                f"  backbone       {found['backbone']['path']} ({found['fingerprint']})",
            ]
        return lines
    lines = [found["kind"]]
    if "rank" in found:
        lines.append(f"  rank {found['rank']} on {found['linears']} linears, {found['parameters']:,} values ({found['dtype']})")
    if not found["contexts"]:
        lines.append("  nobody recorded where it comes from")
    for number, span in enumerate(found["contexts"], start=1):
        context, versions = span["context"], ", ".join(f"{name} {version}" for name, version in span["versions"].items())
        pieces = f" in {context['pieces']:,} pieces" if context["pieces"] > 1 else ""
        kept = ", shared with the other contexts" if span["shared"] else ""
        kept += f", reduced: {span['kept']:.1%} kept" if span["kept"] < 0.9995 else ""
        lines += [
            f"context {number} of {len(found['contexts'])}: {context['name'] or 'without a name'}",
            f"  sha256        {context['sha256']}",
            f"  length        {context['characters']:,} characters, {context['tokens']:,} tokens; {context['read']:,} read{pieces}",
            f"  rank          {span['rank']:,} at strength {span['strength']:g}{kept}",
            f"  hypernetwork  {span['hypernetwork']['name']} ({span['hypernetwork']['fingerprint']})",
            f"  backbone      {span['backbone']['name']} ({span['backbone']['fingerprint']})",
            f"  made          {span['date']} with {versions}",
            *([f"  text          {context['text']}"] if context["text"] is not None else []),
        ]
    return lines
