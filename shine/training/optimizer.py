"""The optimizer of the recipe, and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from shine.config import StageConfig
from shine.training.muon import Muon


def learning_rate(step: int, *, stage: StageConfig, total_steps: int) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up to the peak, then linear to zero at ``total_steps``, or none."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.learning_rate
    return stage.learning_rate * max(total_steps - step, 0) / max(total_steps - stage.warmup_steps, 1)


class Optimizers:
    """Several optimizers that share out the trainables and step together."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all of them."""
        return [group for part in self.parts for group in part.param_groups]

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.param_groups:
            group["lr"] = rate

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()


def build_optimizer(trained: nn.Module, stage: StageConfig, *, dtype: torch.dtype = torch.bfloat16) -> Optimizers:
    """AdamW over every trainable, or Muon over the matrices of linears and AdamW over the others; norms and biases are not decayed.

    Muon's update is brought to the root mean square that AdamW's has, so both take one learning rate.

    Args:
        trained: what is trained.
        stage: which optimizer, at which rate.
        dtype: of Muon's matrix products, as published if nothing is said; runs take that of their passes.
    """
    matrices: list[nn.Parameter] = []
    others: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module, name, parameter in _owned(trained):
        if stage.optimizer == "muon" and isinstance(module, nn.Linear) and name == "weight":
            matrices.append(parameter)
        else:
            others.append((module, name, parameter))
    adamw = _adamw(others, stage)
    if not matrices:
        return Optimizers(adamw)
    return Optimizers(Muon(matrices, lr=stage.learning_rate, weight_decay=stage.weight_decay, dtype=dtype), adamw)


def _owned(trained: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in trained.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


def _adamw(owned: Sequence[tuple[nn.Module, str, nn.Parameter]], stage: StageConfig) -> torch.optim.AdamW:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module, name, parameter in owned:
        (plain if isinstance(module, nn.LayerNorm) or name == "bias" else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)
