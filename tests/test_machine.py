"""What the benchmarks measure with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shine.backbone import Backbone

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "machine.py"


def test_runs_take_turns_and_the_first_round_is_not_timed() -> None:
    order: list[str] = []
    seconds = machine.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


class Clock:
    """In the place of the module ``time``: it goes on only where it is told to."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.perf_counter = now


class Bytes(TorchDispatchMode):
    """Counts what copies read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.count += sum(tensor.nbytes for tensor in args)
        return func(*args, **kwargs or {})


def test_what_takes_twice_as_long_has_the_ratio_two(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []
    monkeypatch.setattr(machine, "time", Clock(lambda: sum(spent)))
    seconds = machine.alternate({"short": lambda: spent.append(2.0), "long": lambda: spent.append(4.0)}, rounds=3)
    assert seconds == {"short": [2.0] * 3, "long": [4.0] * 3}
    assert machine.ratio_with_spread(seconds["long"], seconds["short"]) == machine.Ratio(2.0, 2.0, 2.0, 3)
    assert str(machine.ratio_with_spread([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])) == "2.00 (1.00 to 3.00 in 3 rounds)"


def test_the_limits_are_those_of_the_shapes(make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of a billion operations a second, by PyTorch's own count, is found to be one."""
    shapes = machine.linear_shapes(make_backbone(), rows=5)
    assert len(shapes) == 3 * 7
    assert (shapes[0], shapes[-1]) == ((5, 32, 32), (5, 64, 32))
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(machine, "time", Clock(lambda: counter.get_total_flops() / 1e9))
        rate = machine.gemm_rate(shapes, dtype=torch.float32, device="cpu", seconds=0.001)
    assert counter.get_total_flops() >= 0.001 * 1e9
    assert rate == pytest.approx(1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slow_products_that_nobody_needs_are_measured_once(
    dtype: torch.dtype, make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bfloat16 at the fewest tokens where the backbone is float32, and at all where it is bfloat16."""
    backbone = make_backbone()
    backbone.model.to(dtype)
    monkeypatch.setattr(machine, "gemm_rate", lambda shapes, *, dtype, device, seconds: 1e9 * shapes[0][0])
    rates = machine.show_limits(backbone, rows=(3, 2, 5))
    everything = {(count, each) for count in (3, 2, 5) for each in (torch.bfloat16, torch.float32)}
    unneeded = {(3, torch.bfloat16), (5, torch.bfloat16)} if dtype == torch.float32 else set()
    assert rates == {(count, each): 1e9 * count for count, each in everything - unneeded}
    said = capsys.readouterr().out.splitlines()[1:]
    assert [line.count("bfloat16") for line in said] == [int((count, torch.bfloat16) in rates) for count in (3, 2, 5)]


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


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that moves a billion bytes a second is found to be one."""
    monkeypatch.setattr(machine, "COPIED", 1 << 12)
    with Bytes() as moved:
        monkeypatch.setattr(machine, "time", Clock(lambda: moved.count / 1e9))
        assert machine.copy_bandwidth("cpu", seconds=1e-4) == pytest.approx(1e9)
    assert moved.count >= 1e-4 * 1e9


@pytest.mark.parametrize(("a_run", "runs"), [(0.1, 20), (0.7, 3), (1.9, 3), (2.1, 1)])
def test_a_limit_is_the_best_of_three_or_of_one_that_takes_all_the_time(
    monkeypatch: pytest.MonkeyPatch, a_run: float, runs: int
) -> None:
    spent = [0.0]

    def run() -> None:
        spent[0] += a_run

    monkeypatch.setattr(machine, "time", Clock(lambda: spent[0]))
    assert machine._best(run, "cpu", 2.0) == pytest.approx(a_run)
    assert round(spent[0] / a_run) == runs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
def test_the_products_of_a_gpu_are_handed_over_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host hands over those of the warm-up and of the capture, and no more while they are timed."""
    handed: list[object] = []
    linear = F.linear

    def watched(*args: Any) -> torch.Tensor:
        handed.append(args)
        return linear(*args)

    monkeypatch.setattr(machine.F, "linear", watched)
    assert machine.gemm_rate([(1, 64, 64)] * 10, dtype=torch.bfloat16, device="cuda", seconds=0.05) > 0
    assert len(handed) == 10 * (3 + 1)
