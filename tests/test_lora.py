"""LoRA and its layout: how a flat state is cut, and what can be done with the result."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shine.lora import LAYOUTS, LinearShape, LoRA, LoRALayout

Shapes = tuple[tuple[LinearShape, ...], ...]


def shapes_of(*layers: list[tuple[int, int]]) -> Shapes:
    """Linears ``0.0``, ``0.1``, … of layer 0, and so on, from their (in, out) sizes."""
    return tuple(tuple(LinearShape(f"{i}.{j}", *size) for j, size in enumerate(layer)) for i, layer in enumerate(layers))


def random_lora(paths: dict[str, tuple[int, int]], *, batch: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> LoRA:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    return LoRA({path: (draw(batch, i, rank), draw(batch, rank, o)) for path, (i, o) in paths.items()})


def updates(lora: LoRA) -> dict[str, Tensor]:
    """The explicit update of each linear, ``[B, in, out]``."""
    return {path: a @ b for path, (a, b) in lora.items()}


PATHS = {"x": (5, 7), "y": (6, 4)}


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[Shapes, int, int, int]:
    """Layers of any shapes, a rank that fits, a batch and a tail."""
    rank = draw(st.integers(1, 3))
    sizes = st.tuples(st.integers(rank, 7), st.integers(rank, 7))
    layers = draw(st.lists(st.lists(sizes, min_size=1, max_size=3), min_size=1, max_size=3))
    return shapes_of(*layers), rank, draw(st.integers(1, 3)), draw(st.integers(0, 5))


@pytest.mark.parametrize("order", LAYOUTS)
@given(case=cuttings(), scale=st.sampled_from([1.0, 0.25, 1e-3, 7.0]))
def test_every_value_lands_where_the_layout_says(order: str, case: tuple[Shapes, int, int, int], scale: float) -> None:
    shapes, rank, batch, tail = case
    longest = max(sum(rank * (s.in_features + s.out_features) for s in layer) for layer in shapes)
    width = longest + tail
    # Every value of the state is its own address, so that a misplaced one shows.
    state = torch.arange(1, batch * len(shapes) * width + 1, dtype=torch.float64).view(batch, len(shapes), width)
    lora = LoRALayout(shapes, rank=rank, order=order, scale=scale).cut(state)

    assert list(lora) == [s.path for layer in shapes for s in layer]
    root = math.sqrt(scale)
    for sample in range(batch):
        for index, layer in enumerate(shapes):
            row = state[sample, index].tolist()
            start = 0
            for shape in layer:
                n_in, n_out = shape.in_features, shape.out_features
                a, b = lora[shape.path]
                assert a.shape == (batch, n_in, rank)
                assert b.shape == (batch, rank, n_out)
                # A: `r` is view(in, r), `l` is view(r, in) transposed.
                at = (lambda i, k: i * rank + k) if order[0] == "r" else (lambda i, k, n_in=n_in: k * n_in + i)
                wanted_a = [[root * row[start + at(i, k)] for k in range(rank)] for i in range(n_in)]
                start += n_in * rank
                # B: `l` is view(r, out), `r` is view(out, r) transposed.
                at = (lambda k, o, n_out=n_out: k * n_out + o) if order[1] == "l" else (lambda k, o: o * rank + k)
                wanted_b = [[root * row[start + at(k, o)] for o in range(n_out)] for k in range(rank)]
                start += n_out * rank
                torch.testing.assert_close(a[sample], torch.tensor(wanted_a, dtype=torch.float64), rtol=1e-14, atol=0)
                torch.testing.assert_close(b[sample], torch.tensor(wanted_b, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", LAYOUTS)
def test_the_tail_does_not_matter_and_gets_no_gradient(order: str) -> None:
    shapes = shapes_of([(4, 3), (3, 5)])
    state = torch.randn(2, 1, 2 * (4 + 3 + 3 + 5) + 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    lora = LoRALayout(shapes, rank=2, order=order, scale=0.25).cut(state)
    sum((a.sum() + b.sum() for a, b in lora.values()), torch.zeros(())).backward()
    assert state.grad is not None
    # Each value is in the LoRA exactly once, times sqrt(0.25).
    assert state.grad[:, :, :30].eq(0.5).all()
    assert state.grad[:, :, 30:].eq(0).all()


@pytest.mark.parametrize(
    ("rank", "hidden", "tokens"),
    [
        (1, 30, 1),  # 30 values fill one token exactly
        (1, 29, 2),  # one value too many: rounded up
        (2, 30, 2),
        (2, 31, 2),
        (2, 16, 4),  # 60 / 16 = 3.75
    ],
)
def test_memory_tokens_hold_the_longest_layer_rounded_up(rank: int, hidden: int, tokens: int) -> None:
    layout = LoRALayout(shapes_of([(4, 6), (3, 2)], [(10, 8), (4, 8)]), rank=rank)
    assert layout.values_per_layer == 30 * rank
    assert layout.memory_tokens(hidden) == tokens


def test_memory_tokens_of_smollm2_are_rounded_up() -> None:
    # H 576, feed-forward 1536, three key-value heads of 64: 10,176 values a layer and rank (field notes).
    layer = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    for rank, tokens in ((3, 53), (6, 106), (8, 142)):
        assert LoRALayout(shapes_of(layer), rank=rank).memory_tokens(576) == tokens


@pytest.mark.parametrize("order", ["", "r", "rx", "lrl", "RL"])
def test_an_unknown_layout_is_refused_with_the_choices(order: str) -> None:
    with pytest.raises(ValueError, match="rl, lr, rr, ll"):
        LoRALayout(shapes_of([(4, 4)]), rank=1, order=order)


@pytest.mark.parametrize(("rank", "scale", "word"), [(0, 1.0, "rank"), (-1, 1.0, "rank"), (1, 0.0, "scale"), (1, -1.0, "scale")])
def test_rank_and_scale_must_be_positive(rank: int, scale: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LoRALayout(shapes_of([(4, 4)]), rank=rank, scale=scale)


def test_a_rank_that_does_not_fit_names_the_linear_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"rank 5 does not fit 0\.1 \(6 -> 4\).*up to 4"):
        LoRALayout(shapes_of([(8, 8), (6, 4)]), rank=5)
    LoRALayout(shapes_of([(8, 8), (6, 4)]), rank=4)


def test_a_rank_that_does_not_fit_a_later_layer_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"rank 5 does not fit 1\.0 \(3 -> 8\).*up to 3"):
        LoRALayout(shapes_of([(8, 8)], [(3, 8)]), rank=5)


def test_the_remedy_of_a_rank_that_does_not_fit_fits_every_linear() -> None:
    shapes = shapes_of([(8, 8), (6, 4)], [(3, 8)])
    with pytest.raises(ValueError, match="up to") as error:
        LoRALayout(shapes, rank=9)
    LoRALayout(shapes, rank=int(str(error.value).rsplit("up to ", 1)[1]))


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), batch=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_concat_is_the_exact_sum_of_the_updates(ranks: list[int], batch: int, seed: int) -> None:
    loras = [random_lora(PATHS, batch=batch, rank=rank, seed=seed + n) for n, rank in enumerate(ranks)]
    joined = LoRA.concat(loras)
    assert set(joined) == set(PATHS)
    for path, update in updates(joined).items():
        assert joined[path][0].shape[-1] == sum(ranks)
        torch.testing.assert_close(update, sum(updates(lora)[path] for lora in loras), rtol=1e-12, atol=1e-12)


def test_loras_that_touch_other_linears_cannot_be_concatenated() -> None:
    one, other = (random_lora({"x": (3, 3), path: (3, 3)}, batch=1, rank=1, seed=0) for path in "yz")
    with pytest.raises(ValueError, match=r"same linears \([yz] is in one only\)"):
        LoRA.concat([one, other])
    with pytest.raises(ValueError, match="at least one"):
        LoRA.concat([])


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5, 3.0])
def test_scale_multiplies_the_update(strength: float) -> None:
    lora = random_lora(PATHS, batch=2, rank=3, seed=1)
    for path, update in updates(lora.scale(strength)).items():
        torch.testing.assert_close(update, updates(lora)[path] * strength, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples", [[2], [0, 1, 2, 3], [3, 0, 0, 2, 3], []])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_select_takes_samples_in_order_and_repeatedly(samples: list[int], as_tensor: bool) -> None:
    lora = random_lora(PATHS, batch=4, rank=2, seed=2)
    chosen = lora.select(torch.tensor(samples, dtype=torch.long) if as_tensor else samples)
    assert chosen.batch == len(samples)
    for path, (a, b) in chosen.items():
        for position, sample in enumerate(samples):
            assert torch.equal(a[position], lora[path][0][sample])
            assert torch.equal(b[position], lora[path][1][sample])


def test_select_out_of_range_is_an_error() -> None:
    with pytest.raises(IndexError):
        random_lora(PATHS, batch=2, rank=2, seed=2).select([2])


def test_stack_lays_adapters_side_by_side() -> None:
    loras = [random_lora(PATHS, batch=batch, rank=2, seed=batch) for batch in (2, 1, 3)]
    stacked = LoRA.stack(loras)
    assert stacked.batch == 6
    for start, lora in zip((0, 2, 3), loras, strict=True):
        for path, (a, b) in stacked.select(range(start, start + lora.batch)).items():
            assert torch.equal(a, lora[path][0])
            assert torch.equal(b, lora[path][1])


def test_no_operation_changes_the_lora_it_is_called_on() -> None:
    lora = random_lora(PATHS, batch=2, rank=2, seed=3)
    before = {path: (a.clone(), b.clone()) for path, (a, b) in lora.items()}
    lora.scale(2.0), lora.select([1, 1]), LoRA.concat([lora, lora]), LoRA.stack([lora, lora])
    lora.cosine(), lora.effective_rank()
    for path, (a, b) in lora.items():
        assert torch.equal(a, before[path][0])
        assert torch.equal(b, before[path][1])


@given(batch=st.integers(1, 4), rank=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_cosine_is_that_of_the_flattened_updates(batch: int, rank: int, seed: int) -> None:
    lora = random_lora(PATHS, batch=batch, rank=rank, seed=seed)
    flat = torch.cat([update.flatten(1) for update in updates(lora).values()], dim=1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(lora.cosine().double(), flat @ flat.T, rtol=0, atol=2e-6)
    pairs = [float(flat[first] @ flat[second]) for first, second in itertools.combinations(range(batch), 2)]
    assert lora.pair_cosines().tolist() == pytest.approx(pairs, abs=2e-6)


@given(ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 2**20))
def test_inner_is_that_of_the_flattened_updates(ranks: tuple[int, int], seed: int) -> None:
    one, other = (random_lora(PATHS, batch=1, rank=rank, seed=seed + rank) for rank in ranks)
    flat = [torch.cat([update.flatten() for update in updates(lora).values()]) for lora in (one, other)]
    assert one.inner(other) == pytest.approx(float(flat[0] @ flat[1]))
    assert one.inner(one) == pytest.approx(float(flat[0].square().sum()))
    assert one.distance(other) == pytest.approx(float((flat[0] - flat[1]).norm() / flat[0].norm()))
    assert one.distance(one) == pytest.approx(0, abs=1e-6)


def test_inner_is_of_two_single_updates_of_one_backbone() -> None:
    one, several = (random_lora(PATHS, batch=batch, rank=2, seed=0) for batch in (1, 2))
    elsewhere = random_lora({"z": (5, 7)}, batch=1, rank=2, seed=0)
    for a, b in ((one, several), (several, one), (one, elsewhere)):
        with pytest.raises(ValueError, match="two single adapters of one backbone"):
            a.inner(b)


@given(rank=st.integers(1, 8), limit=st.integers(1, 8), batch=st.integers(1, 3), seed=st.integers(0, 2**20))
def test_reduce_is_the_nearest_update_of_the_rank(rank: int, limit: int, batch: int, seed: int) -> None:
    """Against the singular value decomposition of the update itself (Eckart and Young)."""
    lora = random_lora(PATHS, batch=batch, rank=rank, seed=seed)
    reduced, share = lora.reduce(limit)
    kept = total = 0.0
    for path, update in updates(lora).items():
        u, singular, v = torch.linalg.svd(update, full_matrices=False)
        nearest = (u[:, :, :limit] * singular[:, None, :limit]) @ v[:, :limit]
        torch.testing.assert_close(updates(reduced)[path], nearest, rtol=1e-8, atol=1e-8)
        assert reduced[path][0].shape[2] == reduced[path][1].shape[1] <= min(limit, *PATHS[path])
        kept += float(nearest.square().sum())
        total += float(update.square().sum())
    assert share == pytest.approx(kept / total)


def test_reduce_keeps_what_is_of_the_rank_and_of_half_precision() -> None:
    lora = random_lora(PATHS, batch=1, rank=2, seed=0)
    same, share = lora.reduce(2)
    assert share == pytest.approx(1)
    assert all(torch.equal(x, y) for path in PATHS for x, y in zip(same[path], lora[path], strict=True))
    twice = LoRA.concat([lora, lora.scale(-0.5)])
    back, share = twice.reduce(2)
    assert share == pytest.approx(1)
    for path in PATHS:
        torch.testing.assert_close(updates(back)[path], updates(lora)[path] * 0.5)
    half = random_lora(PATHS, batch=1, rank=3, seed=0, dtype=torch.bfloat16).reduce(1)[0]
    assert {matrix.dtype for pair in half.values() for matrix in pair} == {torch.bfloat16}
    nothing = LoRA({path: (a, b * 0) for path, (a, b) in lora.items()})
    assert nothing.reduce(1)[1] == 1.0


def test_cosine_of_equal_opposite_and_zero_updates() -> None:
    lora = random_lora(PATHS, batch=1, rank=2, seed=4)
    cosine = LoRA.stack([lora, lora.scale(5.0), lora.scale(-0.1), lora.scale(0.0)]).cosine()
    wanted = torch.tensor([[1.0, 1.0, -1.0, 0.0], [1.0, 1.0, -1.0, 0.0], [-1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(cosine, wanted, rtol=0, atol=1e-5)


def lora_of_singular_values(*per_sample: list[float], size: int = 6) -> LoRA:
    """One linear; each sample's update has these singular values, by construction with orthonormal factors."""
    rank = len(per_sample[0])
    generator = torch.Generator().manual_seed(5)
    left, right = (
        torch.linalg.qr(torch.randn(len(per_sample), size, rank, generator=generator, dtype=torch.float64)).Q for _ in "ab"
    )
    return LoRA({"x": (left, torch.tensor(per_sample, dtype=torch.float64)[:, :, None] * right.mT)})


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([[2.0]], 1.0),
        ([[3.0, 3.0, 3.0, 3.0]], 4.0),
        ([[5.0, 0.0, 0.0]], 1.0),
        ([[1.0, 1.0, 0.0]], 2.0),
        # Shares 3/4 and 1/4: exp(entropy) = (4/3)^(3/4) * 4^(1/4).
        ([[3.0, 1.0]], (4 / 3) ** 0.75 * 4**0.25),
        # The mean over samples.
        ([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], 2.0),
    ],
)
def test_effective_rank_of_known_singular_values(values: list[list[float]], wanted: float) -> None:
    assert lora_of_singular_values(*values).effective_rank().item() == pytest.approx(wanted, abs=1e-4)


