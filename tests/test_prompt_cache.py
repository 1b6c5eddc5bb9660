"""A kept conversation goes on as if it were computed whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_model
from torch import Tensor

from shine.backbone import Backbone
from shine.lora import LoRA
from shine.prompt_cache import PromptCache

OPTIONS = {"max_new_tokens": 5, "stop_ids": None, "pad_id": 0}


def adapter(backbone: Backbone, seed: int) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape for layer in backbone.linear_shapes for shape in layer]
    return LoRA(
        {
            s.path: (torch.randn(1, s.in_features, 2, generator=generator), torch.randn(1, 2, s.out_features, generator=generator))
            for s in shapes
        }
    )


def counted(backbone: Backbone) -> list[int]:
    """Lengths of what each forward pass is given."""
    lengths: list[int] = []
    backbone.model.base_model.layers[0].register_forward_pre_hook(lambda _module, args: lengths.append(args[0].shape[1]))
    return lengths


def ask(backbone: Backbone, ids: list[int], lora: LoRA | None, cache: PromptCache | None) -> list[int]:
    prompt = torch.tensor([ids])
    found: Tensor = backbone.generate(prompt, torch.ones_like(prompt), lora=lora, cache=cache, **OPTIONS)
    return found[0].tolist()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2"])
def test_every_turn_says_what_it_says_alone_and_computes_only_what_is_new(kind: str) -> None:
    backbone = Backbone(tiny_model(kind))
    lora, cache, conversation = adapter(backbone, 0), PromptCache(), list(range(20, 30))
    cache.wear(lora)
    lengths = counted(backbone)
    for turn in range(4):
        lengths.clear()
        answer = ask(backbone, conversation, lora, cache)
        # The new question, and the last token of the answer before, which nothing was computed from.
        assert lengths == [10 if turn == 0 else 4, 1, 1, 1, 1]
        assert answer == ask(backbone, conversation, lora, None)
        assert len(cache) == len(conversation) + 4
        conversation = [*conversation, *answer, 40 + turn, 50 + turn, 60 + turn]


def test_a_prompt_that_parts_from_what_is_kept_is_computed_from_there() -> None:
    backbone = Backbone(tiny_model())
    lora, cache = adapter(backbone, 0), PromptCache()
    cache.wear(lora)
    first = list(range(20, 32))
    ask(backbone, first, lora, cache)
    lengths = counted(backbone)
    other = [*first[:7], 99, 98, 97]
    assert ask(backbone, other, lora, cache) == ask(backbone, other, lora, None)
    assert lengths[0] == 3
    lengths.clear()
    # The same prompt again: its last token must be computed, since it predicts the answer.
    assert ask(backbone, other, lora, cache) == ask(backbone, other, lora, None)
    assert lengths[0] == 1
    lengths.clear()
    assert ask(backbone, [200, 201], lora, cache) == ask(backbone, [200, 201], lora, None)
    assert lengths[0] == 2


def test_another_adapter_shares_nothing() -> None:
    backbone = Backbone(tiny_model())
    one, two, cache, ids = adapter(backbone, 0), adapter(backbone, 1), PromptCache(), list(range(20, 32))
    answers = []
    for lora in (one, two, None, one):
        cache.wear(lora)
        assert len(cache) == 0
        answers.append(ask(backbone, ids, lora, cache))
        assert answers[-1] == ask(backbone, ids, lora, None)
    assert answers[0] == answers[3]
    assert answers[0] != answers[1]


def test_a_generation_that_failed_leaves_nothing_to_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(tiny_model())
    cache, ids = PromptCache(), list(range(20, 32))
    ask(backbone, ids, None, cache)
    calls = iter([1, 0])

    def fail(*_: object) -> None:
        1 / next(calls)

    hook = backbone.model.base_model.layers[1].register_forward_pre_hook(fail)
    longer = [*ids, 70, 71]
    with pytest.raises(ZeroDivisionError):
        ask(backbone, longer, None, cache)
    hook.remove()
    assert len(cache) == 0
    # It starts anew, whatever the failed one left behind.
    assert ask(backbone, longer, None, cache) == ask(backbone, longer, None, None)


def test_one_cache_keeps_one_conversation(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    prompts = torch.tensor([[20, 21], [22, 23]])
    with pytest.raises(ValueError, match="a prompt cache keeps one conversation, these are 2: give each its own"):
        backbone.generate(prompts, torch.ones_like(prompts), lora=None, cache=PromptCache(), **OPTIONS)
