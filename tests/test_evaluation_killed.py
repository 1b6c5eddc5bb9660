"""A real evaluation in a process of its own, killed again and again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shine.evaluation.results import PREDICTIONS_FILE, SUMMARY_FILE
from shine.zoo import ASSETS

ROOT = Path(__file__).resolve().parent.parent


def start(output: Path) -> subprocess.Popen[bytes]:
    overrides = ["experiment=cpu_world", f"checkpoint={ASSETS / 'cpu-world' / 'hypernetwork'}", f"output={output}", "batch_size=2"]
    command = [sys.executable, str(ROOT / "test.py"), *overrides, "data.test.worlds.options.count=120"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_run_killed_ten_times_has_the_file_of_one_that_was_not(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    took, rng, kills = time.monotonic() - begun, random.Random(1), 0
    while kills < 10:
        process = start(tmp_path / "killed")
        try:
            assert process.wait(timeout=rng.uniform(0.3, 0.8) * took) == 0
            (tmp_path / "killed" / SUMMARY_FILE).unlink()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert start(tmp_path / "killed").wait() == 0
    whole, killed = ((tmp_path / name / PREDICTIONS_FILE).read_bytes() for name in ("whole", "killed"))
    assert killed == whole
