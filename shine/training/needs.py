"""What a run will need, said before it starts: memory of each rank, tokens, arithmetic (`shine.flops`), hours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.distributed.tensor import DTensor

from shine.backbone import Backbone, chunk_rows
from shine.config import TrainConfig
from shine.data.batching import evenly_spread
from shine.data.samples import Sample, StageSamples
from shine.flops import forward_flops, training_flops
from shine.hypernetwork import Hypernetwork

SHARE_OF_RATE = {"cuda": 0.1, "cpu": 0.5}
"""Which share of a device's matrix rate a step is assumed to reach: near what was seen (docs/performance.md; 19 % for Qwen3-8B)."""


@dataclass(frozen=True)
class Needs:
    """What a run will take.

    Attributes:
        trained, frozen: parameters.
        dtype: of the frozen ones, and of the passes.
        weights: bytes on each rank for parameters, gradients and the optimizer's state, ``gathered`` among them.
        activations: bytes on each rank that a backward pass keeps, roughly.
        tokens_per_step: context and conversation tokens of a global batch, on average.
        flops_per_step: of all ranks together.
        steps: optimizer steps.
        gathered: bytes on each rank for layers of a sharded backbone while they compute.
    """

    trained: int
    frozen: int
    dtype: str
    weights: int
    activations: int
    tokens_per_step: float
    flops_per_step: float
    steps: int
    gathered: int = 0

    @property
    def flops_per_token(self) -> float:
        """Of useful tokens: the memory tokens' share is in it, padding is not."""
        return self.flops_per_step / self.tokens_per_step

    def hours(self, *, rate: float, ranks: int, device_type: str) -> float:
        """How long the steps take at the assumed share of ``rate``, the FLOP/s of each rank's device."""
        return self.steps * self.flops_per_step / (rate * SHARE_OF_RATE[device_type] * ranks) / 3600

    def describe(self, *, rate: float, ranks: int, device_type: str) -> str:
        """Three lines for a reader."""
        share = SHARE_OF_RATE[device_type]
        hours = self.hours(rate=rate, ranks=ranks, device_type=device_type)
        gathered = f" ({self.gathered / 1e9:.2f} GB of it for layers that are gathered)" if self.gathered else ""
        return (
            f"parameters: {self.trained:,} trained, {self.frozen:,} frozen in {self.dtype}\n"
            f"memory of each rank: {self.weights / 1e9:.2f} GB of weights, gradients and optimizer{gathered}, about "
            f"{self.activations / 1e9:.2f} GB of activations\n"
            f"{self.steps:,} steps of about {self.tokens_per_step:,.0f} tokens, {self.steps * self.tokens_per_step:.3g} in all: "
            f"about {_duration(hours)} on {ranks} x {rate / 1e12:.2g} TFLOP/s, if a step reaches {share:.0%} of that"
        )

    def warning(self, *, room: int, config: TrainConfig, ranks: int) -> str | None:
        """What to change where a rank needs more than ``room`` bytes; ``None`` where it does not."""
        if self.weights + self.activations <= room:
            return None
        sizes = f"{(self.weights + self.activations) / 1e9:.1f} GB for each rank, and {room / 1e9:.1f} GB is there"
        ways = {
            "backbone.activation_checkpointing=true": not config.backbone.activation_checkpointing,
            f"stage.micro_batch_size below {config.stage.micro_batch_size}": config.stage.micro_batch_size > 1,
            "engine=fsdp": ranks > 1 and config.engine == "ddp",
            "backbone.shard=true": ranks > 1 and not config.backbone.shard,
            "more ranks with engine=fsdp and backbone.shard=true": ranks == 1,
        }
        helpful = ", ".join(way for way, helps in ways.items() if helps) or "a shorter stage.context_length"
        return f"this may not fit: {sizes}; less is needed with {helpful}"


