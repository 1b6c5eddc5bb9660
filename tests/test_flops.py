"""The formulas of shine.flops against PyTorch's own count of what is multiplied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import ARCHITECTURES, counted_flops, tiny_model
from peft import LoraConfig, get_peft_model
from recipe import recipe_flops, recipe_loss

from shine import attention
from shine.backbone import Backbone
from shine.config import HypernetworkConfig, M2PConfig
from shine.data.batching import collate
from shine.data.samples import Sample
from shine.flops import answering_flops, encoding_flops, fine_tuning_flops, forward_flops, training_flops
from shine.hypernetwork import Hypernetwork
from shine.training.losses import label_losses

READ, ANSWERED, LABELS = 40, 30, 20


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's count does not know its fused attention on a CPU, which float32 takes without a gradient."""
    monkeypatch.setattr(attention, "_fused_is_better", lambda *_: False)


@pytest.fixture(params=[8, 16], ids=["heads as wide as the model", "heads twice as wide"])
def backbone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, make_backbone: Callable[..., Backbone]) -> Backbone:
    """Qwen3-0.6B is of the second kind."""
    monkeypatch.setitem(ARCHITECTURES, "qwen3", (*ARCHITECTURES["qwen3"][:2], {"head_dim": request.param}))
    return make_backbone()


@pytest.fixture
def pair(backbone: Backbone) -> tuple[Backbone, Hypernetwork]:
    return backbone, Hypernetwork(HypernetworkConfig(rank=2, meta_rank=4, m2p=M2PConfig(layers=2)), backbone)


def other_side(backbone: Backbone, *lengths: int) -> int:
    """Scores and mixtures above the diagonal: computed within a block of queries, not in the formula. A forward pass."""
    config, layers = backbone.model.config, len(backbone.linear_shapes)
    width = config.num_attention_heads * config.head_dim
    return sum(2 * width * layers * length**2 for length in lengths)


def mixing(backbone: Backbone, hypernetwork: Hypernetwork) -> int:
    """Scores and mixtures of the M2P transformer, one layer over each axis, not in the formula. A forward pass."""
    memory, layers, width = hypernetwork.memory_tokens.shape[0], len(backbone.linear_shapes), backbone.hidden_size
    return 4 * width * memory * layers * (memory + layers)


def test_a_training_step(pair: tuple[Backbone, Hypernetwork]) -> None:
    backbone, hypernetwork = pair
    ids = list(range(10, 10 + ANSWERED))
    labels = [-100] * (ANSWERED - LABELS) + ids[-LABELS:]
    batch = collate([Sample(id="a", context_ids=list(range(50, 50 + READ)), input_ids=ids, labels=labels)], pad_id=0)
    found = counted_flops(lambda: label_losses(hypernetwork, backbone, batch)[0].sum().backward())
    formula = training_flops(backbone, hypernetwork, read=READ, answered=ANSWERED, labels=LABELS)
    read = READ + hypernetwork.memory_tokens.shape[0]
    left_out = 3 * other_side(backbone, read, ANSWERED) + 3 * mixing(backbone, hypernetwork)
    # Nothing is trained below the first layer of the answering pass: its queries, keys and values need no gradient of their input.
    first = [shape for shape in backbone.linear_shapes[0] if shape.path.endswith(("q_proj", "k_proj", "v_proj"))]
    rank = hypernetwork.layout.rank
    not_needed = sum(2 * ANSWERED * shape.in_features * (shape.out_features + rank) for shape in first)
    assert found == formula + left_out - not_needed


def test_the_recipes_step(pair: tuple[Backbone, Hypernetwork]) -> None:
    """Padded, and with logits of every position of both passes."""
    backbone, hypernetwork = pair
    ids = list(range(10, 10 + ANSWERED - 5))
    sample = Sample(id="a", context_ids=list(range(50, 50 + READ - 7)), input_ids=ids, labels=ids)
    lengths = {"context_length": READ, "conversation_length": ANSWERED}
    found = counted_flops(lambda: recipe_loss(hypernetwork, backbone, sample, **lengths).backward())
    read = READ + hypernetwork.memory_tokens.shape[0]
    left_out = 3 * other_side(backbone, read, ANSWERED) + 3 * mixing(backbone, hypernetwork)
    first = [shape for shape in backbone.linear_shapes[0] if shape.path.endswith(("q_proj", "k_proj", "v_proj"))]
    rank = hypernetwork.layout.rank
    not_needed = sum(2 * ANSWERED * shape.in_features * (shape.out_features + rank) for shape in first)
    assert found == recipe_flops(backbone, hypernetwork, **lengths) + left_out - not_needed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_fine_tuning_step(backbone: Backbone) -> None:
    """Of the real PEFT, context and conversation one sequence."""
    rank = 4
    # Before PEFT puts linears of its own into the model.
    formula = fine_tuning_flops(backbone, tokens=READ, predicted=READ, rank=rank)
    targets = [shape.path.rsplit(".", 1)[-1] for shape in backbone.linear_shapes[0]]
    model = get_peft_model(backbone.model, LoraConfig(r=rank, target_modules=targets))
    ids = torch.arange(READ)[None]
    found = counted_flops(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    first = [shape for shape in backbone.linear_shapes[0] if shape.path.endswith(("q_proj", "k_proj", "v_proj"))]
    not_needed = sum(2 * READ * shape.in_features * (shape.out_features + rank) for shape in first)
    assert found == formula + 3 * other_side(backbone, READ) - not_needed


def test_encoding_and_the_plain_model(pair: tuple[Backbone, Hypernetwork]) -> None:
    backbone, hypernetwork = pair
    ids = torch.arange(READ)[None]
    with torch.no_grad():
        found = counted_flops(lambda: hypernetwork(backbone, ids, None))
        plain = counted_flops(lambda: backbone.model(input_ids=ids, use_cache=False))
    read = READ + hypernetwork.memory_tokens.shape[0]
    left_out = other_side(backbone, read) + mixing(backbone, hypernetwork)
    assert found == encoding_flops(backbone, hypernetwork, read=READ) + left_out
    assert plain == forward_flops(backbone, tokens=READ, predicted=READ) + other_side(backbone, READ)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_answer(pair: tuple[Backbone, Hypernetwork], rank: int) -> None:
    """With a KV cache, and logits of the prompt's last position alone."""
    backbone, hypernetwork = pair
    prompt, new = 12, 5
    ids = torch.arange(prompt)[None] + 10
    lora = hypernetwork(backbone, torch.arange(READ)[None], None) if rank else None
    assert rank in (0, hypernetwork.layout.rank)
    options = {"max_new_tokens": new, "min_new_tokens": new, "stop_ids": None, "pad_id": 0}
    found = counted_flops(lambda: backbone.generate(ids, torch.ones_like(ids), lora=lora, **options))
    # PyTorch's count does not know the fused attention of the tokens that are written.
    decoding = other_side(backbone, prompt + new - 1) - other_side(backbone, prompt)
    assert found == answering_flops(backbone, prompt=prompt, new=new, rank=rank) + other_side(backbone, prompt) - decoding


@pytest.mark.parametrize("targets", [("o_proj",), ("up_proj", "down_proj")], ids="+".join)
def test_attention_does_not_depend_on_what_a_lora_touches(backbone: Backbone, targets: tuple[str, ...]) -> None:
    whole = forward_flops(backbone, tokens=READ, predicted=0)
    assert forward_flops(Backbone(tiny_model(), targets=targets), tokens=READ, predicted=0) == whole
