"""Put what ``make reproduce`` made into the package: ``python examples/cpu_world/ship.py outputs/reproduce``."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from shine.checkpoint import CheckpointInfo, read_info, read_weights, save_hypernetwork
from shine.fingerprint import fingerprint
from shine.loading import load_backbone
from shine.zoo import ASSETS


def ship(made: Path, world: Path) -> None:
    """Copy the backbone, and write the hypernetwork of the last stage as one of the backbone ``cpu-world``.

    Args:
        made: the folder of ``make reproduce``.
        world: the folder of the package that holds both.
    """
    info = read_info(made / "1qa")
    assert info is not None
    weights = read_weights(made / "1qa")
    backbone, tokenizer = load_backbone(replace(info.backbone, path=str(made / "backbone")), targets=info.hypernetwork.targets)
    for name in ("backbone", "hypernetwork"):
        shutil.rmtree(world / name, ignore_errors=True)
    shutil.copytree(made / "backbone", world / "backbone")
    named = replace(info.backbone, path=world.name)
    found = fingerprint(backbone.model, tokenizer)
    save_hypernetwork(world / "hypernetwork", weights, CheckpointInfo(named, info.hypernetwork, info.stages, found))


if __name__ == "__main__":
    ship(Path(sys.argv[1]), ASSETS / "cpu-world")
