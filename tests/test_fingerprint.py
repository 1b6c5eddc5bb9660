"""Which backbone a hypernetwork belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from runs import stage_config, train_config
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from shine import loading, zoo
from shine.backbone import Backbone
from shine.checkpoint import check_backbone, read_info
from shine.config import BackboneConfig
from shine.fingerprint import Fingerprint, fingerprint
from shine.training.stage import train


def test_a_fingerprint_does_not_depend_on_type_hooks_or_place(
    tiny_backbone_folder: str, make_backbone: Callable[..., Backbone]
) -> None:
    wanted = fingerprint(tiny_model(), tiny_tokenizer())
    assert fingerprint(tiny_model(dtype=torch.bfloat16), tiny_tokenizer()) == wanted
    assert fingerprint(tiny_model(dtype=torch.float64), tiny_tokenizer()) == wanted
    assert fingerprint(make_backbone().model, tiny_tokenizer()) == wanted
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tiny_backbone_folder), tiny_tokenizer()) == wanted


def other_rope(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "linear", "factor": 4.0}


def other_epsilon(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> None:
    model.config.rms_norm_eps = 1e-3


def other_activation(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> None:
    model.config.hidden_act = "gelu"


def biases(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> None:
    model.config.attention_bias = True


def another_token(_: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["more"])


def digits_apart(_: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def small_letters(_: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def fewer_merges(_: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The same vocabulary, and pieces of it that the probe does not hold."""
    tokenizer.backend_tokenizer.model = models.BPE(vocab=tokenizer.get_vocab(), merges=[("1", "9")])


