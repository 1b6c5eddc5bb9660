"""One rank for all linears, padded where an engine wants another than the LoRA has."""

from __future__ import annotations

from torch.nn import functional as F

from shine.lora import LoRA


def padded(lora: LoRA, rank: int) -> LoRA:
    """The same update with ``rank`` columns in every ``A [B, in, r]`` and rows in every ``B [B, r, out]``: the new ones are zero.

    Raises:
        ValueError: a pair has more than ``rank``; zeros can only be added.
    """
    if lora.rank > rank:
        raise ValueError(f"rank {lora.rank} does not fit into {rank}: padding adds zeros and never cuts; choose a larger rank")
    pairs = {path: (F.pad(a, (0, rank - a.shape[2])), F.pad(b, (0, 0, 0, rank - b.shape[1]))) for path, (a, b) in lora.items()}
    return LoRA(pairs, lora.provenance)
