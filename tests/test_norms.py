"""Norms by PyTorch's own operator compute what the models' own formula does, or stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from shine.backbone import Backbone
from shine.norms import _fused, fuse_norms


def random_norm(dtype: torch.dtype = torch.float32) -> Qwen3RMSNorm:
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(24, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    return norm


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_every_norm_of_a_model_is_fused(kind: str) -> None:
    model = tiny_model(kind)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert fuse_norms(model) == len(norms) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_fused_norm_and_its_gradient_are_the_models_own(dtype: torch.dtype) -> None:
    """To the last bit, on a CPU."""
    norm = random_norm(dtype)
    states = (torch.randn(3, 7, 24) * 50).to(dtype).requires_grad_()
    before = norm(states)
    [slope] = torch.autograd.grad(before.sum(), states)
    assert fuse_norms(norm) == 1
    after = norm(states)
    assert torch.equal(after, before)
    assert torch.equal(torch.autograd.grad(after.sum(), states)[0], slope)


def test_a_copy_of_a_fused_norm_has_its_own_weight() -> None:
    norm = random_norm()
    fuse_norms(norm)
    twin = copy.deepcopy(norm)
    nn.init.zeros_(twin.weight)
    assert not twin(torch.ones(1, 24)).any()
    assert norm(torch.ones(1, 24)).any()


class OneMoreRMSNorm(Qwen3RMSNorm):
    """As Gemma's: the weight is what is added to one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / self.weight * (1 + self.weight)


def test_a_norm_of_another_formula_stays() -> None:
    norm = OneMoreRMSNorm(24)
    assert fuse_norms(norm) == 0
    torch.testing.assert_close(norm(torch.ones(1, 24)), torch.full((1, 24), 2.0))


class RoundedOnceRMSNorm(Qwen3RMSNorm):
    """As OLMo 2's: scaled before it is rounded."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        return (self.weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(
            hidden_states.dtype
        )


def test_a_norm_that_rounds_at_another_place_stays() -> None:
    """Though its weights are all one, under which both forms agree."""
    assert fuse_norms(RoundedOnceRMSNorm(24).bfloat16()) == 0


def test_a_backbone_computes_by_fused_norms(make_backbone: Callable[..., Backbone]) -> None:
    norms = [module for module in make_backbone().model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms
    assert {module.forward.__func__ for module in norms} == {_fused}


def test_a_norm_that_computes_in_float32_within_a_float64_model_stays() -> None:
    norm = random_norm(torch.float64)
    states = torch.randn(2, 24, dtype=torch.float64)
    before = norm(states)
    assert fuse_norms(norm) == 0
    assert torch.equal(norm(states), before)


def test_norms_without_weights_stay() -> None:
    with torch.device("meta"):
        norm = Qwen3RMSNorm(24)
    assert fuse_norms(norm) == 0
