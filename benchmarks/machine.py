"""What the benchmarks share: the machine's own limits, and two ways of doing one thing timed in turns.

A figure of ours means little by itself. Beside it stand what the machine can do at the shapes at hand (`gemm_rate`,
`copy_bandwidth`), and what is compared is run in turns (`alternate`), so that a busy neighbour or a warm processor changes both
alike; what is reported is the ratio of each round, with its spread (`ratio_with_spread`)::

    from machine import alternate, ratio_with_spread, show_limits

    rates = show_limits(backbone, rows=(1, 16, 256))
    seconds = alternate({"ours": ours, "theirs": theirs}, rounds=7)
    print(f"{ratio_with_spread(seconds['theirs'], seconds['ours'])} times as fast")

Run by itself it prints the limits of this machine at the shapes of a model: ``python benchmarks/machine.py backbone=qwen3-0.6b``.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from shine.backbone import Backbone
from shine.config import EvaluationConfig
from shine.loading import load_backbone
from shine.parsing import parse
from shine.pretrained import without_progress_bars

T = TypeVar("T")
COPIED = 1 << 28
"""Bytes of the tensor that `copy_bandwidth` copies, far more than a cache holds."""
FORWARD_FORMULA = "2N a token for linears, attention below the diagonal"
"""How `shine.flops` counts where nothing is trained, for the line that prints a share of it."""


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, with the least and the largest of them."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f} in {self.rounds} rounds)"


def configured(kind: type[T], door: str, overrides: Sequence[str]) -> T:
    """What a door such as ``train`` or ``test`` would be given on this command line, so that a benchmark measures what is run."""
    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "configs"), version_base="1.3"):
        values: object = OmegaConf.to_container(compose(door, list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return parse(kind, values)


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was given; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device | str) -> str:
    """Processor or GPU, threads and torch, for the line above the figures."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def linear_shapes(backbone: Backbone, *, rows: int) -> list[tuple[int, int, int]]:
    """The products ``[rows, in] x [in, out]`` of every target linear of every layer, as (rows, in, out)."""
    return [(rows, shape.in_features, shape.out_features) for shape in chain.from_iterable(backbone.linear_shapes)]


def gemm_rate(
    shapes: Sequence[tuple[int, int, int]], *, dtype: torch.dtype, device: torch.device | str, seconds: float = 2.0
) -> float:
    """Floating-point operations a second of these products and nothing else, in the best of as many passes as fit into ``seconds``,
    but of three, or of one that is longer.

    Each product has a weight of its own, as in a model, so that with few rows it counts that weights come from memory.

    Args:
        shapes: (rows, in, out) of each product of a pass; a multiplication with its addition is two operations.
    """
    # On the device: a model's worth of numbers takes a minute to draw in host memory.
    generator = torch.Generator(device).manual_seed(0)
    inputs = {(m, k): torch.randn(m, k, generator=generator, device=device, dtype=dtype) for m, k, _ in shapes}
    weights = [torch.randn(n, k, generator=generator, device=device, dtype=dtype) for _, k, n in shapes]

    def products() -> None:
        for (m, k, _), weight in zip(shapes, weights, strict=True):
            F.linear(inputs[m, k], weight)

    operations = sum(2 * m * k * n for m, k, n in shapes)
    with torch.inference_mode():
        run = _captured(products, device) if torch.device(device).type == "cuda" else products
        return operations / _best(run, device, seconds)


