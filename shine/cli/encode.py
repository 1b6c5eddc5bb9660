"""``shine encode``: texts become adapters."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from shine.cli.commands import Commands, add_command
from shine.cli.models import (
    add_document_options,
    add_format_options,
    add_strength_option,
    check_format_options,
    check_targets,
    describe,
    encode_document,
    load_shine,
    print_json,
    read_inputs,
    strong,
    write_format,
)


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine encode``."""
    parser = add_command(
        commands,
        "encode",
        help="turn texts into adapters",
        description=(
            "Read texts once and write each as an adapter, a folder that says where it comes from. Text, Markdown and HTML files,\n"
            "PDF and DOCX (pip install 'shine-hypernetwork[documents]'), folders of these, and - for standard input.\n"
            "With --format peft the folder is what PeftModel.from_pretrained reads, with --format gguf what llama.cpp and Ollama\n"
            "read. Several texts get a folder each below FOLDER; --join adds them up into one adapter instead."
        ),
        examples="""
shine encode notes.txt --model cpu-world --output adapters/notes
shine encode notes.txt --model cpu-world --output adapters/notes-peft --format peft
shine encode handbook/ --model checkpoints/mine/train --output adapters/handbook
curl -s https://example.org/page.txt | shine encode - --model checkpoints/mine/train --output adapters/page --json
""",
    )
    parser.add_argument("inputs", nargs="+", metavar="TEXT", help="a file, a folder, or - for standard input")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write")
    add_format_options(parser, ("shine", "peft", "gguf"))
    parser.add_argument("--join", action="store_true", help="one adapter, the sum of all texts' updates")
    add_strength_option(parser)
    parser.add_argument("--keep-text", action="store_true", help="keep the text itself in the adapter, not only its hash")
    add_document_options(parser)
    parser.set_defaults(run=_encode)


def _encode(args: argparse.Namespace) -> None:
    check_format_options(args)
    documents = read_inputs(args.inputs, args)
    from shine.checkpoint import output_folder
    from shine.lora import LoRA

    output = output_folder(args.output)
    folders = _folders(output, [document.name for document in documents], apart=len(documents) > 1 and not args.join)
    check_targets(folders, args.format)
    shine = load_shine(args)
    written, waiting = [], []
    for number, (document, folder) in enumerate(zip(documents, folders, strict=True), start=1):
        started = time.perf_counter()
        lora = strong(encode_document(shine, document, args, keep_text=args.keep_text), args.strength)
        seconds = time.perf_counter() - started
        if args.join:
            waiting.append(lora)
            if number < len(documents):
                continue
            lora = LoRA.concat(waiting)
        write_format(lora, folder, args, backbone=shine.config.path)
        written.append({"folder": str(folder), "format": args.format, "seconds": round(seconds, 3), **describe(lora)})
        if not args.json:
            many = f"[{number}/{len(documents)}] " if len(documents) > 1 else ""
            tokens = sum(span.context.read for span in lora.provenance[0])
            print(f"{many}{folder}  ({tokens:,} tokens, rank {lora.rank}, {seconds:.1f} s)", flush=True)
    if args.json:
        print_json(written)


def _folders(output: Path, names: list[str], *, apart: bool) -> list[Path]:
    """Where each goes: ``output`` itself, or a folder below it that is called like the document."""
    if not apart:
        return [output] * len(names)
    folders = [output / Path(name).with_suffix("").as_posix().replace("/", "-").replace(" ", "-") for name in names]
    twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    if twice:
        raise ValueError(f"several texts would be written to {twice[0]}: rename one, or encode them one by one")
    return folders