def estimate(
    config: TrainConfig, backbone: Backbone, hypernetwork: Hypernetwork, samples: StageSamples, *, steps: int, ranks: int
) -> Needs:
    """Needs of a run, from a look at up to 64 of its samples."""
    stage = config.stage
    seen = [samples.sample(place, epoch=0) for place in evenly_spread(len(samples), 64)]
    trained = sum(parameter.numel() for parameter in hypernetwork.parameters())
    frozen = sum(parameter.numel() for parameter in backbone.model.parameters())
    # Weight, gradient and Adam's two moments, float32 each (Muon has one). DDP keeps the gradients of its buckets once more; FSDP
    # gathers weights and gradients whole within a step.
    copies = 4.0
    if ranks > 1:
        copies = 5 if config.engine == "ddp" else 2 + 4 / ranks
    held, gathered = _frozen_bytes(backbone)
    widest = max(sample.tokens for sample in seen)
    memory = hypernetwork.memory_tokens.shape[0]
    per_sample = _activation_bytes(backbone, hypernetwork, tokens=widest + memory)
    head = _head_bytes(backbone, labels=max(s.label_count for s in seen) * stage.micro_batch_size)
    contexts = _contexts_per_sample(samples, stage.conversations_per_context)
    taught = stage.distillation is not None
    flops = sum(_flops(sample, backbone, hypernetwork, contexts=contexts, taught=taught) for sample in seen) / len(seen)
    return Needs(
        trained=trained,
        frozen=frozen,
        dtype=str(backbone.dtype).removeprefix("torch."),
        weights=held + gathered + round(trained * 4 * copies),
        activations=per_sample * stage.micro_batch_size + head,
        tokens_per_step=stage.batch_size * sum(sample.tokens for sample in seen) / len(seen),
        flops_per_step=stage.batch_size * flops,
        steps=steps,
        gathered=gathered,
    )


def _frozen_bytes(backbone: Backbone) -> tuple[int, int]:
    """What this rank holds of the backbone all the time, and what more while it computes, where its layers are spread over ranks.

    That is twice the largest layer: whole, and in the buffer that it, or the next one, is gathered into.
    """
    held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in backbone.model.parameters())
    spread = (sum(p.nbytes for p in layer.parameters() if isinstance(p, DTensor)) for layer in backbone.layers)
    return held, 2 * max(spread)


def _contexts_per_sample(samples: StageSamples, shared: int) -> float:
    """How many contexts are read for a sample, where up to ``shared`` of them have one pass; a few more where a micro-batch ends
    between them.
    """
    if shared == 1:
        return 1.0
    _, counts = np.unique(samples.examples, return_counts=True)
    return float(np.ceil(counts / shared).sum() / counts.sum())


def _flops(sample: Sample, backbone: Backbone, hypernetwork: Hypernetwork, *, contexts: float, taught: bool) -> float:
    """Of a training step on this sample, with the pass of a teacher that sees its context."""
    labels, read = sample.label_count, len(sample.context_ids)
    flops = training_flops(backbone, hypernetwork, read=read, answered=len(sample.input_ids), labels=labels)
    flops -= (1 - contexts) * training_flops(backbone, hypernetwork, read=read, answered=0, labels=0)
    return flops + (forward_flops(backbone, tokens=sample.tokens, predicted=labels) if taught else 0.0)


def _activation_bytes(backbone: Backbone, hypernetwork: Hypernetwork, *, tokens: int) -> int:
    """What one sample keeps for its backward pass: the inputs of linears, norms (in float32) and attention."""
    size, hidden = backbone.model.dtype.itemsize, backbone.hidden_size
    wide = sum(module.out_features for module in backbone.layers[0].modules() if isinstance(module, nn.Linear))
    a_layer = tokens * (size * (3 * hidden + wide) + 4 * 2 * hidden)
    layers = len(backbone.linear_shapes)
    body = layers * tokens * hidden * size + a_layer if backbone.activation_checkpointing else layers * a_layer
    states = layers * hypernetwork.memory_tokens.shape[0] * hidden
    m2p = states * len(hypernetwork.m2p.layers) * (12 * size + 4 * 4)
    return body + m2p


def _head_bytes(backbone: Backbone, *, labels: int) -> int:
    """Logits of the labels that have them at one time, with what their loss and its gradient hold beside."""
    rows = min(labels, chunk_rows(backbone.vocabulary_size, device_type=backbone.device.type))
    return rows * backbone.vocabulary_size * (backbone.model.dtype.itemsize + 8)


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} min"
