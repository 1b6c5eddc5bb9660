"""Put a trained hypernetwork into the package, where `Shine.from_pretrained(name)` finds it.

    python examples/ship.py cpu-world outputs/reproduce/1qa --backbone outputs/reproduce/backbone
    python examples/ship.py smollm2-135m outputs/smollm2/1qa --dtype bfloat16 --reader shine/assets/smollm2-135m/reader \
        --runs shine/assets/smollm2-135m/training/* outputs/smollm2/pretrain-168 outputs/smollm2/mqa outputs/smollm2/1qa

The second is what follows ``examples/smollm2/train.sh``, which went on from what shipped, so the runs behind that come first; then
``sh examples/smollm2/score.sh`` and ``python examples/smollm2/card.py outputs/smollm2-scores``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shine.chat import token_ids
from shine.checkpoint import find_checkpoint, is_unfinished, load_hypernetwork, read_info, read_weights, save_hypernetwork
from shine.data.batching import pad_left
from shine.data.worlds import World
from shine.fingerprint import fingerprint
from shine.loading import load_backbone
from shine.lora import LoRA
from shine.training.monitor import METRICS_FILE
from shine.training.state import RUN_FILE
from shine.training.tuning import TRAINING_FILE
from shine.zoo import ASSETS

PARTS = ("backbone", "hypernetwork", "reader", "training")
"""Folders of a model in the package that are written here."""
RECIPE_FILE, AGAIN_FILE = "recipe.json", "again.json"
LARGEST = 60e6
"""Bytes that one model may add to the package."""
MOST_ROUNDED = 0.05
"""How far an adapter may move, relative to its norm, when its hypernetwork is stored in a smaller type."""


def ship(
    made: str | Path,
    place: Path,
    *,
    backbone: Path | None = None,
    dtype: torch.dtype | None = None,
    reader: Path | None = None,
    runs: Sequence[Path] = (),
) -> float:
    """Write the hypernetwork ``made`` into ``place``, as one of the backbone that is called as the folder is.

    Args:
        made: a run's output folder, or a checkpoint in it.
        place: the model's folder in the package; each of `PARTS` is replaced, or goes if it is not given; what else it holds stays.
        backbone: a folder that ships with it; without one the checkpoint's own backbone, which users get by its name.
        dtype: store what was trained in this type.
        reader: the LoRA of *In-Context, tuned* that it is scored against, stored likewise.
        runs: the training runs behind it, oldest first; their metrics and recipes are kept in ``training/``.

    Returns:
        How far the adapters of 16 invented worlds moved by storing, relative to their norm (the largest).

    Raises:
        ValueError: there is nothing to ship, or a step of a run that has not ended; it is larger than `LARGEST`, or its adapters
            moved by more than `MOST_ROUNDED`.
    """
    info = read_info(made)
    if is_unfinished(find_checkpoint(made)):
        raise ValueError(f"{find_checkpoint(made)}: a step of a run that has not ended; ship its end")
    if info is None:
        raise ValueError(f"{made}: a released checkpoint says nothing of its training; ship one of ours")
    found = replace(info.backbone, path=info.backbone.path if backbone is None else str(backbone), device="cpu")
    held, tokenizer = load_backbone(found, targets=info.hypernetwork.targets)
    named = replace(info, backbone=replace(info.backbone, path=place.name), fingerprint=fingerprint(held.model, tokenizer))
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        new = Path(folder)
        save_hypernetwork(new / "hypernetwork", read_weights(made), named, dtype=dtype)
        texts = [token_ids(tokenizer, example.context) for example in World(seed=1).examples(16)]
        ids, mask = pad_left(texts, value=tokenizer.pad_token_id)
        moved = _largest_distance(*(load_hypernetwork(path, held)(held, ids, mask) for path in (made, new / "hypernetwork")))
        if moved > MOST_ROUNDED:
            raise ValueError(f"stored as {dtype}, adapters move by {moved:.1%} of their norm: leave --dtype out")
        if backbone is not None:
            shutil.copytree(backbone, new / "backbone")
        if reader is not None:
            LoRA.load(reader).save(new / "reader", dtype=dtype)
            shutil.copyfile(reader / TRAINING_FILE, new / "reader" / TRAINING_FILE)
        for number, run in enumerate(runs, start=1):
            _keep_run(run, new / "training", number)
        size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
        if size > LARGEST:
            raise ValueError(
                f"{size / 1e6:.0f} MB are more than the {LARGEST / 1e6:.0f} MB that a model may add: store it in bfloat16"
            )
        for part in PARTS:
            shutil.rmtree(place / part, ignore_errors=True)
            if (new / part).exists():
                (new / part).rename(place / part)
    return moved


def _keep_run(run: Path, training: Path, number: int) -> None:
    """What a card needs of a run, without the paths of the machine it ran on: a run's folder, or what was kept of one."""
    kept = run / RECIPE_FILE
    if kept.exists():
        recipe = json.loads(kept.read_text(encoding="utf-8"))
    else:
        told = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
        data = told["config"]["data"]["train"]
        recipe = {
            "stage": told["config"]["stage"],
            "seed": told["config"]["seed"],
            "data": {name: {key: value for key, value in source.items() if key != "path"} for name, source in data.items()},
            "versions": told["versions"],
        }
    place = training / f"{number:02}-{recipe['stage']['name']}"
    place.mkdir(parents=True)
    shutil.copyfile(run / METRICS_FILE, place / METRICS_FILE)
    # What was measured of its end later.
    if (run / AGAIN_FILE).exists():
        shutil.copyfile(run / AGAIN_FILE, place / AGAIN_FILE)
    (place / RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _largest_distance(before: LoRA, after: LoRA) -> float:
    """The largest distance between the updates of a context, relative to the first one's norm."""
    return max(before.select([index]).distance(after.select([index])) for index in range(before.batch))


def main() -> None:
    """Read the command line, ship, and say how large it is and how far it moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="under which users load it: a name of shine.zoo.HYPERNETWORKS")
    parser.add_argument("made", help="a run's output folder, or a checkpoint in it")
    parser.add_argument("--backbone", type=Path, help="a backbone that ships with it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="store what was trained in this type")
    parser.add_argument("--reader", type=Path, help="the LoRA of In-Context, tuned")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="the training runs behind it, oldest first")
    args = parser.parse_args()
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    moved = ship(args.made, ASSETS / args.name, backbone=args.backbone, dtype=dtype, reader=args.reader, runs=args.runs)
    size = sum(file.stat().st_size for file in (ASSETS / args.name).rglob("*") if file.is_file())
    print(f"{ASSETS / args.name}: {size / 1e6:.1f} MB; storing moved the adapters of 16 worlds by up to {moved:.2%} of their norm")


if __name__ == "__main__":
    main()
