"""``shine tune-reader``: the ceiling that SHINE's answers are held against."""

from __future__ import annotations

import argparse
from pathlib import Path

from shine.cli.commands import Commands, add_command


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``shine tune-reader``."""
    parser = add_command(
        commands,
        "tune-reader",
        help="train an ordinary LoRA to read contexts in the prompt (In-Context, tuned)",
        description=(
            "Train one ordinary LoRA on the samples of a stage, with the context in the prompt. It is what the same model could\n"
            "learn from the same questions if it saw the context: test.py scores it as in_context_tuned."
        ),
        examples=(
            "shine tune-reader outputs/reader experiment=smollm2 stage=mqa stage.steps=300\n"
            "python test.py experiment=smollm2 checkpoint=outputs/1qa reader=outputs/reader "
            '"methods=[shine,in_context,in_context_tuned,only_question]"'
        ),
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write the LoRA into")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py: experiment, stage, data")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=16.0, help="its update is scaled by alpha / rank (default: %(default)s)")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from shine.adapter_files import FILES
    from shine.cli.doors import composed
    from shine.config import TrainConfig
    from shine.files import may_replace
    from shine.training.tuning import TRAINING_FILE, train_reader

    if args.rank < 1 or args.alpha <= 0:
        raise ValueError("--rank and --alpha: give positive numbers")
    config = composed(TrainConfig, "train", [f"output={args.output}", *args.overrides])
    # Before it is trained, which takes long.
    may_replace(args.output, names=FILES | {TRAINING_FILE}, what="reader")
    made = train_reader(config, rank=args.rank, alpha=args.alpha)
    (args.output / TRAINING_FILE).unlink(missing_ok=True)
    place = made.lora.save(args.output)
    # Without the paths of this machine: a reader may be given away.
    data = {
        name: {key: value for key, value in asdict(source).items() if key != "path"} for name, source in config.data.train.items()
    }
    told = {"rank": args.rank, "alpha": args.alpha, "stage": asdict(config.stage), "seed": config.seed, "data": data}
    told["losses"] = made.losses
    (place / TRAINING_FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")
    print(f"reader: {place}; score it with reader={place} and in_context_tuned among the methods of test.py")