def copy_bandwidth(device: torch.device | str, *, seconds: float = 1.0) -> float:
    """Bytes read and written a second when a large tensor is copied, in the best of as many copies as fit into ``seconds``."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target: Tensor = torch.empty_like(source)
    return 2 * COPIED / _best(lambda: target.copy_(source), device, seconds)


def peak_memory(run: Callable[[], object], device: torch.device | str) -> int:
    """Bytes held at most during one run: of the GPU by tensors, on a CPU by the whole process (Linux only; zero elsewhere)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    release(device)
    held = Path("/proc/self/statm")
    if not held.exists():
        return 0
    page, seen, done = resource.getpagesize(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen[0] = max(seen[0], int(held.read_text().split()[1]) * page)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return seen[0]


def show_profile(run: Callable[[], object], device: torch.device) -> None:
    """The operators that take most of one run, after one that warms up."""
    run()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        run()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


def release(device: torch.device | str) -> None:
    """Give back what nobody holds any more; a backbone and its hooks hold each other, and a process keeps what it has freed."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def first_runs(
    runs: dict[str, Callable[[], T]], device: torch.device | str, *, needed: str, warm_up: int = 0
) -> tuple[dict[str, int], dict[str, T]]:
    """Each run once, as its warm-up: its peak memory, and what it returned. What does not fit is said and left out of ``runs``.

    Args:
        needed: without this one the program ends.
        warm_up: runs of each before, where it is the first that makes what all later ones hold.
    """
    peaks: dict[str, int] = {}
    returned: dict[str, T] = {}

    def keep(name: str, run: Callable[[], T]) -> None:
        returned[name] = run()

    for name, run in list(runs.items()):
        try:
            for _ in range(warm_up):
                run()
            peaks[name] = peak_memory(partial(keep, name, run), device)
        except torch.OutOfMemoryError:
            print(f"  {name}: out of memory")
            del runs[name]
            if name == needed:
                raise SystemExit(f"{name} does not fit: take a smaller --batch") from None
        if name not in runs:
            # Not sooner: until here the error holds what was computed.
            release(device)
    return peaks, returned


def alternate(
    runs: dict[str, Callable[[], object]], *, rounds: int, device: torch.device | str = "cpu", warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds that each run took in each round; the order turns round every time, so that none always comes after another.

    Args:
        runs: what is compared, by name.
        warm_up: rounds that are run before and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warm_up, rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            spent = _time(runs[name], device)
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def ratio_with_spread(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """How many times as large the first is as the second, round by round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def _time(run: Callable[[], object], device: torch.device | str) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def _captured(run: Callable[[], object], device: torch.device | str) -> Callable[[], object]:
    """``run`` as a CUDA graph: the host takes longer to hand over a product of few rows than a GPU to compute it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            run()
    return graph.replay


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One for all graphs of a GPU: cuBLAS keeps a workspace for every stream, which later peaks would count."""
    return torch.cuda.Stream(index)


def _best(run: Callable[[], object], device: torch.device | str, seconds: float) -> float:
    """Of as many runs as fit, but of three; of one that takes all the time by itself, so long that its start does not count."""
    times = [_time(run, device)]
    until = time.perf_counter() + seconds - times[0]
    while time.perf_counter() < until or (len(times) < 3 and times[0] < seconds):
        times.append(_time(run, device))
    return min(times)


@contextmanager
def tf32() -> Iterator[None]:
    """float32 products on the tensor cores of a GPU, as the published recipe computes; nothing on a CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def show_limits(backbone: Backbone, *, rows: Sequence[int]) -> dict[tuple[int, torch.dtype], float]:
    """Print what this machine can do at the shapes of a model, and return its matrix rates by number of tokens and dtype.

    float32 on a GPU is TF32, as the recipe has it. Bfloat16, where neither ours nor the recipe computes in it, is measured at the
    fewest tokens alone: where it is slow, thousands of them take a minute.
    """
    device = backbone.device
    # A GPU makes thousands of passes a second.
    share = 0.1 if device.type == "cuda" else 1.0
    print(f"{describe(device)}; copying {copy_bandwidth(device, seconds=share) / 1e9:,.1f} GB/s, read and written")
    rates = {}
    for count in rows:
        shapes = linear_shapes(backbone, rows=count)
        names = {torch.bfloat16: "bfloat16", torch.float32: "TF32" if device.type == "cuda" else "float32"}
        if backbone.dtype == torch.float32 and count > min(rows):
            del names[torch.bfloat16]
        for dtype in names:
            with tf32():
                rates[count, dtype] = gemm_rate(shapes, dtype=dtype, device=device, seconds=2 * share)
        found = ", ".join(f"{rates[count, dtype] / 1e9:>8,.1f} {name}" for dtype, name in names.items())
        print(f"its linears on {count:>5,} tokens, GFLOP/s: {found}", flush=True)
    release(device)
    return rates


def main() -> None:
    """Print the limits at the shapes of a backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024], help="tokens at once (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="as for test.py (default: its own SmolLM2)")
    args = parser.parse_intermixed_args()
    config = configured(EvaluationConfig, "test", args.overrides)
    with without_progress_bars():
        backbone, _ = load_backbone(config.backbone, targets=config.hypernetwork.targets)
    show_limits(backbone, rows=args.rows)


if __name__ == "__main__":
    main()
