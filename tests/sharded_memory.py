"""A rank that holds its part of a backbone, counts the bytes that the engine really has, and says what was estimated."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_hypernetwork_config, tiny_tokenizer
from runs import WORLDS, stage_config, train_config
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from shine.backbone import Backbone
from shine.data.build import samples_of
from shine.data.sources import read_source
from shine.hypernetwork import Hypernetwork
from shine.training import needs
from shine.training.distributed import join_ranks
from shine.training.parallel import shard_backbone


def alive() -> int:
    """Bytes of all tensors that Python can see, each storage once."""
    found = [value for value in gc.get_objects() if type(value) in (torch.Tensor, nn.Parameter, DTensor)]
    storages = [(value.to_local() if isinstance(value, DTensor) else value).untyped_storage() for value in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def count(output: Path) -> None:
    """Write what the frozen weights take, at rest and at most in a forward and a backward pass, and the estimate of both."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    with join_ranks("cpu") as ranks:
        before = alive()
        backbone = Backbone(
            Qwen3ForCausalLM(Qwen3Config(vocab_size=320, num_hidden_layers=6, **shape)), activation_checkpointing=True
        )
        shard_backbone(backbone, ranks, torch.device("cpu"))
        gc.collect()
        rest, most = alive() - before, [0]

        def look(*_: Any) -> None:
            most[0] = max(most[0], alive() - before)

        for layer in backbone.layers:
            layer.self_attn.o_proj.register_forward_hook(look)
            layer.mlp.register_forward_hook(look)
        inputs = torch.randn(1, 2, 128, requires_grad=True)
        backbone.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()
        assert inputs.grad is not None

        hypernetwork, stage = Hypernetwork(tiny_hypernetwork_config(), backbone), stage_config()
        config = train_config("x", output, stage=stage)
        config = replace(config, backbone=replace(config.backbone, shard=True))
        samples = samples_of(
            list(read_source(WORLDS))[:1], tiny_tokenizer(), stage, task_tokens=config.backbone.task_tokens, seed=0
        )
        found = needs.estimate(config, backbone, hypernetwork, samples, steps=1, ranks=ranks.size)
        trained = found.trained * 4 * 5
        said = {"rest": found.weights - found.gathered - trained, "most": found.weights - trained}
        sizes = {"layer": sum(parameter.numel() for parameter in backbone.layers[0].parameters()) * 4, "whole": found.frozen * 4}
        row = {"counted": {"rest": rest, "most": most[0]}, "said": said, **sizes}
        (output / f"rank-{ranks.rank}.json").write_text(json.dumps(row))