def test_effective_rank_of_equal_rank_one_columns_is_one() -> None:
    a, b = random_lora({"x": (5, 7)}, batch=1, rank=1, seed=7)["x"]
    assert LoRA({"x": (a.expand(1, 5, 3), b.expand(1, 3, 7))}).effective_rank().item() == pytest.approx(1.0, abs=1e-4)


def test_effective_rank_of_an_update_that_is_not_finite_is_no_number() -> None:
    a, b = torch.ones(1, 4, 2), torch.ones(1, 2, 4)
    a[0, 1, 1] = torch.inf
    assert LoRA({"x": (a, b)}).effective_rank().isnan()


def test_effective_rank_is_the_mean_over_linears() -> None:
    two, one = lora_of_singular_values([1.0, 1.0])["x"], lora_of_singular_values([1.0, 0.0])["x"]
    assert LoRA({"x": two, "y": one}).effective_rank().item() == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize("rank", [2, 9])  # nine: more than either side, as after a concat
def test_effective_rank_agrees_with_the_explicit_update(rank: int) -> None:
    lora = random_lora(PATHS, batch=3, rank=rank, seed=6)
    found = []
    for update in updates(lora).values():
        share = torch.linalg.svdvals(update)
        share = share / share.sum(-1, keepdim=True)
        found.append(torch.exp(-(share * share.clamp_min(1e-300).log()).sum(-1)))
    assert lora.effective_rank().item() == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)
