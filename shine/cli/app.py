"""``shine app``: the page in a browser."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

from shine.cli.commands import Commands, add_command
from shine.cli.models import add_model_options, add_reading_options, load_shine, read_inputs


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine app``."""
    parser = add_command(
        commands,
        "app",
        help="try it in a browser",
        description=(
            "Serve a page on this machine: a context on the left, the answers of SHINE, In-Context and Only Question on the\n"
            "right, a slider for the adapter's strength, the adapter to download, and how long each step took. It needs Gradio:\n"
            "pip install 'shine-hypernetwork[app]'. Who can reach the address can use the model."
        ),
        examples="""
shine app --model cpu-world --context notes.txt
shine app --model checkpoints/mine/train --port 7861
""",
    )
    parser.add_argument("--context", metavar="TEXT", help="a file to begin with")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (default: 7860)")
    add_model_options(parser)
    add_reading_options(parser)
    parser.set_defaults(run=_app)


def _app(args: argparse.Namespace) -> None:
    if not 0 < args.port < 65536:
        raise ValueError(f"--port {args.port}: a port is a number from 1 to 65535")
    documents = read_inputs([args.context], args) if args.context else []
    if len(documents) > 1:
        raise ValueError(f"{args.context} holds {len(documents)} documents: begin with one")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page takes an extra: pip install 'shine-hypernetwork[app]'")
    shine = load_shine(args)
    # Gradio reads it when it is imported.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from shine.app import Page, serve

    reading = {"long": "cut" if args.cut else "split", "overlap": args.overlap, "max_rank": args.max_rank}
    with tempfile.TemporaryDirectory(prefix="shine-app-") as folder:
        page = Page(shine, folder=Path(folder), reading=reading, encoding=args.encoding)
        serve(page, host=args.host, port=args.port, text=documents[0].text if documents else "")
