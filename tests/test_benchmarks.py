"""The benchmarks run, and what they compare computes the same."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lengths
import operators
import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model
from generate import FARTHEST, FARTHEST_IN_FLOAT32, MERGED, answering, compare, conversation, effects_apart
from recipe import RecipeShine, as_published, recipe_lora, recipe_loss
from subject import Subject, load, tokens
from train_step import MQA_LENGTHS, lengths_of, padding

from shine.backbone import Backbone
from shine.chat import IGNORE
from shine.config import BackboneConfig, SourceConfig
from shine.data.batching import collate
from shine.data.examples import Example, Turn
from shine.data.samples import Sample
from shine.evaluation.methods import Method
from shine.flops import training_flops
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone
from shine.lora import LoRA
from shine.training.losses import label_losses
from shine.zoo import ASSETS

RECIPE_ADAPTERS = RecipeShine.adapters
LONG = ("--dtype", "float32")
"""For contexts of 2,380 tokens, which bfloat16 takes a minute for where it is slow."""


def test_the_recipes_loss_and_gradients_are_ours() -> None:
    """In float32, padded to more than the sample needs."""
    torch.manual_seed(0)
    backbone = Backbone(tiny_model())
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    ids = list(range(10, 30))
    sample = Sample(id="a", context_ids=list(range(40, 71)), input_ids=ids, labels=[-100] * 8 + ids[8:])
    ours, _ = label_losses(hypernetwork, backbone, collate([sample], pad_id=0))
    with as_published():
        theirs = recipe_loss(hypernetwork, backbone, sample, context_length=40, conversation_length=33)
    torch.testing.assert_close(theirs, ours.sum(), rtol=1e-5, atol=1e-5)
    parameters = list(hypernetwork.parameters())
    for a, b in zip(torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_recipes_operators_are_the_published_ones() -> None:
    """Its LoRAs linear by linear, fused attention in the M2P transformer, norms written out; outside, all is as it was."""
    subject = load("cpu-world", device="cpu", dtype="bfloat16")
    ids = tokens(1, 12, subject.backbone)
    counted = []
    for backbone, way in ((subject.backbone, nullcontext), (subject.precise, as_published), (subject.backbone, nullcontext)):
        with way(), operators.Count() as count:
            subject.hypernetwork(backbone, ids, None)
        counted.append(count.found)
    before, theirs, after = counted
    assert before == after
    assert before["baddbmm_"] == sum(len(layer) for layer in subject.backbone.linear_shapes)
    assert "baddbmm_" not in theirs
    attended = [count["_scaled_dot_product_flash_attention_for_cpu"] for count in (before, theirs)]
    assert attended == [0, len(subject.backbone.linear_shapes) + len(subject.hypernetwork.m2p.layers)]
    norms = [
        [vars(module).get("forward") for name, module in backbone.model.named_modules() if name.endswith("norm")]
        for backbone in (subject.backbone, subject.precise)
    ]
    assert all(norms[0])
    assert not any(norms[1])


def test_fine_tuning_has_a_model_of_its_own_on_the_same_weights() -> None:
    subject = load("cpu-world", device="cpu", dtype="bfloat16")
    before = copy.deepcopy(dict(subject.backbone.model.named_parameters()))
    ids = torch.arange(8)[None] + 10
    expected = subject.backbone.model(input_ids=ids).logits
    plain = subject.plain()
    assert torch.equal(plain(input_ids=ids).logits, expected)
    assert {p.data_ptr() for p in plain.parameters()} == {p.data_ptr() for p in subject.backbone.model.parameters()}
    plain.get_submodule("model.layers.0").register_forward_hook(lambda *_: 1 / 0)
    assert torch.equal(subject.backbone.model(input_ids=ids).logits, expected)
    assert before.keys() == dict(subject.plain().named_parameters()).keys()


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints."""
    # Bfloat16 on every machine, also where it is slow.
    fixed = ["--model", "cpu-world", "--device", "cpu", "--dtype", "bfloat16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [name, *fixed, *arguments])
    module = __import__(name)
    module.main()
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_training_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run("train_step", ["--rows", "mqa", "--batch", "2"], monkeypatch, capsys)
    rates = dict(re.findall(r"^  (\w+) +[\d.]+ s +([\d,]+) useful tokens/s", said, flags=re.M))
    assert rates.keys() == {"shine", "recipe", "peft"}
    assert re.search(r"share of the bfloat16 matrix rate: \d+%", said)
    ratio = r"[\d.]+ \([\d.]+ to [\d.]+ in 1 rounds\)"
    assert re.search(rf"against the recipe: {ratio} times as fast; against one at the whole float32 rate: {ratio}", said)
    losses = re.search(r"losses ([\d.]+) and ([\d.]+), [\d.]+% apart", said)
    assert losses is not None
    assert float(losses[1]) == pytest.approx(float(losses[2]), rel=0.02)
    assert "arithmetic alone allows" in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_step_in_float32_is_held_against_the_rate_of_float32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the device is slow at bfloat16, and its rate that of the recipe's."""
    monkeypatch.setattr("subject.slow_at_bfloat16", lambda device: True)
    said = run("train_step", ["--rows", "mqa", "--batch", "2", "--dtype", "auto"], monkeypatch, capsys)
    assert re.search(r"share of the float32 matrix rate: \d+%", said)
    assert re.search(r"with every product of both at the matrix rate: ([\d.]+) \(arithmetic \1, rates 1.00\)", said)
    assert "0.00% apart" in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_questions_that_share_a_context_are_one_reading_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script itself compares loss and gradients with the recipe's, which reads a context for each question."""
    subject, (lengths,) = load("cpu-world", device="cpu", dtype="float32"), lengths_of("1qa", 1)
    read, answered, labels = lengths
    flops = partial(training_flops, subject.backbone, subject.hypernetwork, read=read)
    for questions in (1, 3):
        options = ["--rows", "1qa", *LONG, "--questions", str(questions), "--without", "peft"]
        said = run("train_step", options, monkeypatch, capsys)
        expected = questions * flops(answered=answered, labels=labels) - (questions - 1) * flops(answered=0, labels=0)
        assert f"{questions} sample(s), {questions * (read + answered):,} useful tokens, 0.0% padding, " in said
        assert f", {expected / 1e12:.2f} TFLOP" in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_steps_that_learn_something_else_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours with the adapters of two contexts exchanged: the losses are as like as before."""
    label_hidden = Backbone.label_hidden

    def exchanged(self: Backbone, *args: Any, lora: LoRA, **kwargs: Any) -> torch.Tensor:
        return label_hidden(self, *args, lora=lora.select([1, 0]), **kwargs)

    monkeypatch.setattr(Backbone, "label_hidden", exchanged)
    with pytest.raises(SystemExit, match="do not compute the same"):
        run("train_step", ["--rows", "mqa", "--batch", "2", "--without", "peft"], monkeypatch, capsys)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train_step", ["--profile", "shine", "--rows", "pretrain"]),
        ("train_step", ["--profile", "recipe", "--rows", "mqa", "--batch", "1"]),
        ("train_step", ["--profile", "peft", "--rows", "1qa"]),
        ("encode", ["--profile", "--lengths", "32"]),
        ("generate", ["--profile", "--batch", "2", "--context", "32", "--new", "2"]),
        ("evaluate", ["--profile", "--contexts", "2", "--new", "2", "sets=worlds"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_profile_names_the_products(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(name, arguments, monkeypatch, capsys)
    assert re.search(r"aten::b?a?d?d?b?mm", said)
    assert "useful tokens" not in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_checkpointing_changes_neither_the_useful_arithmetic_nor_its_bounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is computed again is of no use, and neither the recipe nor PEFT computes it."""
    found = []
    for option in ([], ["--checkpointing"]):
        said = run("train_step", ["--rows", "1qa", *LONG, *option], monkeypatch, capsys)
        assert re.search(r"1 sample\(s\), 2,480 useful tokens, 0.0% padding", said)
        found.append(re.findall(r"[\d.]+ TFLOP|\(arithmetic [\d.]+|arithmetic alone allows [\d.]+", said))
    assert found[0] == found[1]
    assert len(found[0]) == 3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_step_of_ours_that_does_not_fit_ends_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("train_step.training_step", full)
    with pytest.raises(SystemExit, match="shine does not fit: take a smaller --batch"):
        run("train_step", ["--rows", "mqa", "--batch", "1"], monkeypatch, capsys)


def test_a_measured_batch_is_padded_as_little_as_one_of_training() -> None:
    for batch in (2, 4):
        rows = lengths_of("mqa", batch)
        assert len(set(rows)) == batch
        samples = [
            Sample(id="", context_ids=[number] * c, input_ids=[1] * q, labels=[1] * q) for number, (c, q, _) in enumerate(rows)
        ]
        assert padding(samples) < 0.08


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_recipe_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any, **__: Any) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("train_step.recipe_step", full)
    said = run("train_step", ["--rows", "mqa", "--batch", "2"], monkeypatch, capsys)
    assert "recipe: out of memory" in said
    assert set(re.findall(r"^  (\w+) +[\d.]+ s", said, flags=re.M)) == {"shine", "peft"}
    assert "against the recipe" not in said
    assert "arithmetic alone allows" in said


