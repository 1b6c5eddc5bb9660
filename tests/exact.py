"""Qwen3 in float64 throughout: transformers computes norms and rotations in float32 even in a float64 model.

A last bit of float64 that summation order leaves open would now and then become a last bit of float32.
"""

from __future__ import annotations

import pytest
from float64 import normalise, rotate
from transformers.models.qwen3 import modeling_qwen3


def install_exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotations in the model's own precision, for as long as the patch lasts."""
    monkeypatch.setattr(modeling_qwen3.Qwen3RotaryEmbedding, "forward", rotate)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", normalise)
