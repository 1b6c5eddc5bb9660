"""How many operators one decoder layer hands to the device: a plain forward pass, encoding, our training step, PEFT's.

    python benchmarks/operators.py                 # on whatever this machine has; a GPU's fused norms count as one

On a GPU the host hands over a kernel in several microseconds and a view in one or two, whatever their size, and with one sample a
micro-batch that is most of a step (docs/performance.md). The counts are of a tiny Qwen3, whose layers call what the large ones
call: of a model of four layers less those of one of two, halved.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from subject import examples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from shine import attention
from shine.backbone import TARGETS, Backbone
from shine.config import HypernetworkConfig
from shine.data.batching import collate
from shine.devices import find_device
from shine.hypernetwork import Hypernetwork
from shine.training.losses import label_losses

VIEWS = {"alias", "as_strided", "detach", "empty", "empty_like", "expand", "lift_fresh", "permute", "select", "slice", "split"}
VIEWS |= {"split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view"}
"""What hands no kernel over."""
TOKENS = 24
"""Of the context and of the conversation."""


@dataclass(frozen=True)
class Operators:
    """Of one layer, on average."""

    kernels: float
    views: float

    @property
    def all(self) -> float:
        """Both."""
        return self.kernels + self.views


class Count(TorchDispatchMode):
    """How often each operator runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operators(device: torch.device) -> Mapping[str, Operators]:
    """Of a layer in each of the ways."""
    return {name: _a_layer(prepare, device) for name, prepare in WAYS.items()}


def _a_layer(prepare: Callable[[PreTrainedModel], Callable[[], object]], device: torch.device) -> Operators:
    found = []
    for layers in (2, 4):
        run = prepare(_model(layers, device))
        with Count() as count:
            run()
        found.append(count.found)
    added = {name: (found[1][name] - found[0][name]) / 2 for name in found[1]}
    views = sum(count for name, count in added.items() if name in VIEWS)
    return Operators(sum(added.values()) - views, views)


def _model(layers: int, device: torch.device) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    attention.register()
    model: Any = Qwen3ForCausalLM(config)
    model = model.to(device, torch.bfloat16)
    model.set_attn_implementation(attention.FUSED)
    return model


def _tokens(model: PreTrainedModel) -> Tensor:
    return torch.arange(TOKENS, device=model.device)[None]


@torch.no_grad()
def _without_gradients(run: Callable[..., object], *values: object, **named: object) -> object:
    return run(*values, **named)


def _plain(model: PreTrainedModel) -> Callable[[], object]:
    return partial(_without_gradients, model.base_model, _tokens(model), use_cache=False)


def _shine(model: PreTrainedModel) -> tuple[Backbone, Hypernetwork]:
    backbone = Backbone(model)
    return backbone, Hypernetwork(HypernetworkConfig(rank=8, meta_rank=16), backbone).to(model.device)


def _encode(model: PreTrainedModel) -> Callable[[], object]:
    backbone, hypernetwork = _shine(model)
    return partial(_without_gradients, hypernetwork, backbone, _tokens(model), None)


def _train(model: PreTrainedModel) -> Callable[[], object]:
    backbone, hypernetwork = _shine(model)
    batch = collate(examples([(TOKENS, TOKENS, TOKENS // 2)], vocabulary_size=backbone.vocabulary_size), pad_id=0)
    batch = batch.to(model.device)
    return lambda: label_losses(hypernetwork, backbone, batch)[0].sum().backward()


def _fine_tune(model: PreTrainedModel) -> Callable[[], object]:
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules=list(TARGETS)), autocast_adapter_dtype=False)
    ids = _tokens(model).repeat(1, 2)
    return lambda: tuned(input_ids=ids, labels=ids, use_cache=False).loss.backward()


WAYS = {"plain forward": _plain, "encode": _encode, "training step": _train, "PEFT's step": _fine_tune}
"""What prepares each of them for a model, and returns what is counted."""


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    device = find_device(parser.parse_args().device)
    print(f"operators of one decoder layer on {device.type}, torch {torch.__version__}")
    for name, found in operators(device).items():
        print(f"  {name:14} {found.kernels:5.0f} kernels and {found.views:4.0f} views")


if __name__ == "__main__":
    main()
