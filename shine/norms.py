"""RMS norms by PyTorch's own operator: one kernel on a GPU where the written-out formula is seven, and a dozen backwards."""

from __future__ import annotations

import copy
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)


def fuse_norms(model: nn.Module) -> int:
    """Let every RMS norm of ``model`` compute by `torch.nn.functional.rms_norm`, where it computes the same; how many do.

    Each kind of norm is tried on a CPU first, in every type that the model's parameters have: what scales by ``1 + weight``, rounds
    at another place, or computes in another type than the operator (transformers' in float32 within a float64 model), stays.
    Norms of a model without weights (``meta``) stay too.
    """
    types = {parameter.dtype for parameter in model.parameters() if parameter.dtype in FLOATS}
    same: dict[tuple[type[nn.Module], torch.dtype, int], bool] = {}
    fused = 0
    for module in model.modules():
        if not _may_be_fused(module):
            continue
        weight = cast(Tensor, module.weight)
        kind = (type(module), weight.dtype, weight.numel())
        if kind not in same:
            same[kind] = all(_agrees(module, dtype) for dtype in types)
        if same[kind]:
            # A method, so that a copy of the model computes with its own weights.
            module.forward = MethodType(_fused, module)
            fused += 1
    return fused


@torch.no_grad()
def _agrees(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a copy with weights of no special value gives what the operator gives, to the last bit in half precision."""
    twin = copy.deepcopy(module).to("cpu")
    weight = cast(Tensor, twin.weight)
    generator = torch.Generator().manual_seed(0)
    weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    # Large values, ordinary ones, and some as small as what is added to their square.
    sizes = torch.tensor([100.0, 1.0, 1e-3])[:, None]
    states = (torch.randn(3, weight.numel(), generator=generator) * sizes).to(dtype)
    own, operators = twin(states), _fused(twin, states)
    if own.dtype != operators.dtype:
        return False
    if dtype in HALVES:
        return torch.equal(own, operators)
    return torch.allclose(own, operators, rtol=4 * torch.finfo(dtype).eps, atol=0)


def _may_be_fused(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and hasattr(module, "variance_epsilon")
        and isinstance(weight, Tensor)
        and weight.ndim == 1
        and weight.device.type != "meta"
    )


def _fused(module: nn.Module, states: Tensor) -> Tensor:
    # The weight apart: the models round the normalised states to their type before they scale them.
    weight = cast(Tensor, module.weight)
    return weight * F.rms_norm(states, weight.shape, None, cast(float, module.variance_epsilon))
