"""Data parallel training by PyTorch's own engines: DDP, or FSDP2 where the trainables' optimizer state does not fit one device.

Either way the backbone stays outside: wrapping it would gather all its weights for the gradient of a few. Only one that does not
fit a device is spread over them, layer by layer. The gradient of a rank is averaged over the ranks, which `training_step` makes up
for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shine.backbone import Backbone
from shine.hypernetwork import Hypernetwork
from shine.training.distributed import Ranks
from shine.training.optimizer import Optimizers

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(hypernetwork: Hypernetwork, ranks: Ranks) -> None:
    """Keep only this rank's part of every parameter (FSDP2), as rank 0 has it. Comes before the optimizer is built."""
    for tensor in hypernetwork.state_dict().values():
        dist.broadcast(tensor, 0)
    mesh = init_device_mesh(hypernetwork.memory_tokens.device.type, (ranks.size,))
    sharded: FSDPModule = fully_shard(hypernetwork, mesh=mesh)
    if mesh.device_type == "cpu":
        # gloo cannot average.
        sharded.set_force_sum_reduction_for_comms(True)


def shard_backbone(backbone: Backbone, ranks: Ranks, device: torch.device) -> None:
    """Keep only this rank's part of each frozen layer on ``device`` and gather a layer for the time it computes.

    Embedding, last norm and vocabulary head stay whole. The model may still be in host memory: a layer reaches the device in parts.
    """
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in backbone.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        assert all(isinstance(parameter, DTensor) for parameter in layer.parameters())
    backbone.model.to(device)


def synchronised(hypernetwork: Hypernetwork, ranks: Ranks, engine: Literal["ddp", "fsdp"]) -> nn.Module:
    """The module to call in training: one whose gradients are those of all ranks."""
    if ranks.size == 1 or engine == "fsdp":
        return hypernetwork
    for measured in hypernetwork.buffers():
        dist.broadcast(measured, 0)
    # They stay as they are: nothing of them is sent again with each step.
    return DistributedDataParallel(hypernetwork, broadcast_buffers=False)


@contextmanager
def accumulating(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Talk to the other ranks in the ``last`` micro-batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have spread over the ranks, in full. All ranks take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(hypernetwork: Hypernetwork) -> dict[str, Tensor]:
    """Every parameter in full, on the CPU. All ranks take part; with FSDP only rank 0 gets anything."""
    return cast(dict[str, Tensor], get_model_state_dict(hypernetwork, options=_WHOLE))


def whole_optimizer(hypernetwork: Hypernetwork, optimizer: Optimizers) -> dict[str, Any]:
    """The optimizer's state by parameter name, in full, on the CPU, whatever engine trains. All ranks take part."""
    return dict(get_optimizer_state_dict(hypernetwork, optimizer.parts, options=_WHOLE))


def restore_optimizer(hypernetwork: Hypernetwork, optimizer: Optimizers, state: dict[str, Any]) -> None:
    """Put `whole_optimizer`'s result in place, as rank 0 has it; every rank keeps what it needs. All ranks take part.

    The moments are the saved run's, the weight decay this run's.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    shared = dist.is_initialized()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=shared)
    set_optimizer_state_dict(hypernetwork, optimizer.parts, state, options=options)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
