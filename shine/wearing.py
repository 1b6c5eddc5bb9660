"""What a decoder layer does while it wears a LoRA, in as few operations as it takes.

On a GPU a layer's arithmetic is often shorter than the time the host needs to hand its operations over, so their number is counted
(`benchmarks/operators.py`): adding an update in place costs autograd one node, not the copies it makes for a changed view (which
the output of a linear with a bias still is).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shine.lora import LoRA


class Wearing(threading.local):
    """What this thread wears: ``pass_lora`` from now on, ``layer`` inside a layer's call; ``tap`` collects states."""

    pass_lora: LoRA | None = None
    layer: LayerLoRA | None = None
    tap: list[Tensor] | None = None
    tap_tokens: int = 0


class LayerLoRA:
    """What one decoder layer wears during one call.

    Linears with the same input (query, key and value; gate and up) have their ``A`` side by side in one product: one reading of
    the input, and in the backward pass one gradient to add instead of three.
    """

    def __init__(self, lora: LoRA) -> None:
        self._lora = lora
        self._input: Tensor | None = None
        self._projected: dict[str, Tensor] = {}

    def add(self, path: str, group: tuple[str, ...], x: Tensor, output: Tensor) -> Tensor:
        """``output + (x A) B`` for the linear at ``path``, in place; ``group`` shares ``x``."""
        b = self._lora[path][1].to(output.dtype)
        projected = self._project(path, group, x)
        if not torch.is_grad_enabled():
            return _add_product(output, projected, b)
        added: Tensor = _AddUpdate.apply(output, projected, b)
        return added

    def _project(self, path: str, group: tuple[str, ...], x: Tensor) -> Tensor:
        """``x A`` of the linear at ``path``, ``[adapters, tokens, r]``."""
        if self._input is not x or path not in self._projected:
            pairs = [self._lora[name][0].to(x.dtype) for name in group]
            a = torch.cat(pairs, dim=2) if len(pairs) > 1 else pairs[0]
            if x.shape[0] % a.shape[0]:
                raise ValueError(
                    f"a batch of {x.shape[0]} cannot wear {a.shape[0]} adapters: give one per sample, or a multiple of them"
                )
            together = torch.bmm(_by_adapter(x, a.shape[0]), a)
            pieces = together.split([pair.shape[2] for pair in pairs], dim=2) if len(pairs) > 1 else (together,)
            self._input, self._projected = x, dict(zip(group, pieces, strict=True))
        return self._projected[path]


def _by_adapter(states: Tensor, adapters: int) -> Tensor:
    """``[B, ..., H] -> [adapters, B / adapters * ..., H]``: the samples in a row that wear one adapter, one below the other."""
    as_it_is = states.ndim == 3 and states.shape[0] == adapters
    return states if as_it_is else states.reshape(adapters, -1, states.shape[-1])


def _add_product(output: Tensor, projected: Tensor, b: Tensor) -> Tensor:
    """``output [B, ..., out]`` with ``projected [adapters, tokens, r] x b [adapters, r, out]`` added in place."""
    as_it_is = output.ndim == 3 and output.shape[0] == b.shape[0]
    rows = output if as_it_is else output.view(b.shape[0], -1, output.shape[-1])
    rows.baddbmm_(projected, b)
    return output


class _AddUpdate(torch.autograd.Function):
    """`_add_product` as one node: of a view that is changed in place, autograd copies the gradient twice."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, projected: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(projected, b)
        ctx.mark_dirty(output)
        return _add_product(output, projected, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        projected, b = ctx.saved_tensors
        rows = _by_adapter(gradient, b.shape[0])
        of_projected = torch.bmm(rows, b.mT) if ctx.needs_input_grad[1] else None
        of_b = torch.bmm(projected.mT, rows) if ctx.needs_input_grad[2] else None
        return gradient, of_projected, of_b


class _AsType(torch.autograd.Function):
    """Tensors in another type, all at once: on a GPU one operation for many of them instead of one each.

    Their gradients come back together too, at the end of the backward pass: DDP sends those of the meta LoRA after it, not within.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before = tensors[0].dtype
        return _converted(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_converted(gradients, ctx.before)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(made, tuple(tensors))
    return made


def as_type(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors, which are of one type, in another; gradients come back in theirs."""
    converted: tuple[Tensor, ...] = tuple(tensors) if tensors[0].dtype == dtype else _AsType.apply(dtype, *tensors)
    return converted
