"""The M2P transformer against torch's own encoder layer, applied by hand along the right axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shine.m2p import M2PLayer, M2PTransformer, StateStandard

HIDDEN, LAYERS, TOKENS = 12, 3, 5


def make_m2p(*, layers: int = 3, layers_first: bool = True, heads: int = 4) -> M2PTransformer:
    """Every parameter random, embeddings, biases and norms too."""
    torch.manual_seed(0)
    m2p = M2PTransformer(
        HIDDEN, backbone_layers=LAYERS, memory_tokens=TOKENS, layers=layers, heads=heads, feed_forward=20, layers_first=layers_first
    ).double()
    for parameter in m2p.parameters():
        nn.init.normal_(parameter, std=0.5)
    return m2p


def torch_layer(layer: M2PLayer, *, heads: int = 4) -> nn.TransformerEncoderLayer:
    """torch's post-norm GELU layer with the same weights."""
    theirs = nn.TransformerEncoderLayer(
        HIDDEN, heads, dim_feedforward=20, dropout=0.0, activation="gelu", layer_norm_eps=1e-5, batch_first=True, norm_first=False
    ).double()
    pairs = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "up.",
        "linear2.": "down.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    ours = layer.state_dict()
    theirs.load_state_dict({f"{their}{kind}": ours[f"{our}{kind}"] for their, our in pairs.items() for kind in ("weight", "bias")})
    return theirs


def by_hand(m2p: M2PTransformer, states: Tensor, *, layers_first: bool, heads: int = 4) -> Tensor:
    """Embeddings added, then torch's layers across backbone layers and across memory tokens in turn."""
    batch = states.shape[0]
    states = states.clone()
    for layer in range(LAYERS):
        for token in range(TOKENS):
            states[:, layer, token] += m2p.layer_embedding[layer] + m2p.token_embedding[token]
    across_layers = layers_first
    for ours in m2p.layers:
        assert isinstance(ours, M2PLayer)
        theirs = torch_layer(ours, heads=heads)
        result = torch.empty_like(states)
        for sample in range(batch):
            if across_layers:
                for token in range(TOKENS):
                    result[sample, :, token] = theirs(states[sample : sample + 1, :, token])[0]
            else:
                for layer in range(LAYERS):
                    result[sample, layer] = theirs(states[sample : sample + 1, layer])[0]
        states, across_layers = result, not across_layers
    return states


def draw_states(batch: int = 2) -> Tensor:
    return torch.randn(batch, LAYERS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("layers_first", [True, False])
@pytest.mark.parametrize(("layers", "heads"), [(1, 4), (2, 1), (3, 4), (4, 12)])
def test_output_is_that_of_torchs_encoder_layers(layers: int, heads: int, layers_first: bool) -> None:
    m2p = make_m2p(layers=layers, layers_first=layers_first, heads=heads)
    states = draw_states()
    with torch.no_grad():
        wanted = by_hand(m2p, states, layers_first=layers_first, heads=heads)
        torch.testing.assert_close(m2p(states), wanted, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_states_is_that_of_torchs_encoder_layers() -> None:
    m2p = make_m2p()
    weight = draw_states().cos()
    gradients = []
    for forward in (m2p, lambda s: by_hand(m2p, s, layers_first=True)):
        states = draw_states().requires_grad_()
        (forward(states) * weight).sum().backward()
        gradients.append(states.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layers_first", [True, False])
def test_which_attention_comes_first_matters(layers_first: bool) -> None:
    # One layer deep, a change of one memory token can only reach the other axis that the attention runs over.
    m2p = make_m2p(layers=1, layers_first=layers_first)
    states, changed = draw_states(1), draw_states(1)
    changed[0, 1, 2] += torch.linspace(-1, 1, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        touched = (m2p(states) - m2p(changed))[0].abs().amax(-1) > 1e-9
    wanted = torch.zeros(LAYERS, TOKENS, dtype=torch.bool)
    if layers_first:
        wanted[:, 2] = True
    else:
        wanted[1, :] = True
    assert torch.equal(touched, wanted)


def test_samples_do_not_mix() -> None:
    m2p = make_m2p()
    with torch.no_grad():
        both = m2p(draw_states(2))
        torch.testing.assert_close(both[1:], m2p(draw_states(2)[1:]), rtol=1e-12, atol=1e-12)


def test_embeddings_start_at_zero_and_biases_of_the_attention_too() -> None:
    m2p = M2PTransformer(
        HIDDEN, backbone_layers=LAYERS, memory_tokens=TOKENS, layers=2, heads=4, feed_forward=20, layers_first=True
    )
    assert m2p.layer_embedding.eq(0).all()
    assert m2p.token_embedding.eq(0).all()
    assert all(layer.qkv.bias.eq(0).all() and layer.out.bias.eq(0).all() for layer in m2p.layers)
    assert all(layer.qkv.weight.ne(0).any() for layer in m2p.layers)


def test_what_all_contexts_share_is_taken_off() -> None:
    """Measured in batches; a dimension that never changes stays zero, an enormous one comes in like the others."""
    torch.manual_seed(1)
    states = torch.randn(40, LAYERS, TOKENS, HIDDEN, dtype=torch.float64)
    states[..., 3] = 7.0
    states[..., 5] = states[..., 5] * 200 + 15_000
    standard = StateStandard(backbone_layers=LAYERS, memory_tokens=TOKENS, hidden_size=HIDDEN).double()
    assert torch.equal(standard(states), states)
    standard.measure(states.split(16))
    standardised = standard(states)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(LAYERS, TOKENS, HIDDEN).double(), rtol=0, atol=1e-7)
    spread = standardised.square().mean((0, 2)).sqrt()
    others = [index for index in range(HIDDEN) if index != 3]
    torch.testing.assert_close(spread[:, others], torch.ones(LAYERS, HIDDEN - 1).double(), rtol=1e-6, atol=0)
    assert float(spread[:, 3].max()) < 1e-6


def test_standardised_states_are_what_the_layers_see() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"backbone_layers": LAYERS, "memory_tokens": TOKENS, "layers": 2, "heads": 4, "feed_forward": 20}
    m2p = M2PTransformer(HIDDEN, **shape, layers_first=True, standardise=True).double()
    assert m2p.standard is not None
    assert 0.5 < float(m2p.layer_embedding.detach().std()) < 0.9
    m2p.standard.measure([draw_states(9)])
    with torch.no_grad():
        expected = by_hand(m2p, m2p.standard(draw_states()), layers_first=True)
        torch.testing.assert_close(m2p(draw_states()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [5, 7, 24])
def test_heads_that_do_not_divide_the_hidden_size_are_refused(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"heads={heads} does not divide the hidden size {HIDDEN}"):
        M2PTransformer(HIDDEN, backbone_layers=1, memory_tokens=1, layers=1, heads=heads, feed_forward=8, layers_first=True)


def test_no_weight_is_copied_for_every_row() -> None:
    """torch does that outside training in a linear whose input lies transposed. The largest tensor here is a linear's output."""
    m2p = make_m2p(layers=2).requires_grad_(False)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
            return result

    with torch.no_grad(), Sizes():
        m2p(torch.randn(2, LAYERS, TOKENS, HIDDEN, dtype=torch.float64))
    assert max(sizes) == 2 * LAYERS * TOKENS * 3 * HIDDEN
    assert max(sizes) < TOKENS * 3 * HIDDEN * HIDDEN
