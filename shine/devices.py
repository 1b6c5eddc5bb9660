"""What is computed on: which device, how much it can hold, how fast it multiplies matrices, and in which type it had better."""

from __future__ import annotations

import os
import time
from functools import cache

import torch

BFLOAT16_SINCE = 8, 0
"""The first NVIDIA GPUs that multiply bfloat16: the A100's and GeForce 30's."""
SLOW = 1.5
"""How many times faster float32 products must be for a device to be slow at bfloat16: less is worth half of the memory."""


def find_device(name: str) -> torch.device:
    """The device that ``backbone.device`` means on this rank.

    Raises:
        ValueError: there is none of that name or number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"backbone.device={name}: set it to auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"backbone.device={name}: set it to auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"backbone.device={name}: no CUDA device {index}, there are {count}: set it to cpu, or start fewer ranks")
    return torch.device("cuda", index)


def room(device: torch.device, *, ranks: int) -> int:
    """Bytes that a rank can have: all of its GPU, or its share of the memory of a machine with so many ``ranks``."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks


def matrix_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products on this device, measured."""
    size = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    products = 0
    torch.mm(a, b)
    _settle(device)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(4):
            torch.mm(a, b)
        _settle(device)
        products += 4
    return products * 2 * size**3 / (time.perf_counter() - started)


@cache
def slow_at_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 take much longer than in float32, as they do where a device cannot do them by itself.

    A CPU is measured, once, in some hundredths of a second; one without AMX or AVX-512 takes eight times as long
    (``docs/performance.md``). A GPU says what it can.
    """
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) < BFLOAT16_SINCE
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    matrices = {dtype: torch.ones(256, 512, dtype=dtype) for dtype in best}
    # In turns, and the best of each: what else runs on the machine slows down both.
    for _ in range(6):
        for dtype, matrix in matrices.items():
            started = time.perf_counter()
            torch.mm(matrix, matrix.T)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.bfloat16] > SLOW * best[torch.float32]


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