def test_the_subject_is_what_training_loads() -> None:
    """Weights in bfloat16, the frequencies of the rotary embedding not."""
    subject = load("cpu-world", device="cpu", dtype="bfloat16")
    path = str(ASSETS / "cpu-world" / "backbone")
    trained, _ = load_backbone(
        BackboneConfig(path=path, dtype="bfloat16", device="cpu"), targets=subject.hypernetwork.config.targets
    )
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(subject.backbone.model.state_dict()[name], tensor)
        assert torch.equal(subject.precise.model.state_dict()[name], tensor.float())
    buffers = dict(trained.model.named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        for backbone in (subject.backbone, subject.precise):
            assert torch.equal(dict(backbone.model.named_buffers())[name], buffer)


def test_encoding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run("encode", ["--lengths", "32", "64"], monkeypatch, capsys)
    assert "arithmetic: 2N a token for linears, attention below the diagonal" in said
    assert re.search(r"^ +64 +[\d.]+ s", said, flags=re.M)
    assert re.search(r"a token of 64 takes [\d.]+ times as long as one of 32", said)
    against = re.findall(
        r"a context of (\d+) against the recipe: .* ([\d.]+) \(.*\) times as fast; .* adapters ([\d.]+)% apart", said
    )
    assert [length for length, *_ in against] == ["32", "64"]
    assert all(0 < float(away) < 25 for *_, away in against)


@pytest.mark.parametrize("strength", [4.0, 1.05])
def test_encodings_that_differ_are_told(
    strength: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's adapter four times as strong, or by less than bfloat16 is allowed, which float32 is not."""
    monkeypatch.setattr("encode.recipe_lora", lambda *given, **more: recipe_lora(*given, **more).scale(strength))
    with pytest.raises(SystemExit, match="do not compute the same"):
        run("encode", ["--lengths", "32"], monkeypatch, capsys)


def test_an_evaluation_whose_adapters_differ_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours in float32 without its last memory token but one, which stands twice."""
    encode = Hypernetwork.forward

    def doubled(self: Hypernetwork, backbone: Backbone, *given: Any, **more: Any) -> LoRA:
        tokens = self.memory_tokens.data
        kept = tokens[-2].clone()
        if backbone.dtype == torch.float32:
            tokens[-2] = tokens[-1]
        try:
            return encode(self, backbone, *given, **more)
        finally:
            tokens[-2] = kept

    monkeypatch.setattr(Hypernetwork, "forward", doubled)
    words = ["--contexts", "2", "--questions", "1", "--new", "2", "sets=worlds", "stage.context_length=64"]
    with pytest.raises(SystemExit, match="do not compute the same"):
        run("evaluate", words, monkeypatch, capsys)


def test_answers_that_differ_are_told() -> None:
    """The recipe's answers under no adapter of a model that is another one."""
    subject, lora = of_cpu_world(2)
    with torch.no_grad():
        subject.precise.model.get_input_embeddings().weight.mul_(-1)
    with pytest.raises(SystemExit, match="do not compute the same"):
        compare(subject, lora, tokens(2, 5, subject.backbone), prompt=8)


def test_answering(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run("generate", ["--batch", "2", "--context", "40", "--new", "2", "--prompt", "8", "--turns", "3"], monkeypatch, capsys)
    assert said.count("answers/s") == 7
    losses = re.search(r"losses of what the recipe wrote ([\d.]+) and ([\d.]+)", said)
    assert losses is not None
    assert float(losses[1]) == pytest.approx(float(losses[2]), rel=0.03)
    assert re.search(r"against the recipe: [\d.]+ \(.*\) times as fast", said)
    apart = re.search(r"what an adapter does side by side and alone: ([\d.]+)% apart, in float32 ([\d.]+)%", said)
    assert apart is not None
    assert float(apart[1]) < 20
    assert float(apart[2]) < 0.1
    share = (
        r"share of the bfloat16 matrix rate at 2 rows, side by side: \d+% of [\d.]+ TFLOP \(2N a token for linears, attention below"
    )
    assert re.search(share, said)
    for merged in MERGED.values():
        assert re.search(rf"^{merged}, against wearing it: [\d.]+ \(.*\) times as fast", said, flags=re.M)
    assert re.search(r"a conversation of 3 turns: [\d.]+ s with what earlier turns computed kept, [\d.]+ s without", said)


def test_answering_in_brief(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What has a target, and nothing else."""
    said = run("generate", ["--batch", "2", "--context", "40", "--new", "2", "--prompt", "8", "--brief"], monkeypatch, capsys)
    assert re.findall(r"^(.+?)  +[\d.]+ s ", said, flags=re.M) == ["one by one", "side by side"]
    assert "2 of 2 answers are the same side by side and one by one" in said
    assert "conversation" not in said
    assert "recipe" not in said


def of_cpu_world(contexts: int) -> tuple[Subject, LoRA]:
    """The CPU world, and the adapters of random contexts, in float32."""
    subject = load("cpu-world", device="cpu", dtype="bfloat16")
    with torch.inference_mode():
        return subject, subject.hypernetwork(subject.backbone, tokens(contexts, 40, subject.backbone), None)


def exchanged(lora: LoRA) -> LoRA:
    return lora.select([1, 0, *range(2, lora.batch)])


def one_stronger(lora: LoRA) -> LoRA:
    return LoRA.stack([lora.select([0]).scale(1.1), lora.select(range(1, lora.batch))])


@pytest.mark.parametrize("wrong", [exchanged, one_stronger])
def test_a_wrong_adapter_among_those_side_by_side_is_told(wrong: Callable[[LoRA], LoRA], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of what was written is as like as before."""
    subject, lora = of_cpu_world(3)
    written = tokens(3, 5, subject.backbone)
    compare(subject, lora, written, prompt=8)
    hidden = Backbone.hidden

    def changed(self: Backbone, *args: Any, lora: LoRA | None) -> torch.Tensor:
        several = lora is not None and lora.batch > 1
        return hidden(self, *args, lora=wrong(lora) if several else lora)

    monkeypatch.setattr(Backbone, "hidden", changed)
    with pytest.raises(SystemExit, match="do not compute the same"):
        compare(subject, lora, written, prompt=8)
    rounded, exact = effects_apart(subject, lora, tokens(3, 13, subject.backbone))
    assert exact > FARTHEST_IN_FLOAT32
    # A tenth more than there should be is within what bfloat16 is allowed.
    assert (rounded > FARTHEST) == (wrong is exchanged)


def test_a_merged_adapter_is_compared_with_the_same_one_worn_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the precision of the backbone, as the product wears it; and in a conversation too."""
    subject, lora = of_cpu_world(3)
    worn: list[tuple[int, torch.dtype] | None] = []
    generate = Backbone.generate

    def watched(self: Backbone, *args: Any, lora: LoRA | None, **options: Any) -> torch.Tensor:
        worn.append(None if lora is None else (lora.batch, next(iter(lora.values()))[0].dtype))
        return generate(self, *args, lora=lora, **options)

    monkeypatch.setattr(Backbone, "generate", watched)
    ways = answering(subject, lora, prompt=8, new=2, recipe=False)
    found = {}
    for name in (name for pair in MERGED.items() for name in pair):
        assert ways[name]().shape == (3, 2)
        found[name], worn[:] = list(worn), []
    one = (1, torch.bfloat16)
    assert list(found.values()) == [[one] * 3, [None] * 3, [one], [None]]
    for talk in conversation(subject, lora.select([0]), turns=2, prompt=8, new=2).values():
        talk()
    assert worn == [one] * 4


def test_both_conversations_say_the_same() -> None:
    """What is kept of the prompt changes the time alone."""
    subject, lora = of_cpu_world(1)
    talks = conversation(subject, lora, turns=3, prompt=8, new=4)
    kept, anew = (talks[name]() for name in ("kept", "anew"))
    assert kept.shape == (1, 3 * (8 + 4))
    assert torch.equal(kept, anew)


def test_an_evaluation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe encodes a context for each of its questions, ours once for all, and both say the same: as many tokens each, the
    recipe's in TF32, where a GPU has it."""
    encoded: list[str] = []
    written: list[tuple[torch.dtype, bool, torch.Size]] = []
    prepare, generate = Method.prepare, Backbone.generate

    def counted(self: Method, examples: Sequence[Example]) -> None:
        encoded.extend([self.name] * len(examples))
        prepare(self, examples)

    def watched(self: Backbone, *args: Any, **options: Any) -> torch.Tensor:
        found = generate(self, *args, **options)
        written.append((self.dtype, torch.backends.cuda.matmul.allow_tf32, found.shape))
        return found

    monkeypatch.setattr(Method, "prepare", counted)
    monkeypatch.setattr(Backbone, "generate", watched)
    words = ["--contexts", "3", "--questions", "2", "--new", "12", "sets=worlds", "stage.context_length=64"]
    said = run("evaluate", words, monkeypatch, capsys)
    # Each way once for its peak, once timed; ours (side by side) and the recipe's once more for the loss and the first of each
    # for its adapter, which ours writes once more in float32.
    assert (encoded.count("shine"), encoded.count("recipe")) == (3 * 2 * 2 + 3 + 3 + 1, 6 * 2 + 6 + 1)
    # Each way once for its peak, once timed.
    assert {found[:2] for found in written} == {(torch.bfloat16, False), (torch.float32, True)}
    assert {found[2][1] for found in written} == {12}
    assert sum(found[2][0] for found in written) == 3 * 2 * 6
    assert "6 questions, 12 new tokens each" in said
    assert "TFLOP (2N a token for linears, attention below the diagonal)" in said
    rates = re.findall(r"^  (3 side by side|one by one|recipe) +[\d.]+ s .* ([\d,]+) useful tokens/s", said, flags=re.M)
    assert [name for name, _ in rates] == ["3 side by side", "one by one", "recipe"]
    losses = re.search(r"losses of the recipe's answers ([\d.]+) and ([\d.]+)", said)
    assert losses is not None
    assert float(losses[1]) == pytest.approx(float(losses[2]), rel=0.02)
    assert re.search(r"against recipe: [\d.]+ \(.*\) times as fast; encoding [\d.]+, answering [\d.]+", said)


def test_evaluations_that_say_something_else_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe under an adapter of a strength that nobody asked for."""
    monkeypatch.setattr("recipe.RecipeShine.adapters", lambda self: RECIPE_ADAPTERS(self).scale(1.4))
    words = ["--contexts", "2", "--questions", "1", "--new", "4", "sets=worlds", "stage.context_length=64"]
    with pytest.raises(SystemExit, match="do not compute the same"):
        run("evaluate", words, monkeypatch, capsys)


def test_the_recipes_adapter_is_ours() -> None:
    """In float32, padded by more than its length."""
    torch.manual_seed(0)
    backbone = Backbone(tiny_model())
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    context = list(range(40, 60))
    theirs = recipe_lora(hypernetwork, backbone, context, context_length=50)
    ours = hypernetwork(backbone, torch.tensor([context]), None)
    for path, pair in ours.items():
        for expected, found in zip(pair, theirs[path], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_both_passes_of_our_step_hand_over_fewer_operators_than_two_of_pefts() -> None:
    """On a GPU their number is most of a small step. A view changed in place, or a conversion for each tensor, would show here."""
    found = operators.operators(torch.device("cpu"))
    plain, encode, train, fine_tune = (found[name] for name in ("plain forward", "encode", "training step", "PEFT's step"))
    # Seven updates, four projections, two of them of matrices put together, and the copy of the memory states.
    assert encode.kernels - plain.kernels == 7 + 4 + 2 + 1
    assert encode.views - plain.views <= 32
    assert train.kernels <= 1.8 * fine_tune.kernels
    assert train.views <= 1.4 * fine_tune.views


def test_the_lengths_that_are_measured_are_as_they_were_drawn(tmp_path: Path) -> None:
    """From short to long, in the budget, each with labels, and the file is as the script writes it."""
    rows = [tuple(row) for row in json.loads(MQA_LENGTHS.read_text())]
    assert len(rows) == lengths.DRAWN
    assert all(0 < labels < conversation <= 1150 and 0 < context <= 1150 for context, conversation, labels in rows)
    samples = [Sample(id="", context_ids=[1] * c, input_ids=[1] * q, labels=[IGNORE] * (q - n) + [1] * n) for c, q, n in rows]
    assert lengths.lengths(samples[::-1]) == rows
    lengths.write(tmp_path / "again.json", rows)
    assert (tmp_path / "again.json").read_text() == MQA_LENGTHS.read_text()


def test_lengths_are_drawn_from_the_passages_of_both_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On copies of a few passages, with the tokenizer of the CPU world."""
    example = Example(id="a", context="The mill is old. " * 9, turns=(Turn("How old is the mill?", ("old",)),))
    read: list[str] = []

    def read_source(source: SourceConfig) -> list[Example]:
        read.append(source.kind)
        return [replace(example, id=str(number), context=example.context * (number % 3 + 1)) for number in range(lengths.DRAWN)]

    monkeypatch.setattr(lengths, "read_source", read_source)
    monkeypatch.setattr(lengths, "resolve", lambda _path: ASSETS / "cpu-world" / "backbone")
    monkeypatch.setattr(lengths, "MQA_LENGTHS", tmp_path / "drawn.json")
    monkeypatch.setattr(sys, "argv", ["lengths.py"])
    lengths.main()
    assert read == ["race", "squad"]
    rows = json.loads((tmp_path / "drawn.json").read_text())
    assert len(rows) == lengths.DRAWN
    assert len({context for context, _, _ in rows}) == 3
    assert "wrote" in capsys.readouterr().out
