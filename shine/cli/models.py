"""Options and steps that the commands with a model share."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from shine.documents import Document
    from shine.lora import LoRA
    from shine.model import Shine


def add_document_options(parser: argparse.ArgumentParser) -> None:
    """What a command needs that encodes documents: ``--json``, the model, reading."""
    add_json_option(parser)
    add_model_options(parser)
    add_reading_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which hypernetwork and backbone, and how they are held."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        metavar="CHECKPOINT",
        help="the hypernetwork: a checkpoint folder, a hub id, or what is shipped: cpu-world reads invented worlds, smollm2-135m "
        "short English text; "
        "default: SHINE_MODEL in the environment",
    )
    _add_backbone(group)
    group.add_argument("--device", default="auto", help="auto (CUDA where there is some), cpu, cuda, cuda:N")
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float64"),
        help="of the backbone; default: as trained, but float32 where bfloat16 is slow",
    )
    _add_variant(group)


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint a command looks at, and its backbone."""
    about = "a run's output folder, a checkpoint in it, a hub id, or what is shipped: cpu-world, smollm2-135m"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=about)
    _add_backbone(parser)
    _add_variant(parser)


def _add_backbone(to: argparse._ActionsContainer) -> None:
    to.add_argument("--backbone", metavar="MODEL", help="where the backbone lies, if not where the checkpoint says")


def _add_variant(to: argparse._ActionsContainer) -> None:
    to.add_argument("--allow-variant", action="store_true", help="take other weights of the same architecture")


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How documents are read and encoded."""
    group = parser.add_argument_group("reading")
    group.add_argument("--encoding", default="utf-8", help="of text, Markdown and HTML files (default: utf-8)")
    group.add_argument("--context-length", type=positive, metavar="N", help="tokens read at once; default: as trained")
    group.add_argument("--cut", action="store_true", help="cut a longer text there, instead of adding up its pieces")
    group.add_argument("--overlap", type=int, metavar="N", help="tokens two neighbouring pieces share; default: an eighth")
    group.add_argument("--max-rank", type=positive, metavar="N", help="reduce the sum of the pieces to this rank")


def add_strength_option(parser: argparse.ArgumentParser) -> None:
    """``--strength``."""
    parser.add_argument("--strength", type=finite, default=1.0, metavar="X", help="multiply the update (default: 1)")


def add_format_options(parser: argparse.ArgumentParser, formats: Sequence[str]) -> None:
    """``--format``, the first of ``formats`` by default, and what ``gguf`` needs."""
    parser.add_argument("--format", choices=formats, default=formats[0], help=f"of the adapter (default: {formats[0]})")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="with --format gguf: what the Ollama Modelfile builds on, the backbone's GGUF file or its name in Ollama "
        "(default: backbone.gguf, to be put beside it)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def finite(text: str) -> float:
    """A number that is neither infinite nor none, for argparse."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def seconds(text: str) -> float:
    """A time that is longer than none, for argparse."""
    number = finite(text)
    if number <= 0:
        raise ValueError
    return number


_FLAGS = (
    ("device", r"backbone\.device=", "--device "),
    ("backbone", r"((set|give) )?backbone(\.path)?=\.\.\.( to)?", "give --backbone"),
    ("backbone", r"set backbone\.path=", "give --backbone "),
    ("allow_variant", r"backbone\.allow_variant=true in a configuration, --allow-variant on .*", "--allow-variant"),
    ("allow_variant", r"allow_variant=True", "--allow-variant"),
)
"""An option, how a configuration or Python says it, and how the command line does."""


def in_flags(message: str, args: argparse.Namespace) -> str:
    """A refusal from below, where nothing is known of commands, in the words of one with these options."""
    for option, said, flag in _FLAGS:
        if option in args:
            message = re.sub(said, flag, message)
    return message


def load_shine(args: argparse.Namespace) -> Shine:
    """The models that the options name, or else the environment.

    Raises:
        ValueError: no hypernetwork is named, or what is named cannot be loaded.
    """
    name = args.model or os.environ.get("SHINE_MODEL")
    if not name:
        raise ValueError(
            "say which hypernetwork: --model CHECKPOINT, or SHINE_MODEL in the environment; cpu-world and smollm2-135m are shipped"
        )
    from shine.model import Shine

    return Shine.from_pretrained(
        name,
        backbone=args.backbone,
        device=args.device,
        dtype=args.dtype,
        context_length=getattr(args, "context_length", None),
        allow_variant=args.allow_variant,
    )