def a_matrix(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> None:
    model.base_model.layers[2].mlp.down_proj.weight.data *= 1.01


def a_norm(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> None:
    model.base_model.norm.weight.data *= 1.01


def a_bias(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> None:
    model.base_model.layers[1].self_attn.k_proj.bias.data *= 1.01


@pytest.mark.parametrize(
    ("part", "change"),
    [
        *(("config", change) for change in (other_rope, other_epsilon, other_activation, biases)),
        *(("tokenizer", change) for change in (another_token, digits_apart, small_letters, fewer_merges)),
        *(("weights", change) for change in (a_matrix, a_norm, a_bias)),
    ],
)
def test_each_part_notices_what_it_is_of(part: str, change: Callable[[PreTrainedModel, PreTrainedTokenizerFast], None]) -> None:
    merges = [("1", "9"), ("q", "q")]
    before = fingerprint(tiny_model("qwen2"), tiny_tokenizer(merges=merges))
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer(merges=merges)
    change(model, tokenizer)
    after = fingerprint(model, tokenizer)
    assert [name for name in ("config", "tokenizer", "weights") if getattr(before, name) != getattr(after, name)] == [part]
    assert after.is_variant_of(before) == (part == "weights")
    assert not before.is_variant_of(before)


def test_the_shipped_checkpoint_knows_the_shipped_backbone() -> None:
    info = read_info(zoo.ASSETS / "cpu-world" / "hypernetwork")
    assert info is not None
    backbone, tokenizer = loading.load_backbone(BackboneConfig(path="cpu-world", device="cpu"), targets=info.hypernetwork.targets)
    assert info.fingerprint == fingerprint(backbone.model, tokenizer)


def test_a_checkpoint_of_before_loads_without_a_fingerprint(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Format 1 hashed less: what it says cannot be held against what is found now."""
    final = train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage_config(steps=1)))
    values = json.loads((final / "config.json").read_text())
    assert values["format"] == 2
    old = {**values, "format": 1, "fingerprint": {"config": "0" * 12, "tokenizer": "0" * 12, "weights": "0" * 12}}
    (final / "config.json").write_text(json.dumps(old))
    info = read_info(final)
    assert info is not None
    assert info.fingerprint is None
    check_backbone(final, config=BackboneConfig(path="elsewhere"), found=fingerprint(tiny_model(), tiny_tokenizer()))


def test_a_checkpoint_knows_its_backbone(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Another model is refused with both names, a variant unless told, whatever type and path the right one has."""
    final = train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage_config(steps=1)))
    info = read_info(final)
    assert info is not None
    right = info.fingerprint
    assert right == fingerprint(tiny_model(), tiny_tokenizer())
    check_backbone(final, config=BackboneConfig(path="elsewhere", dtype="float32"), found=right)

    tuned = Fingerprint(right.config, right.tokenizer, "0" * 12)
    with pytest.raises(ValueError, match=f"{tiny_backbone_folder} .fingerprint {right}.*tuned .*{tuned}.*allow_variant=true"):
        check_backbone(final, config=BackboneConfig(path="tuned"), found=tuned)
    check_backbone(final, config=BackboneConfig(path="tuned", allow_variant=True), found=tuned)

    other = Fingerprint("0" * 12, right.tokenizer, right.weights)
    with pytest.raises(ValueError, match=r"other is another .*set backbone="):
        check_backbone(final, config=BackboneConfig(path="other", allow_variant=True), found=other)


def test_training_on_another_models_checkpoint_is_refused(tiny_backbone_folder: str, tmp_path: Path) -> None:
    final = train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage_config(steps=1)))
    tiny_model(seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the same architecture and vocabulary with other weights"):
        train(train_config(str(tmp_path / "other"), tmp_path / "next", checkpoint=str(final)))


def test_the_command_line_takes_a_variant_only_when_told(
    tiny_backbone_folder: str, tmp_path: Path, notes: Path, run: Callable[..., str], refused: Callable[..., str]
) -> None:
    """And the refusal names the option that a reader of it has."""
    final = train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage_config(steps=1)))
    tiny_model(seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    command = ["encode", notes, "-o", tmp_path / "out", "--model", final, "--backbone", tmp_path / "other", "--device", "cpu"]
    assert refused(*command).endswith("or allow this one: --allow-variant\n")
    assert not (tmp_path / "out").exists()
    run(*command, "--allow-variant")
    assert (tmp_path / "out").is_dir()

    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"context": "Ada.", "turns": [{"question": "Who?", "answers": ["Ada"]}]}\n')
    conversation = ("converse", final, asked, "--max-new-tokens", "2", "--backbone", tmp_path / "other")
    page = ("trust", final, "--contexts", "4", "--output", tmp_path / "page", "--backbone", tmp_path / "other")
    for command in (conversation, page):
        assert refused(*command).endswith("or allow this one: --allow-variant\n")
        run(*command, "--allow-variant")


def test_a_variant_is_named(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SHINE fetches as a quantised GGUF is a variant by name, in config.json and in the refusal of other weights."""
    assert loading.variant_name("smollm2-135m", Backbone(tiny_model())) == "Q4_1, dequantised"
    assert loading.variant_name("elsewhere", Backbone(tiny_model())) is None
    held = tiny_model()
    held.config.quantization_config = {"quant_method": "fp8"}
    assert loading.variant_name("elsewhere", Backbone(held)) == "quantised: fp8"

    pin = replace(zoo.FETCHED["smollm2-135m"], member="tiny/Tiny-1M.Q8_0.gguf")
    monkeypatch.setitem(zoo.FETCHED, "tiny", pin)
    monkeypatch.setattr(zoo, "fetch", lambda name: Path(tiny_backbone_folder))
    final = train(train_config("tiny", tmp_path / "run", stage=stage_config(steps=1)))
    assert json.loads((final / "config.json").read_text())["variant"] == "Q8_0, dequantised"
    info = read_info(final)
    assert info is not None
    other = replace(info.fingerprint, weights="0" * 12)
    with pytest.raises(ValueError, match=r"was trained on backbone tiny \(Q8_0, dequantised\) .*allow_variant=true"):
        check_backbone(final, config=BackboneConfig(path="original"), found=other)
