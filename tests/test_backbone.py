"""The frozen backbone: wearing a LoRA is having other weights, memory states, label logits, generation, checkpointing."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from conftest import ARCHITECTURES, VOCABULARY, tiny_hypernetwork_config, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from shine.backbone import TARGETS, Backbone
from shine.data.batching import pad_left
from shine.hypernetwork import Hypernetwork
from shine.lora import LinearShape, LoRA

KINDS = sorted(ARCHITECTURES)
Shapes = Sequence[Sequence[LinearShape]]
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# transformers computes norms and rotary angles in float32 whatever the model's type; a shift by padding shows at that precision.
SHIFTED = {"rtol": 1e-5, "atol": 1e-5}
PAD = 0


def random_lora(shapes: Shapes, *, batch: int, rank: int = 2, seed: int = 0, std: float = 0.3, grad: bool = False) -> LoRA:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * std).requires_grad_(grad)

    return LoRA({s.path: (draw(batch, s.in_features, rank), draw(batch, rank, s.out_features)) for layer in shapes for s in layer})


def merged(plain: PreTrainedModel, lora: LoRA, sample: int) -> PreTrainedModel:
    """A copy of the plain model with ``(A B)^T`` of one sample added to its weights."""
    model = copy.deepcopy(plain)
    with torch.no_grad():
        for path, (a, b) in lora.items():
            model.get_submodule(path).weight += (a[sample] @ b[sample]).T
    return model


def random_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Rows of ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def pair(kind: str = "qwen3", **options: object) -> tuple[PreTrainedModel, Backbone]:
    """A plain model and a backbone of equal weights, float64."""
    return tiny_model(kind, dtype=torch.float64), Backbone(tiny_model(kind, dtype=torch.float64), **options)


def backbone_logits(backbone: Backbone, ids: Tensor, mask: Tensor | None, lora: LoRA | None) -> Tensor:
    return backbone.logits(backbone.hidden(ids, mask, lora=lora))


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """A list that grows by one with each call of the module."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


