"""What torchrun starts in a test: a rank of a training that ends once its backbone is loaded, and the memory of all ranks."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runs import stage_config, train_config

from shine.config import BackboneConfig
from shine.training import stage
from shine.training.distributed import join_ranks

folder, dtype = Path(sys.argv[1]), sys.argv[2]


def held(pids: list[int]) -> dict[str, int]:
    """Bytes of these processes: not shared with any file or process, and in all, shared pages counted once."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    fields = {"private": "Private_Dirty", "pss": "Pss"}
    return {
        name: sum(int(re.search(rf"^{field}: +(\d+) kB", text, re.MULTILINE)[1]) for text in texts) * 1024  # type: ignore[index]
        for name, field in fields.items()
    }


seen: dict[str, float] = {}
real = stage.load_backbone


def load_backbone(*args: Any, **options: Any) -> Any:
    seen["began"] = time.monotonic()
    loaded = real(*args, **options)
    # Every weight is read once more, whatever the loading has read.
    seen["total"] = sum(float(parameter.sum()) for parameter in loaded[0].model.parameters())
    seen["ended"] = time.monotonic()
    return loaded


def loaded_only(_config: Any, *loaded: Any, **_options: Any) -> Any:
    """In place of the run, which would go on to train: holds what it is given."""
    return SimpleNamespace(go=lambda: loaded)


stage.load_backbone = load_backbone
stage.Run = loaded_only  # type: ignore[assignment, misc]
with join_ranks("cpu") as ranks:
    pids = ranks.gather(os.getpid())
    before = held(pids)
    ranks.wait()
    peak, done = {"private": 0, "pss": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            now = held(pids)
            peak.update({name: max(most, now[name] - before[name]) for name, most in peak.items()})

    watcher = threading.Thread(target=watch)
    if ranks.first:
        watcher.start()
    backbone = BackboneConfig(path=str(folder / "backbone"), dtype=dtype, device="cpu")
    held_by_the_run = stage.train(train_config("", folder / "run", backbone=backbone, stage=stage_config("mqa", batch_size=8)))
    ranks.wait()
    done.set()
    if ranks.first:
        watcher.join()
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps({**peak, **seen}))
    ranks.wait()
