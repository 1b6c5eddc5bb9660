"""``shine release``: a checkpoint in the published format."""

from __future__ import annotations

import argparse

from shine.cli.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine release``."""
    parser = add_command(
        commands,
        "release",
        help="write a hypernetwork in the published three-file format",
        description="Write a checkpoint as mem_tokens.pt, metanetwork.pth and metalora.pth, for code that reads these.",
        examples="shine release outputs/mqa checkpoints/mine/iftpwc/checkpoint-epoch-2",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or a checkpoint in it")
    parser.add_argument("folder", metavar="FOLDER", help="where to write; a new or an empty one")
    parser.set_defaults(run=_release)


def _release(args: argparse.Namespace) -> None:
    from shine.checkpoint import CONFIG_FILE, output_folder, read_weights
    from shine.files import may_replace, written_beside
    from shine.released import RELEASED_FILES, write_released

    folder = output_folder(args.folder)
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder}: holds a checkpoint of ours, which these files would hide; name another folder")
    if there := [name for name in RELEASED_FILES if (folder / name).exists()]:
        raise ValueError(f"{folder}: {there[0]} is there already; name another folder")
    may_replace(folder, names=frozenset(), what="released checkpoint")
    weights = read_weights(args.checkpoint)
    with written_beside(folder) as place:
        write_released(place, weights)
    print(folder)
