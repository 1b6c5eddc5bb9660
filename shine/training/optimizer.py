"""The optimizer of the recipe, and the learning rate as a pure function of the step."""

from __future__ import annotations

import torch
from torch import nn

from shine.config import StageConfig


def learning_rate(step: int, *, stage: StageConfig, total_steps: int) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up to the peak, then linear decay to zero at ``total_steps``."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    return stage.learning_rate * max(total_steps - step, 0) / max(total_steps - stage.warmup_steps, 1)


def build_optimizer(hypernetwork: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over every trainable; norms and biases are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in hypernetwork.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (plain if isinstance(module, nn.LayerNorm) or name == "bias" else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)
