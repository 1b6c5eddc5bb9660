"""What torchrun starts in a test: a rank that loads a backbone as training does, and watches the memory of all ranks."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from shine.config import BackboneConfig
from shine.training.distributed import join_ranks
from shine.zoo import load_backbone

folder, dtype = Path(sys.argv[1]), sys.argv[2]


def private(pid: int) -> int:
    """Bytes that this process shares with no file and no other process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_Dirty: +(\d+) kB", text, re.MULTILINE)) * 1024


with join_ranks("cpu") as ranks:
    pids = ranks.gather(os.getpid())
    before = sum(private(pid) for pid in pids)
    ranks.wait()
    peak, done = 0, threading.Event()

    def watch() -> None:
        global peak
        while not done.wait(0.01):
            peak = max(peak, sum(private(pid) for pid in pids) - before)

    watcher = threading.Thread(target=watch)
    if ranks.first:
        watcher.start()
    own = private(os.getpid())
    with ranks.one_by_one():
        began = time.monotonic()
        backbone, _ = load_backbone(
            BackboneConfig(path=str(folder / "backbone"), dtype=dtype, device="cpu"), targets=("q_proj", "v_proj")
        )
        ended = time.monotonic()
    end = private(os.getpid()) - own
    ranks.wait()
    done.set()
    if ranks.first:
        watcher.join()
    ranks.wait()
    row = {"peak": peak, "end": end, "began": began, "ended": ended}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(row))
    dist.barrier()
