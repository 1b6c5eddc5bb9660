"""``shine push``: a checkpoint to a hub."""

from __future__ import annotations

import argparse

from shine.cli.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine push``."""
    parser = add_command(
        commands,
        "push",
        help="bring a checkpoint to the Hugging Face hub or to ModelScope",
        description=(
            "Check a checkpoint and bring it to a hub, with the hash of each file. The repository is made if it is not there.\n"
            "Log in first: `hf auth login`, `modelscope login`."
        ),
        examples="shine push outputs/1qa hf:me/shine-smollm2\nshine push outputs/1qa ms:me/shine-smollm2 --private",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's output folder, or a checkpoint in it")
    parser.add_argument(
        "repository", metavar="HUB:OWNER/NAME", help="hf: for Hugging Face, ms: for ModelScope; @BRANCH for a branch (made on hf:)"
    )
    parser.add_argument("--private", action="store_true", help="if the repository is made, let others not see it")
    parser.set_defaults(run=_push)


def _push(args: argparse.Namespace) -> None:
    from shine.checkpoint import find_checkpoint, read_info, read_weights
    from shine.hub import hub_id, upload

    remote = hub_id(args.repository)
    if remote is None:
        raise ValueError(f"{args.repository}: no hub named; write hf:{args.repository} or ms:{args.repository}")
    directory = find_checkpoint(args.checkpoint)
    # What cannot be read here shall not be published.
    read_info(directory)
    read_weights(directory)
    print(upload(directory, remote, private=args.private))
