"""How a backbone attends: in blocks of queries on a CPU, by PyTorch's fused attention on a GPU.

PyTorch's fused attention on a CPU runs far below the rate of the matrix products it is made of, the more so in the backward pass
and under a padding mask (``docs/performance.md``). ``blocks`` is made of plain matrix products, and each block of queries sees only
the keys up to its end, so that nothing above the causal diagonal is computed but in the block on it. In float32, where nothing is
padded, the kernel is the faster one without a gradient, and on long sequences holds gigabytes less in as much time: there
``blocks`` takes it.

``fused`` is transformers' ``sdpa`` but for positions that see nothing, which padding on the left has. The kernel that CUDA takes
under a mask can leave NaN there, depending on lengths, and so in the gradients of a batch (``docs/performance.md``); here they see
everything instead, and what they hold is never read.

`register` makes both known to transformers as an ``attn_implementation``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKS, FUSED = "blocks", "fused"
BLOCK = 256
"""Queries at a time: their scores stay in a processor's cache, and the products are still large."""
LONG = 1024
"""Positions from which on a float32 training pass takes the fused kernel too, which holds no scores."""


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, bias: Tensor | None = None) -> Tensor:
    """``softmax(scale * query key^T + bias) value``.

    Args:
        query: ``[B, heads, T, D]``.
        key: ``[B, groups, T, D]``; each group of ``heads / groups`` query heads shares one.
        value: as ``key``.
        causal: no query sees a later key; ``bias`` need not say so.
        bias: ``[B or 1, 1, T, T]``, added to the scores.

    Returns:
        ``[B, heads, T, D]``. In bfloat16 the scores are rounded to it, as transformers' ``eager`` does.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    query = (query * scale).reshape(batch * groups, heads // groups, length, size)
    key, value = key.reshape(batch * groups, length, size), value.reshape(batch * groups, length, size)
    rows = []
    for start in range(0, length, BLOCK if causal else length):
        end = min(start + BLOCK, length) if causal else length
        block = query[:, :, start:end].reshape(batch * groups, -1, size)
        scores = torch.bmm(block, key[:, :end].mT)
        if bias is not None:
            grid = scores.view(batch, groups, heads // groups, end - start, end)
            grid.add_(bias[:, :, None, start:end, :end])
        if causal:
            scores.view(batch * groups, heads // groups, end - start, end)[..., start:].add_(_later(end - start, scores))
        mixed = torch.bmm(scores.softmax(-1), value[:, :end])
        rows.append(mixed.view(batch * groups, heads // groups, end - start, size))
    return torch.cat(rows, dim=2).view(batch, heads, length, size)


def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of each position to every other, ``[B, heads, T, D]``, by whatever is fastest on the device."""
    if query.device.type == "cpu":
        return attend(query, key, value, causal=False, scale=query.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(query, key, value)


def register() -> None:
    """Let transformers know ``attn_implementation="blocks"`` and ``"fused"``."""
    AttentionInterface.register(BLOCKS, _forward)
    AttentionMaskInterface.register(BLOCKS, _mask)
    AttentionInterface.register(FUSED, sdpa_attention_forward)
    AttentionMaskInterface.register(FUSED, without_empty_rows)


def best_on(device: torch.device) -> str:
    """The fastest ``attn_implementation`` of a device."""
    return BLOCKS if device.type == "cpu" else FUSED


def without_empty_rows(*args: Any, **kwargs: Any) -> Tensor | None:
    """Which keys each query sees, as transformers' ``sdpa`` has it, ``[B, 1, queries, keys]``; one that sees none sees all."""
    seen = sdpa_mask(*args, **kwargs)
    return None if seen is None else seen | ~seen.any(-1, keepdim=True)


def _fused_is_better(query: Tensor, mask: Tensor | None) -> bool:
    if query.dtype != torch.float32 or mask is not None:
        return False
    return query.shape[2] >= LONG or not torch.is_grad_enabled()


def _later(length: int, like: Tensor) -> Tensor:
    return like.new_full((length, length), float("-inf")).triu(1)


def _mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """Zero where a query sees a key, the most negative number where it does not; ``None`` where causality says it all."""
    seen = sdpa_mask(*args, **kwargs)
    if seen is None:
        return None
    # Half of it, so that no score added to it overflows; a row without any key (padding) stays finite.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 2)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ``[B, heads, T, D]`` in, ``[B, T, heads, D]`` out."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    decoding = query.shape[2] == 1 or query.shape[2] != key.shape[2]
    if decoding or _fused_is_better(query, attention_mask):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        return output, None
    causal = bool(getattr(module, "is_causal", True))
    return attend(query, key, value, causal=causal, scale=scale, bias=attention_mask).transpose(1, 2).contiguous(), None
