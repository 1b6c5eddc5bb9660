"""What the benchmarks measure with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch

from shine.backbone import Backbone

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "machine.py"


def test_runs_take_turns_and_the_first_round_is_not_timed() -> None:
    order: list[str] = []
    seconds = machine.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_what_takes_twice_as_long_has_the_ratio_two() -> None:
    seconds = machine.alternate({"short": lambda: time.sleep(0.02), "long": lambda: time.sleep(0.04)}, rounds=3)
    ratio = machine.ratio_with_spread(seconds["long"], seconds["short"])
    assert ratio.low <= ratio.median <= ratio.high
    assert 1.3 < ratio.median < 3
    assert str(machine.ratio_with_spread([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])) == "2.00 (1.00 to 3.00 in 3 rounds)"


def test_the_limits_are_those_of_the_shapes(make_backbone: Callable[..., Backbone]) -> None:
    """The rate counts two operations a multiplication: a product timed by hand takes about as long as it says."""
    shapes = machine.linear_shapes(make_backbone(), rows=5)
    assert len(shapes) == 3 * 7
    assert (shapes[0], shapes[-1]) == ((5, 32, 32), (5, 64, 32))
    rate = machine.gemm_rate([(256, 512, 512)], dtype=torch.float32, device="cpu", seconds=0.2)
    x, w = torch.ones(256, 512), torch.ones(512, 512)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        x @ w
        times.append(time.perf_counter() - started)
    assert 2 * 256 * 512 * 512 / rate < 3 * min(times)
    assert 2 * 256 * 512 * 512 / rate > min(times) / 3


def test_the_benchmark_of_answering_runs(tmp_path: Path) -> None:
    """As from the command line, from anywhere: every way answers; a model is named by its option alone."""
    command = [sys.executable, str(FILE.with_name("evaluate.py")), "--model", "cpu-world", "--device", "cpu", "--contexts", "2"]
    command += ["--questions", "1", "--new", "2", "--rounds", "1", "sets=worlds", "stage.context_length=64"]
    environment = {**os.environ, "PYTHONPATH": str(FILE.parent.parent)}
    options: dict[str, Any] = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    found = subprocess.run(command, check=False, **options)
    assert found.returncode == 0, found.stderr
    for way in ("2 side by side", "one by one", "recipe"):
        assert re.search(rf"^  {way} .* useful tokens/s", found.stdout, flags=re.M)
    refused = subprocess.run([*command, "backbone=qwen3-8b"], check=False, **options)
    assert refused.returncode == 2
    assert "backbone=qwen3-8b: --model says which model; only sets, data and prompts" in refused.stderr


def test_a_copy_reads_and_writes() -> None:
    source, target = torch.ones(1 << 27, dtype=torch.uint8), torch.ones(1 << 27, dtype=torch.uint8)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    assert 1 / 3 < machine.copy_bandwidth("cpu", seconds=0.2) / (2 * (1 << 27) / min(times)) < 3
