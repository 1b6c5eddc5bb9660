"""The hypernetwork: memory tokens, meta LoRA and M2P transformer, everything that is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shine.backbone import Backbone
from shine.config import HypernetworkConfig
from shine.lora import LinearShape, LoRA, LoRALayout
from shine.m2p import M2PTransformer
from shine.wearing import as_type


class _Pair(nn.Module):
    """A trained low-rank pair, ``A [1, in, r]`` and ``B [1, r, out]``."""

    def __init__(self, in_features: int, out_features: int, rank: int, std: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(1, in_features, rank) * std)
        self.B = nn.Parameter(torch.zeros(1, rank, out_features))


class MetaLoRA(nn.Module):
    """The trained LoRA that the backbone wears while it encodes; it starts as no change (``B = 0``)."""

    def __init__(self, layout: LoRALayout, *, std: float) -> None:
        super().__init__()
        self.paths = [shape.path for layer in layout.layers for shape in layer]
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {shape.path.rsplit(".", 1)[-1]: _Pair(shape.in_features, shape.out_features, layout.rank, std) for shape in layer}
            )
            for layer in layout.layers
        )

    def forward(self, dtype: torch.dtype) -> LoRA:
        """The LoRA, batch one, in the type in which it is worn."""
        values = iter(as_type(list(self.parameters()), dtype))
        return LoRA({path: (next(values), next(values)) for path in self.paths})


class Hypernetwork(nn.Module):
    """Contexts in, LoRA out, in one pass of the backbone and one of the M2P transformer.

    The parameters are float32, under a float64 backbone float64.

    Args:
        config: ranks, scale, layout, depth; see `HypernetworkConfig`.
        backbone: whose linears the LoRA is for. Kept outside this module: it is passed to `forward` again.
    """

    def __init__(self, config: HypernetworkConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        hidden, shapes = backbone.hidden_size, backbone.linear_shapes
        hooked = tuple(shape.path.rsplit(".", 1)[-1] for shape in shapes[0])
        if hooked != config.targets:
            raise ValueError(
                f"the backbone was loaded for the targets {', '.join(hooked)}, this hypernetwork is for "
                f"{', '.join(config.targets)}: load the backbone with the hypernetwork's targets, in its order"
            )
        self.layout = _layout("rank", shapes, rank=config.rank, order=config.layout, scale=config.scale)
        meta_layout = _layout("meta_rank", shapes, rank=config.meta_rank)
        memory_tokens = self.layout.memory_tokens(hidden)
        self.memory_tokens = nn.Parameter(torch.randn(memory_tokens, hidden) * config.memory_std)
        self.meta_lora = MetaLoRA(meta_layout, std=config.meta_std)
        self.m2p = M2PTransformer(
            hidden,
            backbone_layers=len(shapes),
            memory_tokens=memory_tokens,
            layers=config.m2p.layers,
            heads=config.m2p.heads or default_heads(hidden),
            feed_forward=config.m2p.feed_forward or 2 * hidden,
            layers_first=config.m2p.layers_first,
            standardise=config.m2p.standardise,
        )
        self.to(torch.promote_types(torch.float32, backbone.dtype))

    def forward(
        self, backbone: Backbone, context_ids: Tensor, context_mask: Tensor | None, *, dtype: torch.dtype | None = None
    ) -> LoRA:
        """The LoRA of each context.

        Args:
            backbone: the one this hypernetwork was built for.
            context_ids: ``[B, T]``, left-padded.
            context_mask: ``[B, T]``, or ``None`` when nothing is padded.
            dtype: of the LoRA; the parameters' where it is to be kept, the backbone's where it is only worn.

        Returns:
            A LoRA of batch ``B``.
        """
        states = self.memory_states(backbone, context_ids, context_mask)
        return self.layout.cut(self.flat_state(states), dtype=dtype)

    def memory_states(self, backbone: Backbone, context_ids: Tensor, context_mask: Tensor | None) -> Tensor:
        """``[B, L, M, H]``, what the backbone holds at the memory tokens under the meta LoRA."""
        return backbone.memory_states(
            context_ids, context_mask, memory_tokens=self.memory_tokens, meta_lora=self.meta_lora(backbone.dtype)
        )

    def flat_state(self, memory_states: Tensor) -> Tensor:
        """Memory states ``[B, L, M, H]`` to the flat LoRA state of each layer, ``[B, L, M * H]``, in the parameters' dtype.

        The residual stream of the M2P transformer is kept in the parameters' dtype; with a bfloat16 backbone its matrix
        products run in bfloat16.
        """
        states = memory_states.to(self.memory_tokens.dtype)
        with torch.autocast(states.device.type, torch.bfloat16, enabled=memory_states.dtype == torch.bfloat16):
            return self.m2p(states).to(self.memory_tokens.dtype).flatten(2)


def _layout(key: str, shapes: tuple[tuple[LinearShape, ...], ...], **values: Any) -> LoRALayout:
    try:
        return LoRALayout(shapes, **values)
    except ValueError as error:
        raise ValueError(f"hypernetwork.{key}: {error}") from None


def default_heads(hidden_size: int) -> int:
    """Heads of 128 for the sizes Qwen3 has, heads of 64 for smaller models, one head below that."""
    return max(hidden_size // (128 if hidden_size >= 1024 else 64), 1)
