"""``shine pull``: a checkpoint from a hub."""

from __future__ import annotations

import argparse

from shine.cli.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine pull``."""
    parser = add_command(
        commands,
        "pull",
        help="get a checkpoint from the Hugging Face hub or from ModelScope",
        description=(
            "Download a checkpoint, check every file of it, and write it into FOLDER, whole or not at all.\n"
            "Wherever a checkpoint is named, HUB:OWNER/NAME[@REVISION] does too, and needs no pull."
        ),
        examples="shine pull hf:me/shine-smollm2 checkpoints/theirs\nshine pull ms:me/shine-smollm2@v1 checkpoints/theirs",
    )
    parser.add_argument("repository", metavar="HUB:OWNER/NAME[@REVISION]", help="hf: for Hugging Face, ms: for ModelScope")
    parser.add_argument("folder", metavar="FOLDER", help="where to write; must not be there yet")
    parser.set_defaults(run=_pull)


def _pull(args: argparse.Namespace) -> None:
    import shutil

    from shine.checkpoint import output_folder, read_info, read_weights, written_beside
    from shine.hub import FILES, download, hub_id
    from shine.manifest import MANIFEST_FILE

    remote = hub_id(args.repository)
    if remote is None:
        raise ValueError(f"{args.repository}: no hub named; write hf:{args.repository} or ms:{args.repository}")
    folder = output_folder(args.folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already; name another folder")
    source = download(remote)
    with written_beside(folder) as place:
        for name in (*FILES, MANIFEST_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, place / name)
        read_info(place)
        read_weights(place)
    print(folder)
