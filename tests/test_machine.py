"""What the benchmarks measure with."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shine.backbone import Backbone

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "machine.py"


@pytest.fixture(scope="module")
def machine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("machine", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine"] = module
    spec.loader.exec_module(module)
    return module


def test_runs_take_turns_and_the_first_round_is_not_timed(machine: ModuleType) -> None:
    order: list[str] = []
    seconds = machine.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_what_takes_twice_as_long_has_the_ratio_two(machine: ModuleType) -> None:
    seconds = machine.alternate({"short": lambda: time.sleep(0.02), "long": lambda: time.sleep(0.04)}, rounds=3)
    ratio = machine.ratio_with_spread(seconds["long"], seconds["short"])
    assert ratio.low <= ratio.median <= ratio.high
    assert 1.3 < ratio.median < 3
    assert str(machine.ratio_with_spread([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])) == "2.00 (1.00 to 3.00 in 3 rounds)"


def test_the_limits_are_those_of_the_shapes(machine: ModuleType, make_backbone: Callable[..., Backbone]) -> None:
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


def test_a_copy_reads_and_writes(machine: ModuleType) -> None:
    source, target = torch.ones(1 << 27, dtype=torch.uint8), torch.ones(1 << 27, dtype=torch.uint8)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    assert 1 / 3 < machine.copy_bandwidth("cpu", seconds=0.2) / (2 * (1 << 27) / min(times)) < 3
