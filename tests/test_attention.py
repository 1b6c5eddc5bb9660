"""Attention in blocks of queries is attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shine import attention


def written_out(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention head by head, with every score in one table."""
    shared = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = scale * query[:, head] @ key[:, head // shared].mT
        heads.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value[:, head // shared])
    return torch.stack(heads, dim=1)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 2),
    shared=st.integers(1, 3),
    length=st.integers(1, 23),
    block=st.integers(1, 9),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_give_the_whole_and_its_gradients(
    batch: int, groups: int, shared: int, length: int, block: int, causal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(batch, length, heads, 4, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()

    query, key, value = draw(groups * shared), draw(groups), draw(groups)
    seen = torch.ones(length, length, dtype=torch.bool)
    expected = written_out(query, key, value, seen.tril() if causal else seen, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        found = attention.attend(query, key, value, causal=causal, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (query, key, value)),
        torch.autograd.grad((expected * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", [attention.BLOCKS, attention.FUSED])
def test_a_model_computes_what_it_does_with_sdpa(kind: str, padding: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 4)
    model = tiny_model(kind, dtype=torch.float64)
    model.set_attn_implementation(name)
    ids = torch.arange(26).view(2, 13) + 9
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    found = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.isfinite(found).all()
    # transformers computes its rotations in float32.
    torch.testing.assert_close(found[:, padding:], expected[:, padding:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_fused_attention_leaves_no_position_without_a_key() -> None:
    """What CUDA's kernel makes of a position that sees nothing may be NaN, and so then is the gradient of the batch."""
    masks = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    model = tiny_model()
    AttentionInterface.register(attention.FUSED, attend)
    try:
        model.set_attn_implementation(attention.FUSED)
        ids = torch.arange(26).view(2, 13) + 9
        model(input_ids=ids, attention_mask=(torch.arange(13) >= torch.tensor([[5], [0]])).long())
        assert len(masks) == len(model.model.layers)
        assert all(mask.any(-1).all() for mask in masks)
        # Only what saw nothing is changed.
        assert masks[0][0, 0, 5:, :5].sum() == 0
        assert torch.equal(masks[0][1, 0], torch.ones(13, 13, dtype=torch.bool).tril())
        masks.clear()
        model(input_ids=ids)
        assert masks == [None] * len(model.model.layers), "nothing is padded: the kernel knows what is causal"
    finally:
        attention.register()


def test_a_gpu_attends_by_the_fused_kernel_and_a_cpu_in_blocks() -> None:
    assert attention.best_on(torch.device("cuda", 1)) == attention.FUSED
    assert attention.best_on(torch.device("cpu")) == attention.BLOCKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("length", [7, 8])
def test_float32_takes_the_kernel_where_it_is_better(
    length: int, gradient: bool, padding: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is padded, without a gradient or from ``LONG`` positions on; what it computes is the same to rounding."""
    asked = []

    def attend(*args: Any, **options: Any) -> tuple[Tensor, None]:
        asked.append(args)
        return sdpa_attention_forward(*args, **options)

    monkeypatch.setattr(attention, "LONG", 8)
    monkeypatch.setattr(attention, "sdpa_attention_forward", attend)
    model = tiny_model(dtype=dtype)
    model.set_attn_implementation(attention.BLOCKS)
    ids = torch.arange(2 * length).view(2, length) + 9
    mask = (torch.arange(length) >= torch.tensor([[padding], [0]])).long()
    with torch.set_grad_enabled(gradient):
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        better = dtype == torch.float32 and not padding and (length >= 8 or not gradient)
        assert len(asked) == len(model.model.layers) * better
        monkeypatch.setattr(attention, "_fused_is_better", lambda *_: False)
        again = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-5)
    if gradient and dtype == torch.float32:
        embedding = model.get_input_embeddings().weight
        slopes = [torch.autograd.grad(logits.square().mean(), embedding)[0] for logits in (found, again)]
        torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)


def test_decoding_with_a_cache_goes_on_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of a left-padded batch are those that passes over the whole sequence choose, without a cache."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    model = tiny_model().eval()
    ids = torch.arange(22).view(2, 11) + 9
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, start in ((0, 4), (1, 0)):
        whole = ids[row : row + 1, start:]
        for _ in range(6):
            whole = torch.cat([whole, model(input_ids=whole, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert found[row, start:].tolist() == whole[0].tolist()


def test_bfloat16_is_near_float32() -> None:
    """Scores are rounded to bfloat16, so what is mixed is off by some thousandths, as it is in transformers' eager attention."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 300, 16, generator=generator) for _ in range(3))
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    rough = attention.attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), causal=True, scale=0.25)
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).abs().mean()) < 4e-3
    assert float((rough.float() - exact).abs().max()) < 0.1