def encode_document(shine: Shine, document: Document, args: argparse.Namespace, *, keep_text: bool = False) -> LoRA:
    """The adapter of one document; what was cut or added up is said on standard error."""
    with _counted(document) as progress:
        lora = shine.encode(
            document.text,
            names=[document.name],
            long="cut" if args.cut else "split",
            overlap=args.overlap,
            max_rank=args.max_rank,
            keep_text=keep_text,
            progress=progress,
        )
    for line in remarks(lora):
        print(f"note: {line}", file=sys.stderr)
    return lora


def remarks(lora: LoRA) -> list[str]:
    """What a reader should know of how the contexts of an adapter were read."""
    lines = []
    for span in lora.provenance[0]:
        context = span.context
        name = context.name or context.sha256[:12]
        if context.read < context.tokens:
            lines.append(f"{name}: cut, {context.read:,} of {context.tokens:,} tokens were read")
        if context.pieces > 1:
            lines.append(
                f"{name}: {context.tokens:,} tokens are more than the hypernetwork reads at once, so the adapter is the sum of "
                f"{context.pieces:,} pieces (rank {span.rank:,}); what they have in common counts several times"
            )
        if span.kept < 0.9995:
            lines.append(f"{name}: reduced to rank {span.rank:,}, about {span.kept:.1%} of the update (squared norm) is kept")
    return lines


def strong(lora: LoRA, strength: float) -> LoRA:
    """The adapter as strong as it was asked for."""
    return lora if strength == 1 else lora.scale(strength)


def describe(lora: LoRA) -> dict[str, Any]:
    """What JSON says of an adapter."""
    values = sum(a.numel() + b.numel() for a, b in lora.values())
    return {
        "rank": lora.rank,
        "linears": len(lora),
        "parameters": values,
        "contexts": [asdict(span) for spans in lora.provenance for span in spans],
    }


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def check_format_options(args: argparse.Namespace) -> None:
    """Refuse what `add_format_options` lets be said but cannot be meant."""
    if args.base and args.format != "gguf":
        raise ValueError("--base is for the Modelfile of --format gguf: leave it out, or give that format")


def check_targets(folders: Iterable[Path], kind: str) -> None:
    """Make sure that all of them can be written, before the first is: ``kind`` is a ``--format``, or ``merged``."""
    from shine import adapter_files
    from shine.export import gguf, peft
    from shine.files import may_replace

    names = {"shine": adapter_files.FILES, "peft": peft.FILES, "gguf": gguf.FILES, "merged": frozenset[str]()}[kind]
    what = {"merged": "merged model", "peft": "PEFT adapter"}.get(kind, "adapter")
    for folder in folders:
        may_replace(folder, names=names, what=what)


def write_format(lora: LoRA, folder: Path, args: argparse.Namespace, *, backbone: str, dtype: torch.dtype | None = None) -> None:
    """Write one adapter in the ``--format`` that was asked for."""
    from shine.export.backbones import backbone_config
    from shine.export.gguf import BASE, write_gguf
    from shine.export.peft import write_peft

    if args.format == "shine":
        lora.save(folder)
    elif args.format == "peft":
        write_peft(lora, folder, backbone=backbone, dtype=dtype)
    else:
        write_gguf(lora, folder, config=backbone_config(backbone, lora), base=args.base or BASE)


@contextmanager
def _counted(document: Document) -> Iterator[Callable[[int, int], object] | None]:
    """Tells how many pieces were read, on one line of the terminal; nothing where there is none."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    said = f"reading {document.name}"
    with Console(stderr=True).status(said) as status:
        yield lambda done, about: status.update(f"{said}: {done:,} of about {about:,} pieces")


def read_inputs(paths: Sequence[str], args: argparse.Namespace) -> list[Document]:
    """The documents named on the command line, read before any model is loaded."""
    from shine.documents import read_documents

    return read_documents(paths, encoding=args.encoding)