# --- wearing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_sample_of_a_padded_batch_gets_the_logits_of_its_own_merged_model(kind: str) -> None:
    plain, backbone = pair(kind)
    lora = random_lora(backbone.linear_shapes, batch=3)
    rows = random_rows(5, 9, 7)
    ids, mask = pad_left(rows, value=PAD)
    logits = backbone_logits(backbone, ids, mask, lora)
    for sample, row in enumerate(rows):
        model = merged(plain, lora, sample)
        padded = model(ids[sample : sample + 1], attention_mask=mask[sample : sample + 1]).logits[0]
        torch.testing.assert_close(logits[sample, -len(row) :], padded[-len(row) :], **EXACT)
        alone = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(logits[sample, -len(row) :], alone, **SHIFTED)
        # The test would see a LoRA that is not worn.
        assert (alone - plain(torch.tensor([row])).logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_lora_the_backbone_is_the_plain_model(kind: str) -> None:
    plain, backbone = pair(kind)
    ids, mask = pad_left(random_rows(4, 6), value=PAD)
    assert torch.equal(backbone_logits(backbone, ids, mask, None), plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_lora_of_batch_one_serves_any_batch(batch: int) -> None:
    plain, backbone = pair()
    lora = random_lora(backbone.linear_shapes, batch=1)
    ids, _ = pad_left(random_rows(*[6] * batch), value=PAD)
    torch.testing.assert_close(backbone_logits(backbone, ids, None, lora), merged(plain, lora, 0)(ids).logits, **EXACT)


@torch.no_grad()
def test_in_a_batch_k_times_the_loras_every_k_neighbours_share_an_adapter() -> None:
    plain, backbone = pair()
    lora = random_lora(backbone.linear_shapes, batch=2)
    ids, _ = pad_left(random_rows(*[5] * 6), value=PAD)
    logits = backbone_logits(backbone, ids, None, lora)
    for sample in range(6):
        wanted = merged(plain, lora, sample // 3)(ids[sample : sample + 1]).logits[0]
        torch.testing.assert_close(logits[sample], wanted, **EXACT)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_linears_that_are_not_given_the_same_tensor_are_projected_apart(batch: int) -> None:
    """Query, key and value usually share their input, and with it one product; a layer that gives each its own is no exception."""
    plain, backbone = pair()
    lora = random_lora(backbone.linear_shapes, batch=batch)
    ids = torch.tensor(random_rows(7, 7))
    expected = backbone_logits(backbone, ids, None, lora)
    for model in (plain, backbone.model):
        for layer in model.base_model.layers:
            # Another tensor, and for the keys another value.
            layer.self_attn.v_proj.register_forward_pre_hook(lambda _module, args: (args[0].clone(),))
    assert torch.equal(backbone_logits(backbone, ids, None, lora), expected)
    for model in (plain, backbone.model):
        for layer in model.base_model.layers:
            layer.self_attn.k_proj.register_forward_pre_hook(lambda _module, args: (args[0] * 0.5,))
    found = backbone_logits(backbone, ids, None, lora)
    for sample in range(2):
        alone = merged(plain, lora, sample % batch)(input_ids=ids[sample : sample + 1]).logits[0]
        torch.testing.assert_close(found[sample], alone, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_merged_backbone_is_one_that_wears_the_adapter(kind: str) -> None:
    plain, backbone = pair(kind)
    lora = random_lora(backbone.linear_shapes, batch=1)
    ids, mask = pad_left(random_rows(9, 5), value=PAD)
    twin = backbone.merged(lora)
    torch.testing.assert_close(
        backbone_logits(twin, ids, mask, None), backbone_logits(backbone, ids, mask, lora), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(backbone_logits(backbone, ids, mask, None), backbone_logits(Backbone(plain), ids, mask, None))
    # What the adapter does not touch is held once.
    touched = {f"{path}.weight" for path in lora}
    ours, theirs = dict(twin.model.named_parameters()), dict(backbone.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name].data_ptr() != theirs[name].data_ptr()} == touched
    options = {"lora": None, "max_new_tokens": 5, "stop_ids": None, "pad_id": PAD}
    worn = backbone.generate(ids, mask, **{**options, "lora": lora})
    assert torch.equal(twin.generate(ids, mask, **options), worn)


def test_several_adapters_are_not_merged() -> None:
    _, backbone = pair()
    with pytest.raises(ValueError, match=r"these are 2 adapters: merge one of them, lora.select\(\[i\]\)"):
        backbone.merged(random_lora(backbone.linear_shapes, batch=2))


@pytest.mark.parametrize(("samples", "adapters"), [(3, 2), (2, 3), (1, 2), (5, 4)])
@torch.no_grad()
def test_a_batch_that_is_no_multiple_of_the_loras_is_refused(samples: int, adapters: int) -> None:
    _, backbone = pair()
    ids, _ = pad_left(random_rows(*[4] * samples), value=PAD)
    with pytest.raises(ValueError, match=f"batch of {samples} cannot wear {adapters} adapters"):
        backbone.hidden(ids, None, lora=random_lora(backbone.linear_shapes, batch=adapters))


@torch.no_grad()
def test_nothing_is_worn_outside_the_block_not_even_after_an_exception() -> None:
    plain, backbone = pair()
    ids, _ = pad_left(random_rows(5, 5), value=PAD)
    wanted = plain(ids).logits
    one, two, misfit = (random_lora(backbone.linear_shapes, batch=batch, seed=batch) for batch in (1, 2, 3))
    with backbone.wearing(one):
        worn = backbone.model(ids).logits
        assert not torch.allclose(worn, wanted)
        with backbone.wearing(two):
            assert not torch.allclose(backbone.model(ids).logits, worn)
        assert torch.equal(backbone.model(ids).logits, worn)
        with backbone.wearing(None):
            assert torch.equal(backbone.model(ids).logits, wanted)
        with pytest.raises(ValueError, match="cannot wear"), backbone.wearing(misfit):
            backbone.model(ids)
        assert torch.equal(backbone.model(ids).logits, worn)
    # Not even by a linear that is called by itself right after.
    x = torch.ones(1, 32, dtype=torch.float64)
    assert torch.equal(backbone.model.model.layers[2].mlp.up_proj(x), plain.model.layers[2].mlp.up_proj(x))
    assert torch.equal(backbone.model(ids).logits, wanted)
    with pytest.raises(KeyError), backbone.wearing(one):
        raise KeyError
    assert torch.equal(backbone.model(ids).logits, wanted)


def test_two_threads_on_one_backbone_do_not_mix() -> None:
    plain, backbone = pair()
    ids, _ = pad_left(random_rows(6, 6), value=PAD)
    loras = [random_lora(backbone.linear_shapes, batch=2, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        wanted = [torch.cat([merged(plain, lora, sample)(ids[sample : sample + 1]).logits for sample in (0, 1)]) for lora in loras]
    # Both threads meet inside every layer, so neither can be done before the other has put on its LoRA.
    meeting = threading.Barrier(2, timeout=60)

    def meet(*_: object) -> None:
        meeting.wait()

    handles = [layer.register_forward_pre_hook(meet) for layer in backbone.model.base_model.layers]
    found: dict[int, Tensor] = {}

    def ask(which: int) -> None:
        with torch.no_grad():
            found[which] = torch.stack([backbone_logits(backbone, ids, None, loras[which]) for _ in range(3)])

    threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for handle in handles:
        handle.remove()
    for which in (0, 1):
        for logits in found[which]:
            torch.testing.assert_close(logits, wanted[which], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    plain, backbone = pair(kind)
    lora = random_lora(backbone.linear_shapes, batch=1, rank=3, grad=True)
    ids, mask = pad_left(random_rows(8, 5), value=PAD)
    config = peft.LoraConfig(r=3, lora_alpha=3, lora_dropout=0.0, target_modules=list(TARGETS), bias="none")
    theirs = peft.get_peft_model(plain, config)
    modules = {path: theirs.base_model.model.get_submodule(path) for path in lora}
    with torch.no_grad():
        for path, (a, b) in lora.items():
            modules[path].lora_A["default"].weight.copy_(a[0].T)
            modules[path].lora_B["default"].weight.copy_(b[0].T)
    weight = torch.randn(2, 8, VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * mask[:, :, None]

    our_logits, their_logits = backbone_logits(backbone, ids, mask, lora), theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(our_logits * mask[:, :, None], their_logits * mask[:, :, None], **EXACT)
    (our_logits * weight).sum().backward()
    (their_logits * weight).sum().backward()
    for path, (a, b) in lora.items():
        torch.testing.assert_close(a.grad[0].T, modules[path].lora_A["default"].weight.grad, **EXACT)
        torch.testing.assert_close(b.grad[0].T, modules[path].lora_B["default"].weight.grad, **EXACT)
        assert b.grad.abs().max() > 1e-6


@pytest.mark.parametrize("targets", [("v_proj",), ("down_proj", "q_proj"), ("up_proj", "gate_proj", "o_proj")])
@torch.no_grad()
def test_a_subset_of_the_linears_can_be_targeted_in_any_order(targets: tuple[str, ...]) -> None:
    plain, backbone = pair(targets=targets)
    paths = [shape.path for layer in backbone.linear_shapes for shape in layer]
    block = {"v_proj": "self_attn", "q_proj": "self_attn", "o_proj": "self_attn"}
    assert paths == [f"model.layers.{layer}.{block.get(name, 'mlp')}.{name}" for layer in range(3) for name in targets]
    for layer in backbone.linear_shapes:
        for shape in layer:
            assert plain.get_submodule(shape.path).weight.shape == (shape.out_features, shape.in_features)
    lora = random_lora(backbone.linear_shapes, batch=2)
    ids, _ = pad_left(random_rows(6, 6), value=PAD)
    logits = backbone_logits(backbone, ids, None, lora)
    for sample in (0, 1):
        torch.testing.assert_close(logits[sample], merged(plain, lora, sample)(ids[sample : sample + 1]).logits[0], **EXACT)


def test_a_target_that_no_layer_has_is_refused_with_the_linears_there_are() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0 of Qwen3ForCausalLM has no linear called c_attn, w1") as error:
        Backbone(tiny_model(), targets=("q_proj", "c_attn", "w1"))
    for name in TARGETS:
        assert name in str(error.value).split("set hypernetwork.targets to some of ")[1]


def test_a_layer_with_two_linears_of_one_name_is_refused() -> None:
    """As a list of experts has them: adapting the last one alone would be silently something else."""
    model = tiny_model()
    layer = model.base_model.layers[1]
    layer.experts = torch.nn.ModuleList([torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)}) for _ in range(2)])
    with pytest.raises(ValueError, match=r"model\.layers\.1 .* has more than one linear called up_proj .*hypernetwork\.targets"):
        Backbone(model)


def test_a_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, logits_scaling=3.0
    )
    with pytest.raises(ValueError, match="GraniteForCausalLM scales or caps its logits"):
        Backbone(GraniteForCausalLM(config))


def test_a_target_that_one_layer_lacks_names_that_layer() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"model\.layers\.1 .*no linear called up_proj"):
        Backbone(model)


# --- generation ------------------------------------------------------------------------------------------------------------


def alone(plain: PreTrainedModel, row: list[int], *, count: int, beams: int, stop: int) -> list[int]:
    ids = torch.tensor([row])
    tokens = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        num_beams=beams,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=PAD,
    )
    return tokens[0, len(row) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_each_sample_of_a_padded_batch_what_its_merged_model_says_alone(kind: str, beams: int) -> None:
    plain, backbone = pair(kind)
    lora = random_lora(backbone.linear_shapes, batch=3)
    # The first two prompts are equal: only the LoRA can tell their answers apart.
    rows = random_rows(4, 4, 9)
    rows[1] = rows[0]
    ids, mask = pad_left(rows, value=PAD)
    found = backbone.generate(ids, mask, lora=lora, max_new_tokens=8, stop_ids=[2], pad_id=PAD, beams=beams).tolist()
    wanted = [alone(merged(plain, lora, sample), row, count=8, beams=beams, stop=2) for sample, row in enumerate(rows)]
    width = max(map(len, wanted))
    assert found == [row + [PAD] * (width - len(row)) for row in wanted]
    assert wanted[0] != wanted[1]


def test_generate_stops_at_any_stop_token_and_pads_the_rest() -> None:
    plain, backbone = pair()
    rows = random_rows(5, 7)
    ids, mask = pad_left(rows, value=PAD)
    free = [alone(plain, row, count=10, beams=1, stop=2) for row in rows]
    stops = [free[0][2], free[1][5]]
    wanted = [row[: min(row.index(stop) for stop in stops if stop in row) + 1] for row in free]
    width = max(map(len, wanted))
    found = backbone.generate(ids, mask, lora=None, max_new_tokens=10, stop_ids=stops, pad_id=PAD).tolist()
    assert found == [row + [PAD] * (width - len(row)) for row in wanted]
    assert width < 10


@pytest.mark.parametrize(
    "changes",
    [{"do_sample": True, "temperature": 5.0, "top_k": 50}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}],
    ids=["sampling", "repetition_penalty", "no_repeat_ngram"],
)
def test_generate_is_greedy_whatever_the_models_own_generation_config_says(changes: dict[str, object]) -> None:
    # Qwen2.5's ships with sampling and a repetition penalty.
    plain, _ = pair("qwen2")
    model = tiny_model("qwen2")
    model.generation_config.update(**changes)
    backbone = Backbone(model)
    row = random_rows(6)[0] * 2
    wanted: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            wanted.append(int(plain(torch.tensor([row + wanted])).logits[0, -1].argmax()))
    assert len(set(wanted)) < 12, "nothing repeats, so a penalty would not show"
    ids = torch.tensor([row])
    found = backbone.generate(ids, torch.ones_like(ids), lora=None, max_new_tokens=12, stop_ids=[2], pad_id=PAD)
    assert found[0].tolist() == wanted


# --- memory states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("meta_is_zero", [True, False])
@torch.no_grad()
def test_memory_states_are_the_plain_models_hidden_states_the_last_before_the_norm(kind: str, meta_is_zero: bool) -> None:
    plain, backbone = pair(kind)
    meta = random_lora(backbone.linear_shapes, batch=1)
    meta = meta.scale(0.0) if meta_is_zero else meta
    memory = torch.randn(4, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rows = random_rows(7, 3, 5)
    ids, mask = pad_left(rows, value=PAD)
    states = backbone.memory_states(ids, mask, memory_tokens=memory, meta_lora=meta)
    assert states.shape == (3, 3, 4, 32)
    model = merged(plain, meta, 0)
    embedded = torch.cat([model.get_input_embeddings()(ids), memory.expand(3, -1, -1)], dim=1)
    output = model.model(inputs_embeds=embedded, attention_mask=F.pad(mask, (0, 4), value=1), output_hidden_states=True)
    for layer in range(2):
        torch.testing.assert_close(states[:, layer], output.hidden_states[layer + 1][:, -4:], **EXACT)
    torch.testing.assert_close(model.model.norm(states[:, 2]), output.last_hidden_state[:, -4:], **EXACT)
    assert not torch.allclose(states[:, 2], output.last_hidden_state[:, -4:], atol=1e-2)


@torch.no_grad()
def test_memory_states_do_not_depend_on_padding() -> None:
    _, backbone = pair()
    meta = random_lora(backbone.linear_shapes, batch=1)
    memory = torch.randn(2, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ids, mask = pad_left(random_rows(9, 4), value=PAD)
    states = backbone.memory_states(ids, mask, memory_tokens=memory, meta_lora=meta)
    short = backbone.memory_states(ids[1:, -4:], None, memory_tokens=memory, meta_lora=meta)
    torch.testing.assert_close(states[1:], short, **SHIFTED)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_context_pass_never_computes_vocabulary_logits(kind: str) -> None:
    _, backbone = pair(kind)
    ids, mask = pad_left(random_rows(6, 3), value=PAD)
    meta = random_lora(backbone.linear_shapes, batch=1)
    with counted(backbone.model.get_output_embeddings()) as calls:
        backbone.memory_states(ids, mask, memory_tokens=torch.zeros(2, 32, dtype=torch.float64), meta_lora=meta)
        assert calls == []
        backbone_logits(backbone, ids, mask, None)
        assert calls == [1]


@torch.no_grad()
def test_an_exception_while_reading_leaves_nothing_behind() -> None:
    plain, backbone = pair()
    ids, _ = pad_left(random_rows(5, 5), value=PAD)
    memory = torch.randn(2, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    meta = random_lora(backbone.linear_shapes, batch=1)
    before = backbone.memory_states(ids, None, memory_tokens=memory, meta_lora=meta)
    with pytest.raises(ValueError, match="cannot wear"):
        backbone.memory_states(ids, None, memory_tokens=memory, meta_lora=random_lora(backbone.linear_shapes, batch=3))

    def fail(*_: object) -> None:
        raise KeyError("a fault in the middle of the pass")

    handle = backbone.model.base_model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="middle of the pass"):
        backbone.memory_states(ids, None, memory_tokens=memory, meta_lora=meta)
    handle.remove()
    assert torch.equal(backbone.model(ids).logits, plain(ids).logits)
    assert torch.equal(backbone.memory_states(ids, None, memory_tokens=memory, meta_lora=meta), before)


@torch.no_grad()
def test_states_are_collected_in_a_context_pass_only() -> None:
    _, backbone = pair()
    ids, _ = pad_left(random_rows(*[5] * 7), value=PAD)
    meta = random_lora(backbone.linear_shapes, batch=1)
    misfit = random_lora(backbone.linear_shapes, batch=3)

    def kept() -> int:
        """Tensors alive that have the shape of a layer's memory states."""
        gc.collect()
        return sum(type(thing) is Tensor and thing.shape == (7, 3, 32) for thing in gc.get_objects())

    before = kept()
    backbone.memory_states(ids, None, memory_tokens=torch.zeros(3, 32, dtype=torch.float64), meta_lora=meta)
    with pytest.raises(ValueError, match="cannot wear"):
        backbone.memory_states(ids, None, memory_tokens=torch.zeros(3, 32, dtype=torch.float64), meta_lora=misfit)
    backbone.hidden(ids, None, lora=None)
    assert kept() == before


def test_memory_states_carry_a_gradient_to_memory_tokens_and_meta_lora() -> None:
    _, backbone = pair()
    meta = random_lora(backbone.linear_shapes, batch=1, grad=True)
    memory = torch.randn(2, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    ids, mask = pad_left(random_rows(5, 3), value=PAD)

    def read() -> Tensor:
        return backbone.memory_states(ids, mask, memory_tokens=memory, meta_lora=meta).sin().sum()

    read().backward()
    assert memory.grad is not None
    # Against finite differences, one entry of each.
    for tensor in (memory, meta["model.layers.0.self_attn.q_proj"][0], meta["model.layers.2.mlp.down_proj"][1]):
        index = tensor.grad.abs().flatten().argmax()
        with torch.no_grad():
            values = []
            for step in (1e-3, -2e-3):
                tensor.view(-1)[index] += step
                values.append(read().item())
            tensor.view(-1)[index] += 1e-3
        assert tensor.grad.flatten()[index].item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=5e-3)


# --- labels ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_label_logits_are_the_full_logits_one_before_each_label(kind: str) -> None:
    plain, backbone = pair(kind)
    lora = random_lora(backbone.linear_shapes, batch=2)
    ids, mask = pad_left(random_rows(9, 6), value=PAD)
    labels = [(0, 3), (0, 8), (1, 5), (1, 8)]
    positions = torch.tensor([sample * 9 + position for sample, position in labels])
    found = backbone.label_logits(ids, mask, label_positions=positions, lora=lora)
    assert found.shape == (4, VOCABULARY)
    for logits, (sample, position) in zip(found, labels, strict=True):
        full = merged(plain, lora, sample)(ids[sample : sample + 1], attention_mask=mask[sample : sample + 1]).logits
        torch.testing.assert_close(logits, full[0, position - 1], **EXACT)


@pytest.mark.parametrize(
    ("held", "given"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
@torch.no_grad()
def test_label_logits_are_float32_at_least(make_backbone: Callable[..., Backbone], held: torch.dtype, given: torch.dtype) -> None:
    ids, _ = pad_left(random_rows(5), value=PAD)
    assert make_backbone(dtype=held).label_logits(ids, None, label_positions=torch.tensor([3]), lora=None).dtype == given


@torch.no_grad()
def test_label_logits_compute_nothing_where_there_is_no_label() -> None:
    _, backbone = pair()
    ids, _ = pad_left(random_rows(9, 9), value=PAD)
    rows: list[int] = []
    handle = backbone.model.get_output_embeddings().register_forward_hook(
        lambda _m, _i, output: rows.append(output.numel() // VOCABULARY)
    )
    backbone.label_logits(ids, None, label_positions=torch.tensor([4, 5, 12]), lora=None)
    handle.remove()
    assert rows == [3]


# --- the whole hypernetwork ------------------------------------------------------------------------------------------------


def make_hypernetwork(backbone: Backbone) -> Hypernetwork:
    """float64; the meta LoRA is not zero, so that both passes wear something."""
    torch.manual_seed(7)
    # Memory tokens as large as embeddings are, so that a finite difference is not all curvature.
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(memory_std=0.5), backbone).double()
    with torch.no_grad():
        for name, parameter in hypernetwork.meta_lora.named_parameters():
            if name.endswith("B"):
                parameter.normal_(std=0.1)
    return hypernetwork


def loss_and_gradients(backbone: Backbone) -> tuple[Tensor, dict[str, Tensor]]:
    """Two batches are encoded and answered before the one backward pass: four passes, four different LoRAs."""
    hypernetwork = make_hypernetwork(backbone)
    losses = []
    for seed in (0, 1):
        context_ids, context_mask = pad_left(random_rows(8, 5, seed=seed), value=PAD)
        input_ids, input_mask = pad_left(random_rows(7, 9, seed=seed + 10), value=PAD)
        lora = hypernetwork(backbone, context_ids, context_mask)
        positions = torch.tensor([4, 5, 8, 14, 17])
        logits = backbone.label_logits(input_ids, input_mask, label_positions=positions, lora=lora)
        losses.append(F.cross_entropy(logits, input_ids.flatten()[positions], reduction="sum"))
    loss = torch.stack(losses).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in hypernetwork.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.detach(), gradients


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_neither_loss_nor_any_gradient(kind: str) -> None:
    results, calls = {}, {}
    for checkpointing in (False, True):
        _, backbone = pair(kind, activation_checkpointing=checkpointing)
        with counted(backbone.model.base_model.layers[1].mlp.up_proj) as called:
            results[checkpointing] = loss_and_gradients(backbone)
        calls[checkpointing] = len(called)
    # Four passes, each layer once more in the backward pass: it really recomputes.
    assert calls == {False: 4, True: 8}
    assert torch.equal(results[True][0], results[False][0])
    for name, gradient in results[False][1].items():
        torch.testing.assert_close(
            results[True][1][name], gradient, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
        )
        # Not zero because nothing arrives.
        assert gradient.abs().max() > 1e-8, name


def test_gradients_of_the_whole_agree_with_finite_differences() -> None:
    _, backbone = pair(activation_checkpointing=True)
    hypernetwork = make_hypernetwork(backbone)
    context_ids, context_mask = pad_left(random_rows(8, 5), value=PAD)
    input_ids, input_mask = pad_left(random_rows(7, 9, seed=1), value=PAD)

    def loss() -> Tensor:
        lora = hypernetwork(backbone, context_ids, context_mask)
        return F.cross_entropy(
            backbone_logits(backbone, input_ids, input_mask, lora)[:, -3:].flatten(0, 1), input_ids[:, -3:].flatten()
        )

    loss().backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in hypernetwork.named_parameters():
        if name not in ("memory_tokens", "m2p.layers.0.qkv.weight", "m2p.token_embedding", "meta_lora.layers.1.o_proj.A"):
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        wanted = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter += 1e-4 * direction
            above = loss().item()
            parameter -= 2e-4 * direction
            below = loss().item()
            parameter += 1e-4 * direction
        assert wanted == pytest.approx((above - below) / 2e-4, rel=5e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_is_frozen_and_stays_so(kind: str) -> None:
    model = tiny_model(kind, dtype=torch.float64).requires_grad_(True).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    backbone = Backbone(model)
    assert not any(module.training for module in model.modules())
    loss_and_gradients(backbone)
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name


def test_the_hypernetwork_owns_everything_that_is_trained_and_nothing_of_the_backbone(
    make_backbone: Callable[..., Backbone],
) -> None:
    backbone = make_backbone()
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    names = {name.split(".")[0] for name, _ in hypernetwork.named_parameters()}
    assert names == {"memory_tokens", "meta_lora", "m2p"}
    assert all(parameter.requires_grad for parameter in hypernetwork.parameters())
    theirs = {parameter.data_ptr() for parameter in backbone.model.parameters()}
    assert not any(parameter.data_ptr() in theirs for parameter in hypernetwork.parameters())
    assert hypernetwork.memory_tokens.abs().max() > 0
