"""The published implementation's numbers, reproduced on a tiny Qwen3 (see fixtures/README.md)."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shine.backbone import Backbone
from shine.chat import IGNORE
from shine.checkpoint import load_hypernetwork
from shine.config import HypernetworkConfig, M2PConfig
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRALayout
from shine.released import read_released

FIXTURE = Path(os.environ.get("SHINE_PARITY_DIR", Path(__file__).parent / "fixtures" / "tiny_qwen3"))
CLOSE = {"atol": 2e-5, "rtol": 0.0}


def experiment(**changes: object) -> HypernetworkConfig:
    """The experiment's configuration that a released checkpoint needs beside it."""
    meta = json.loads((FIXTURE / "meta.json").read_text())
    values = {
        "rank": meta["lora_r"],
        "meta_rank": meta["metalora_r"],
        "scale": meta["scale"],
        "layout": meta["method"],
        "m2p": M2PConfig(
            layers=meta["m2p_layers"],
            heads=meta["m2p_heads"],
            feed_forward=meta["m2p_ffn"],
            layers_first=meta["layer_attention_first"],
        ),
    }
    return HypernetworkConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(params=[False, True], ids=["plain", "checkpointing"])
def loaded(request: pytest.FixtureRequest) -> tuple[Backbone, Hypernetwork]:
    model = AutoModelForCausalLM.from_pretrained(FIXTURE / "backbone", dtype=torch.float32)
    backbone = Backbone(model, activation_checkpointing=request.param)
    return backbone, load_hypernetwork(FIXTURE / "reference_checkpoint", backbone, config=experiment())


def published_name(path: str) -> str:
    """``model.layers.0.self_attn.q_proj`` as the fixture calls it: ``0.attention.q``."""
    _, _, layer, block, name = path.split(".")
    return f"{layer}.{'attention' if block == 'self_attn' else 'mlp'}.{name.removesuffix('_proj')}"


def test_memory_states_and_lora(loaded: tuple[Backbone, Hypernetwork], expected: dict[str, Tensor]) -> None:
    backbone, hypernetwork = loaded
    context = (expected["context_ids"], expected["context_mask"])
    states = hypernetwork.memory_states(backbone, *context)
    torch.testing.assert_close(states, expected["memory_states"], **CLOSE)
    torch.testing.assert_close(hypernetwork.flat_state(states).flatten(1), expected["plain_output"], **CLOSE)
    lora = hypernetwork(backbone, *context)
    assert len(lora) == sum(name.startswith("lora.") for name in expected) // 2
    for path, (a, b) in lora.items():
        torch.testing.assert_close(a, expected[f"lora.{published_name(path)}.A"], **CLOSE)
        torch.testing.assert_close(b, expected[f"lora.{published_name(path)}.B"], **CLOSE)


def test_logits_loss_and_every_gradient(loaded: tuple[Backbone, Hypernetwork], expected: dict[str, Tensor]) -> None:
    backbone, hypernetwork = loaded
    lora = hypernetwork(backbone, expected["context_ids"], expected["context_mask"])
    hidden = backbone.hidden(expected["input_ids"], expected["input_mask"], lora=lora)
    torch.testing.assert_close(backbone.logits(hidden), expected["logits"], **CLOSE)

    positions = (expected["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    logits = backbone.label_logits(expected["input_ids"], expected["input_mask"], label_positions=positions, lora=lora)
    loss = F.cross_entropy(logits, expected["labels"].flatten()[positions])
    torch.testing.assert_close(loss.reshape(1), expected["loss"], **CLOSE)

    loss.backward()
    gradients = published_gradients(hypernetwork)
    assert set(gradients) == {name for name in expected if name.startswith("grad.")}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def published_gradients(hypernetwork: Hypernetwork) -> dict[str, Tensor]:
    renamed = {"qkv.": "self_attn.in_proj_", "out.": "self_attn.out_proj.", "up.": "linear1.", "down.": "linear2."}
    gradients = {}
    for name, parameter in hypernetwork.named_parameters():
        if name == "memory_tokens":
            name = "grad.mem_tokens"
        elif name.startswith("m2p.layers."):
            _, _, index, rest = name.split(".", 3)
            rest = next((new + rest.removeprefix(old) for old, new in renamed.items() if rest.startswith(old)), rest)
            name = f"grad.metanetwork.transformer_layers.{index}.{rest}"
        elif name.startswith("m2p."):
            name = {"m2p.layer_embedding": "grad.metanetwork.layer_pe", "m2p.token_embedding": "grad.metanetwork.token_pe"}[name]
        else:
            _, _, layer, linear, letter = name.split(".")
            block = "mlp" if linear in ("gate_proj", "up_proj", "down_proj") else "attention"
            name = f"grad.metalora.{layer}.{block}.{linear.removesuffix('_proj')}.{letter}"
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return gradients


def test_greedy_tokens(loaded: tuple[Backbone, Hypernetwork], expected: dict[str, Tensor]) -> None:
    backbone, hypernetwork = loaded
    with torch.no_grad():
        lora = hypernetwork(backbone, expected["context_ids"], expected["context_mask"])
    count = expected["greedy_tokens"].shape[1]
    tokens = backbone.generate(
        expected["input_ids"],
        expected["input_mask"],
        lora=lora,
        max_new_tokens=count,
        stop_ids=None,
        pad_id=0,
        min_new_tokens=count,
    )
    assert torch.equal(tokens, expected["greedy_tokens"])


def test_wrong_ranks_are_named() -> None:
    """Whatever the fixture's sizes are, the message has the shape there is and the one that other values expect."""
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(FIXTURE / "backbone", dtype=torch.float32))
    hidden, right, there = backbone.hidden_size, experiment(), read_released(FIXTURE / "reference_checkpoint")
    most = min(shape.largest_rank() for layer in backbone.linear_shapes for shape in layer)
    rank = 2 * right.rank if 2 * right.rank <= most else right.rank // 2
    meta_rank = right.meta_rank + 1 if right.meta_rank < most else right.meta_rank - 1
    feed_forward = there["m2p.layers.0.up.weight"].shape[0] + 2
    a = there["meta_lora.layers.0.q_proj.A"]
    cases: list[tuple[dict[str, object], str, list[int]]] = [
        ({"rank": rank}, "memory_tokens", [LoRALayout(backbone.linear_shapes, rank=rank).memory_tokens(hidden), hidden]),
        ({"meta_rank": meta_rank}, "meta_lora.layers.0.q_proj.A", [*a.shape[:2], meta_rank]),
        ({"m2p": replace(right.m2p, feed_forward=feed_forward)}, "m2p.layers.0.up.weight", [feed_forward, hidden]),
    ]
    for changes, tensor, wants in cases:
        with pytest.raises(ValueError, match="reference_checkpoint does not fit") as error:
            load_hypernetwork(FIXTURE / "reference_checkpoint", backbone, config=experiment(**changes))
        assert f"{tensor}: has shape {list(there[tensor].shape)}, expected {wants}" in str(error.value)
