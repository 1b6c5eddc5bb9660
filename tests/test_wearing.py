"""What a layer computes while it wears a LoRA, and how little it asks of autograd for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shine.lora import LoRA
from shine.wearing import LayerLoRA, as_type

GROUP = ("q", "k")


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def wear(x: Tensor, weight: Tensor, *pairs: Tensor) -> Tensor:
    """Two linears of one input, each with its update."""
    worn = LayerLoRA(LoRA({"q": (pairs[0], pairs[1]), "k": (pairs[2], pairs[3])}))
    return torch.cat([worn.add(path, GROUP, x, x @ weight) for path in GROUP], dim=-1)


@pytest.mark.parametrize("adapters", [1, 2, 4], ids=["one for all", "one for two samples", "one each"])
def test_an_update_and_all_its_gradients_are_those_of_the_formula(adapters: int) -> None:
    """Of the input, of the frozen linear's output, of both halves of each pair; ranks of one group differ."""
    x, weight, a_q, b_q, a_k, b_k = inputs = tensors(
        (4, 5, 6), (6, 7), (adapters, 6, 2), (adapters, 2, 7), (adapters, 6, 3), (adapters, 3, 7)
    )
    each = torch.arange(4) // (4 // adapters)
    expected = torch.cat([x @ weight + x @ a[each] @ b[each] for a, b in ((a_q, b_q), (a_k, b_k))], dim=-1)
    torch.testing.assert_close(wear(*inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(wear(*inputs), expected)
    assert torch.autograd.gradcheck(wear, inputs)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 6)], ids=["one token each", "tokens in rows"])
def test_an_input_of_other_dimensions_is_worn_too(shape: tuple[int, ...]) -> None:
    """As experts that are shared are called: without the dimension of the sequence."""
    x, weight, *pairs = tensors(shape, (6, 7), (4, 6, 2), (4, 2, 7), (4, 6, 2), (4, 2, 7))
    rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
    expected = wear(rows, weight, *pairs).view(*shape[:-1], 14)
    torch.testing.assert_close(wear(x, weight, *pairs), expected)
    assert torch.autograd.gradcheck(wear, (x, weight, *pairs))


def test_the_output_of_a_linear_with_a_bias_is_changed_in_place_too() -> None:
    """It is a view of a product, which autograd copies."""
    x, weight, bias, a, b = tensors((2, 5, 6), (7, 6), (7,), (2, 6, 3), (2, 3, 7))

    def worn(*inputs: Tensor) -> Tensor:
        x, weight, bias, a, b = inputs
        return LayerLoRA(LoRA({"q": (a, b)})).add("q", ("q",), x, F.linear(x, weight, bias))

    torch.testing.assert_close(worn(x, weight, bias, a, b), F.linear(x, weight, bias) + x @ a @ b)
    assert torch.autograd.gradcheck(worn, (x, weight, bias, a, b))


def test_what_needs_no_gradient_gets_none() -> None:
    """As under an adapter that is only worn: the input alone is differentiated."""
    x, weight, *pairs = tensors((1, 5, 6), (6, 7), (1, 6, 2), (1, 2, 7), (1, 6, 2), (1, 2, 7))
    frozen = [tensor.detach() for tensor in (weight, *pairs)]
    wear(x, *frozen).sum().backward()
    expected = sum((frozen[0] + (a @ b)[0]).sum(1) for a, b in (frozen[1:3], frozen[3:5]))
    torch.testing.assert_close(x.grad, expected.expand_as(x))


def test_a_batch_that_adapters_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 3 cannot wear 2 adapters"):
        wear(*tensors((3, 5, 6), (6, 7), (2, 6, 2), (2, 2, 7), (2, 6, 2), (2, 2, 7)))


def test_converted_tensors_give_their_gradients_back_in_their_own_type() -> None:
    first, second = (tensor.detach().float().requires_grad_() for tensor in tensors((3, 2), (4,)))
    assert as_type([first], torch.float32)[0] is first
    converted = as_type([first, second], torch.bfloat16)
    assert [tensor.dtype for tensor in converted] == [torch.bfloat16] * 2
    assert all(torch.equal(new, old.bfloat16()) for new, old in zip(converted, (first, second), strict=True))
    (converted[0] * 3).sum().backward()
    assert torch.equal(first.grad, torch.full((3, 2), 3.0))
    assert torch.equal(second.grad, torch.zeros(4))
