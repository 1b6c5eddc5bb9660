"""What torchrun starts in a test: a rank that loads a backbone as training does, and watches the memory of all ranks."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

from shine.config import BackboneConfig
from shine.training.distributed import join_ranks
from shine.zoo import load_backbone

folder, dtype = Path(sys.argv[1]), sys.argv[2]


def held(pids: list[int]) -> dict[str, int]:
    """Bytes of these processes: not shared with any file or process, and in all, shared pages counted once."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    fields = {"private": "Private_Dirty", "pss": "Pss"}
    return {
        name: sum(int(re.search(rf"^{field}: +(\d+) kB", text, re.MULTILINE)[1]) for text in texts) * 1024  # type: ignore[index]
        for name, field in fields.items()
    }


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
    with ranks.one_by_one():
        began = time.monotonic()
        loaded = load_backbone(
            BackboneConfig(path=str(folder / "backbone"), dtype=dtype, device="cpu"), targets=("q_proj", "v_proj")
        )
        # Every weight is read once more, whatever the loading has read.
        total = sum(float(parameter.sum()) for parameter in loaded[0].model.parameters())
        ended = time.monotonic()
    ranks.wait()
    done.set()
    if ranks.first:
        watcher.join()
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps({**peak, "total": total, "began": began, "ended": ended}))
    ranks.wait()
