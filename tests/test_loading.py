"""Loading a backbone: as configured, whole or not at all, and what it costs in host memory by several ranks of one machine."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from shine.backbone import TARGETS, Backbone
from shine.config import BackboneConfig
from shine.loading import load_backbone


@pytest.fixture
def folder(tiny_backbone_folder: str) -> Path:
    """A model for a test to spoil."""
    return Path(tiny_backbone_folder)


def load(path: Path | str, **options: str) -> tuple[Backbone, PreTrainedTokenizerBase]:
    config = BackboneConfig(path=str(path), dtype="float32", device="cpu", **options)  # type: ignore[arg-type]
    return load_backbone(config, targets=TARGETS)


def test_load_backbone_holds_the_model_as_configured(folder: Path) -> None:
    backbone, tokenizer = load(folder)
    assert (backbone.dtype, backbone.device, backbone.hidden_size) == (torch.float32, torch.device("cpu"), 32)
    assert len(backbone.linear_shapes) == 3
    assert (len(tokenizer), backbone.vocabulary_size) == (262, 320)
    hidden = backbone.hidden(torch.tensor([[1, 40, 41]]), None, lora=None)
    assert hidden.shape == (1, 3, 32)


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings.read_text()).items() if key != "pad_token"}
    settings.write_text(json.dumps(kept))
    assert load(folder)[1].pad_token == "<|endoftext|>"


def test_a_tokenizer_that_cannot_pad_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<|endoftext|>", "<|other|>").replace('"pad_token"', '"no_token"')
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match="neither a pad token nor "):
        load(folder)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def drop_a_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def drop_with_settings(file: Path) -> None:
    file.unlink()
    (file.parent / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("config.json", Path.unlink),
        ("config.json", truncate),
        ("model.safetensors", Path.unlink),
        ("model.safetensors", truncate),
        ("model.safetensors", drop_a_weight),
        ("tokenizer.json", truncate),
        ("tokenizer.json", drop_with_settings),
    ],
)
def test_a_spoilt_folder_is_named_with_the_remedy(folder: Path, name: str, spoil: object) -> None:
    spoil(folder / name)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"cannot load backbone .* belong there: `hf download OWNER/backbone") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_weight_is_never_random(folder: Path) -> None:
    drop_a_weight(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of its weights are missing, model\.layers\.1\.mlp\.up_proj\.weight among them"):
        load(folder)


def test_a_spoilt_cache_says_to_fetch_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHINE_CACHE", str(tmp_path))
    (tmp_path / "smollm2-135m").mkdir()
    with pytest.raises(ValueError, match=f"delete {tmp_path / 'smollm2-135m'} and run `shine fetch smollm2-135m`"):
        load("smollm2-135m")


def test_an_unreachable_hub_id_says_how_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot load backbone owner/name: .*hf download owner/name --local-dir models/name"):
        load("owner/name")


def test_an_attention_that_does_not_exist_points_at_the_key(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"set backbone\.attention=auto"):
        load(folder, attention="no_such_attention")
    with pytest.raises(ValueError, match=r"install what attention 'no_such_attention' needs, or set backbone\.attention=auto"):
        load("cpu-world", attention="no_such_attention")


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more {number}" for number in range(VOCABULARY + 3 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="has 323 tokens and the model's embedding 320 rows: they do not belong"):
        load(folder)


def test_activation_checkpointing_reaches_the_backbone(folder: Path) -> None:
    for wanted in (False, True):
        assert load(folder, activation_checkpointing=wanted)[0].activation_checkpointing == wanted


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ranks_load_one_after_the_other(dtype: str, tmp_path: Path) -> None:
    """Measured from outside, over four ranks: what they do not share (private memory) and what they hold in all (PSS, which counts
    a shared page once over those that share it), both beyond what they held before.

    Weights that are stored in the type of the run are pages of the file, one copy for all ranks, however many. Weights that must
    be converted are a rank's own, once: at no time are there two copies of one. On CUDA either goes to the GPU and is gone.
    """
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=20_000,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=128,
        )
    ).bfloat16()
    size = sum(parameter.numel() for parameter in model.parameters()) * {"bfloat16": 2, "float32": 4}[dtype]
    model.save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    del model
    # Pages of a file that are not on the disk yet would count as those of the process that reads them.
    os.sync()
    script = Path(__file__).parent / "loading_ranks.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script)]
    run = subprocess.run([*launch, str(tmp_path), dtype], timeout=500, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    report = {"model": size, **{what: ranks[0][what] for what in ("private", "pss")}}
    print(json.dumps(report))
    copies = {"bfloat16": 0.25, "float32": 4.25}[dtype]
    assert report["private"] < copies * size
    assert report["pss"] < (1.5 if dtype == "bfloat16" else 4.75) * size
    intervals = sorted((rank["began"], rank["ended"]) for rank in ranks)
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(intervals))
