"""Qwen3 in float64 throughout: transformers computes norms and rotations in float32 even in a float64 model.

A last bit of float64 that summation order leaves open would now and then become a last bit of float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3


def install_exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotations in the model's own precision, for as long as the patch lasts."""

    def rotate(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def normalise(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_qwen3.Qwen3RotaryEmbedding, "forward", rotate)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", normalise)
