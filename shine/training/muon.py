"""Muon: momentum whose step of each matrix is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the published iteration: they bring singular values near one fast, to between 0.7 and 1.2, rather than to one."""
ITERATIONS = 5
MATCHED = 0.2
"""Root mean square of an update in multiples of the learning rate, as AdamW's typically is (arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, at AdamW's size, with decoupled weight decay.

    What ``torch.optim.Muon`` computes with ``adjust_lr_fn="match_rms_adamw"``. That one came with torch 2.9, and takes bfloat16
    whatever the device: on a CPU that is slow at it longer than the rest of a training step (``docs/performance.md``).

    Args:
        matrices: what to train; ``DTensor`` shards are gathered by their products.
        lr: learning rate.
        weight_decay: share of a weight that a step at rate one takes off.
        momentum: of the mean of gradients.
        dtype: of the matrix products.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95, dtype: torch.dtype
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        assert all(matrix.ndim == 2 for group in self.param_groups for matrix in group["params"])
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step for every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"]
                mean.lerp_(matrix.grad, 1 - momentum)
                update = orthogonalised(matrix.grad.lerp(mean, momentum), dtype=self.dtype)
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * MATCHED * max(matrix.shape) ** 0.5)


def orthogonalised(matrix: Tensor, *, dtype: torch.dtype) -> Tensor:
    """About ``U V^T`` of the singular value decomposition ``U S V^T``, in ``dtype``; a matrix of zeros stays one."""
    linear, cubic, quintic = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    found = (matrix.T if tall else matrix).to(dtype)
    found = found / found.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), found, beta=linear)
    return found.T if tall else found
