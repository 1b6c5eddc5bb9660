"""Adapters that the real PEFT reads: same logits, same greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model, tiny_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shine.backbone import Backbone
from shine.export.peft import write_merged, write_peft
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA

KINDS = ("llama", "qwen2", "qwen3")
IDS = torch.tensor([[9, 40, 77, 120, 33, 250, 61]])


def generated(backbone: Backbone, *, count: int = 1, seed: int = 1, rank: int = 2) -> LoRA:
    """What an untrained hypernetwork makes of random contexts, made strong enough to change what is said."""
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(rank=rank, scale=0.02), backbone)
    with torch.no_grad():
        return hypernetwork(backbone, torch.randint(6, 260, (count, 12)), None)


def ours(backbone: Backbone, lora: LoRA | None) -> tuple[torch.Tensor, list[int]]:
    tokens = backbone.generate(IDS, torch.ones_like(IDS), lora=lora, max_new_tokens=12, stop_ids=None, pad_id=0)
    with torch.no_grad():
        return backbone.logits(backbone.hidden(IDS, None, lora=lora)), tokens[0].tolist()


@torch.no_grad()
def theirs(model: PeftModel | PreTrainedModel) -> tuple[torch.Tensor, list[int]]:
    """Of an ordinary model: its own forward pass, its own generate."""
    tokens = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    return model(input_ids=IDS).logits, tokens[0, IDS.shape[1] :].tolist()


def on_disk(kind: str, folder: Path, **options: torch.dtype) -> Path:
    tiny_model(kind, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_peft_says_the_same(kind: str, tmp_path: Path) -> None:
    base = on_disk(kind, tmp_path / "base")
    backbone = Backbone(tiny_model(kind))
    lora = generated(backbone)
    logits, tokens = ours(backbone, lora)
    plain, plain_tokens = ours(backbone, None)
    assert (logits - plain).abs().max() > 0.1
    assert tokens != plain_tokens
    folder = write_peft(lora, tmp_path / "adapter", backbone=str(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    found, found_tokens = theirs(model)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
    assert found_tokens == tokens
    with model.disable_adapter():
        torch.testing.assert_close(theirs(model)[0], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_several_contexts_into_several_adapters_scaled_and_joined(kind: str, tmp_path: Path) -> None:
    base = on_disk(kind, tmp_path / "base")
    backbone = Backbone(tiny_model(kind))
    batch = generated(backbone, count=2)
    one, two = batch.select([0]), batch.select([1])
    adapters = {"one": one, "two": two, "weak": one.scale(0.3), "joined": LoRA.concat([one, two.scale(0.5)])}
    model = None
    for name, lora in adapters.items():
        folder = write_peft(lora, tmp_path / name, backbone=str(base))
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == (4 if name == "joined" else 2)
        if model is None:
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, adapter_name=name).eval()
        else:
            model.load_adapter(folder, adapter_name=name)
    assert model is not None
    for name, lora in adapters.items():
        model.set_adapter(name)
        logits, tokens = ours(backbone, lora)
        found, found_tokens = theirs(model)
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
        assert found_tokens == tokens, name


def test_in_float64_nothing_is_left_between_the_two(tmp_path: Path) -> None:
    """So that what is left in float32 is rounding."""
    base = on_disk("llama", tmp_path / "base", dtype=torch.float64)
    backbone = Backbone(tiny_model("llama", dtype=torch.float64))
    batch = generated(backbone, count=2)
    lora = LoRA.concat([batch.select([0]), batch.select([1]).scale(-2.0)])
    folder = write_peft(lora, tmp_path / "adapter", backbone=str(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), folder).eval()
    torch.testing.assert_close(theirs(model)[0], ours(backbone, lora)[0], atol=1e-12, rtol=0)


def test_bfloat16_is_stored_where_it_is_asked_for(tmp_path: Path) -> None:
    backbone = Backbone(tiny_model(dtype=torch.bfloat16))
    lora = generated(backbone)
    base = on_disk("qwen3", tmp_path / "base", dtype=torch.bfloat16)
    folder = write_peft(lora, tmp_path / "a", backbone=str(base), dtype=torch.bfloat16)
    tensors = load_file(folder / "adapter_model.safetensors")
    path = "model.layers.1.self_attn.k_proj"
    assert torch.equal(tensors[f"base_model.model.{path}.lora_A.weight"], lora[path][0][0].T.bfloat16())
    assert torch.equal(tensors[f"base_model.model.{path}.lora_B.weight"], lora[path][1][0].T.bfloat16())
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), folder, autocast_adapter_dtype=False
    ).eval()
    torch.testing.assert_close(theirs(model)[0], ours(backbone, lora)[0], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_needs_nothing_but_transformers(kind: str, tmp_path: Path) -> None:
    base = on_disk(kind, tmp_path / "base")
    backbone = Backbone(tiny_model(kind))
    lora = generated(backbone)
    logits, tokens = ours(backbone, lora)
    folder = write_merged(lora, tmp_path / "merged", backbone=str(base))
    found, found_tokens = theirs(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
    assert found_tokens == tokens
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()


def test_nothing_of_the_users_is_written_over(tmp_path: Path) -> None:
    base = on_disk("qwen3", tmp_path / "base")
    lora = generated(Backbone(tiny_model()), count=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for write in (write_peft, write_merged):
        with pytest.raises(ValueError, match=r"holds something else \(thesis\.txt\).*name another folder"):
            write(lora.select([0]), tmp_path / "mine", backbone=str(base))
        with pytest.raises(ValueError, match=r"2 adapters.*lora\.select"):
            write(lora, tmp_path / "new", backbone=str(base))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "new").exists()
    # An earlier export of the same kind gives way.
    for strength in (1.0, 2.0):
        folder = write_peft(lora.select([0]).scale(strength), tmp_path / "new", backbone=str(base))
    path = "model.layers.0.mlp.up_proj"
    wanted = 2 * lora[path][1][0].T
    assert torch.equal(load_file(folder / "adapter_model.safetensors")[f"base_model.model.{path}.lora_B.weight"], wanted)
