"""What torchrun starts in a test: two ranks, the second of which dies in its third step, or says that it is there and stays."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runs import stage_config, train_config

from shine.training import loop
from shine.training.stage import train

STARTED = time.monotonic()
folder, output, way = sys.argv[1:]
real = loop.training_step


def training_step(*args: Any, **options: Any) -> Any:
    training_step.calls += 1  # type: ignore[attr-defined]
    if training_step.calls == 3 and os.environ["RANK"] == "1":  # type: ignore[attr-defined]
        (Path(output) / "died").write_text(str(time.monotonic() - STARTED))
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "stay":
            return real(*args, **options)
        raise MemoryError("rank 1 has run out of memory")
    return real(*args, **options)


training_step.calls = 0  # type: ignore[attr-defined]
loop.training_step = training_step
train(train_config(folder, Path(output) / "run", stage=stage_config(micro_batch_size=1, steps=10_000)))
