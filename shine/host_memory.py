"""Fresh memory is dear on a CPU: the kernel zeroes each page of it, and under a virtual machine may first have to find one.

The C library gives what a step frees back to the kernel, so the next step asks for all of its activations anew. In a loop that
takes the same memory again and again, that was half of a training step's time on one machine (``docs/performance.md``).
"""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's ``malloc.h``."""
AT_ONCE = 1 << 26
"""Bytes that the heap grows by."""


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep the memory that it frees, where ``device`` is the CPU; whether it does from now on.

    For commands that loop until they end, not for a library in someone else's process. Other C libraries than glibc are left as
    they are.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # No block apart from the heap, nothing given back at its end (-1 is the largest size there is).
    wanted = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: AT_ONCE}
    done = [mallopt(name, value) == 1 for name, value in wanted.items()]
    return all(done)
