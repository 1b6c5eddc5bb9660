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
from transformers import AutoModelForCausalLM

from shine import zoo
from shine.backbone import Backbone
from shine.checkpoint import check_backbone, read_info
from shine.config import BackboneConfig
from shine.fingerprint import Fingerprint, fingerprint
from shine.training.loop import train


def test_a_fingerprint_does_not_depend_on_type_hooks_or_place(
    tiny_backbone_folder: str, make_backbone: Callable[..., Backbone]
) -> None:
    wanted = fingerprint(tiny_model(), tiny_tokenizer())
    assert fingerprint(tiny_model(dtype=torch.bfloat16), tiny_tokenizer()) == wanted
    assert fingerprint(tiny_model(dtype=torch.float64), tiny_tokenizer()) == wanted
    assert fingerprint(make_backbone().model, tiny_tokenizer()) == wanted
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tiny_backbone_folder), tiny_tokenizer()) == wanted


@pytest.mark.parametrize("part", ["config", "tokenizer", "weights"])
def test_each_part_notices_what_it_is_of(part: str) -> None:
    before = fingerprint(tiny_model(), tiny_tokenizer())
    model, tokenizer = tiny_model(), tiny_tokenizer()
    if part == "config":
        model.config.rms_norm_eps = 1e-3
    elif part == "tokenizer":
        tokenizer.add_tokens(["more"])
    else:
        model.base_model.layers[2].mlp.down_proj.weight.data *= 1.01
    after = fingerprint(model, tokenizer)
    assert [name for name in ("config", "tokenizer", "weights") if getattr(before, name) != getattr(after, name)] == [part]
    assert after.is_variant_of(before) == (part == "weights")
    assert not before.is_variant_of(before)


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


def test_a_variant_is_named(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SHINE fetches as a quantised GGUF is a variant by name, in config.json and in the refusal of other weights."""
    assert zoo.variant_name("smollm2-135m", Backbone(tiny_model())) == "Q4_1, dequantised"
    assert zoo.variant_name("elsewhere", Backbone(tiny_model())) is None
    held = tiny_model()
    held.config.quantization_config = {"quant_method": "fp8"}
    assert zoo.variant_name("elsewhere", Backbone(held)) == "quantised: fp8"

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
