"""Hypernetworks on disk: ours and the released layout, and every way in which a directory can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shine.checkpoint
from shine.backbone import TARGETS, Backbone
from shine.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    load_hypernetwork,
    read_info,
    read_weights,
    save_hypernetwork,
)
from shine.cli.main import main
from shine.config import BackboneConfig, HypernetworkConfig, M2PConfig, TaskTokens
from shine.files import written_beside
from shine.hypernetwork import Hypernetwork
from shine.released import read_released, write_released
from shine.zoo import HYPERNETWORKS

FIXTURE = Path(__file__).parent / "fixtures" / "tiny_qwen3"
RELEASED = ("mem_tokens.pt", "metanetwork.pth", "metalora.pth")
CONFIG = tiny_hypernetwork_config(layout="lr", m2p=M2PConfig(layers=2, heads=4, feed_forward=48, layers_first=False))
INFO = CheckpointInfo(
    backbone=BackboneConfig(path="models/tiny", dtype="float32", task_tokens=TaskTokens("<a>", "<b>", "<c>")),
    hypernetwork=CONFIG,
    stages=("pretrain", "mqa"),
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny_model())


@pytest.fixture(scope="module")
def hypernetwork(backbone: Backbone) -> Hypernetwork:
    """No value left as it is initialised."""
    torch.manual_seed(3)
    hypernetwork = Hypernetwork(CONFIG, backbone)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.normal_()
    return hypernetwork


@pytest.fixture
def saved(tmp_path: Path, hypernetwork: Hypernetwork) -> Path:
    save_hypernetwork(tmp_path / "final", hypernetwork.state_dict(), INFO)
    return tmp_path / "final"


def released(folder: Path) -> Path:
    """A directory with the three published files."""
    shutil.copytree(FIXTURE / "reference_checkpoint", folder)
    return folder


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


# --- round trip ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_exactly(saved: Path, hypernetwork: Hypernetwork) -> None:
    # Another backbone object, another seed: nothing may come from anywhere but the directory.
    other = Backbone(tiny_model())
    torch.manual_seed(99)
    loaded = load_hypernetwork(saved, other)
    state = hypernetwork.state_dict()
    assert set(loaded.state_dict()) == set(state)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.dtype == torch.float32
    assert loaded.config == CONFIG
    context = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        for (path, (a, b)), (wanted_a, wanted_b) in zip(
            loaded(other, context, None).items(), hypernetwork(other, context, None).values(), strict=True
        ):
            assert torch.equal(a, wanted_a), path
            assert torch.equal(b, wanted_b), path


def test_the_directory_says_what_it_is(saved: Path) -> None:
    assert read_info(saved) == INFO
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "hypernetwork.safetensors"]


def test_the_configuration_given_beside_a_directory_of_ours_is_not_needed_and_not_used(saved: Path, backbone: Backbone) -> None:
    assert load_hypernetwork(saved, backbone, config=HypernetworkConfig()).config == CONFIG


def test_a_loaded_hypernetwork_can_be_trained(saved: Path, backbone: Backbone) -> None:
    assert all(parameter.requires_grad for parameter in load_hypernetwork(saved, backbone).parameters())


def test_weights_can_be_stored_in_a_smaller_type(tmp_path: Path, hypernetwork: Hypernetwork, backbone: Backbone) -> None:
    save_hypernetwork(tmp_path, hypernetwork.state_dict(), INFO, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "hypernetwork.safetensors").values()} == {torch.bfloat16}
    loaded = load_hypernetwork(tmp_path, backbone).state_dict()
    for name, tensor in hypernetwork.state_dict().items():
        assert torch.equal(loaded[name], tensor.bfloat16().float())
    # The one that was saved is as it was.
    assert all(tensor.dtype == torch.float32 for tensor in hypernetwork.state_dict().values())


def test_what_was_measured_keeps_its_type(tmp_path: Path, backbone: Backbone) -> None:
    """The mean of the memory states is large against what tells them apart: rounded, it would be noise."""
    config = replace(CONFIG, m2p=replace(CONFIG.m2p, standardise=True))
    weights = Hypernetwork(config, backbone).state_dict()
    weights["m2p.standard.mean"] += 1.001
    save_hypernetwork(tmp_path, weights, replace(INFO, hypernetwork=config), dtype=torch.bfloat16)
    kept = load_file(tmp_path / "hypernetwork.safetensors")
    measured = {name for name, tensor in kept.items() if tensor.dtype == torch.float32}
    assert measured == {"m2p.standard.mean", "m2p.standard.gain"}
    assert torch.equal(load_hypernetwork(tmp_path, backbone).state_dict()["m2p.standard.mean"], weights["m2p.standard.mean"])


def test_the_configuration_is_written_last(tmp_path: Path, hypernetwork: Hypernetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save_file(dict(list(tensors.items())[:2]), file)
        raise OSError("no space left on device")

    monkeypatch.setattr(shine.checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_hypernetwork(tmp_path / "final", hypernetwork.state_dict(), INFO)
    assert not (tmp_path / "final" / "config.json").exists()
    with pytest.raises(ValueError, match="holds neither"):
        find_checkpoint(tmp_path / "final")


def test_a_shipped_name_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of that name lies beside; ``./name`` means the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu-world").mkdir()
    assert find_checkpoint("cpu-world") == HYPERNETWORKS["cpu-world"]
    info = read_info("cpu-world")
    assert info is not None
    assert info.backbone.path == "cpu-world"
    with pytest.raises(ValueError, match="holds neither"):
        find_checkpoint("./cpu-world")


# --- finding ---------------------------------------------------------------------------------------------------------------


def checkpoint_folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["step-20", "step-100", "step-3"], "step-100"),
        (["step-20", "final"], "final"),
        (["checkpoint-epoch-1", "checkpoint-epoch-2"], "checkpoint-epoch-2"),
        (["checkpoint-epoch-9", "checkpoint-epoch-10"], "checkpoint-epoch-10"),
        (["only"], "only"),
        (["step-20", "backup"], "step-20"),
        (["step-20", "backup2"], "step-20"),
        (["v2"], "v2"),
    ],
)
def test_the_newest_checkpoint_inside_a_folder_is_found(tmp_path: Path, names: list[str], chosen: str) -> None:
    checkpoint_folders(tmp_path, *names)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    assert find_checkpoint(tmp_path) == tmp_path / chosen
    assert find_checkpoint(str(tmp_path)) == tmp_path / chosen


def test_a_checkpoint_is_found_at_its_own_path(tmp_path: Path) -> None:
    checkpoint_folders(tmp_path, "run/step-1", "run/final")
    assert find_checkpoint(tmp_path / "run" / "step-1") == tmp_path / "run" / "step-1"


def test_folders_without_a_checkpoint_are_passed_over(tmp_path: Path) -> None:
    checkpoint_folders(tmp_path, "step-5")
    (tmp_path / "final").mkdir()
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-7" / "hypernetwork.safetensors").write_text("")
    assert find_checkpoint(tmp_path) == tmp_path / "step-5"


def test_what_a_killed_run_left_half_written_is_never_taken(tmp_path: Path) -> None:
    with written_beside(tmp_path / "step-9") as folder:
        left = folder.name
    (tmp_path / "step-9").rmdir()
    checkpoint_folders(tmp_path, left)
    with pytest.raises(ValueError, match="holds neither"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("stage", ["pretrain/checkpoint-epoch-1", "iftpwc/checkpoint-epoch-2", "train/checkpoint-epoch-1"])
def test_a_released_directory_is_found_and_loads_from_itself_and_from_its_parent(tmp_path: Path, stage: str) -> None:
    directory = released(tmp_path / stage)
    meta = json.loads((FIXTURE / "meta.json").read_text())
    config = HypernetworkConfig(
        rank=meta["lora_r"],
        meta_rank=meta["metalora_r"],
        scale=meta["scale"],
        m2p=M2PConfig(layers=meta["m2p_layers"], heads=meta["m2p_heads"], feed_forward=meta["m2p_ffn"]),
    )
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(FIXTURE / "backbone", dtype=torch.float32))
    memory = torch.load(directory / "mem_tokens.pt", weights_only=True)
    for path in (directory, directory.parent):
        assert find_checkpoint(path) == directory
        assert read_info(path) is None
        loaded = load_hypernetwork(path, backbone, config=config)
        assert torch.equal(loaded.memory_tokens, memory)
        assert loaded.memory_tokens.requires_grad
        with pytest.raises(ValueError, match=r"checkpoint-epoch-\d: a released checkpoint has no configuration.*experiment"):
            load_hypernetwork(path, backbone)


# --- what is wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [find_checkpoint, read_info, lambda path: load_hypernetwork(path, Backbone(tiny_model()))])
def test_a_missing_directory_is_named_never_replaced_by_random_weights(tmp_path: Path, call: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path / 'absent'}: no such checkpoint directory"):
        call(tmp_path / "absent")


@pytest.mark.parametrize("missing", RELEASED)
def test_a_directory_without_the_files_says_what_it_looked_for(tmp_path: Path, missing: str) -> None:
    directory = released(tmp_path / "x")
    (directory / missing).unlink()
    with pytest.raises(ValueError, match=f"{directory}: holds neither config.json nor {', '.join(RELEASED)}"):
        find_checkpoint(directory)


def test_a_folder_of_stages_names_them(tmp_path: Path) -> None:
    for stage in ("pretrain/checkpoint-epoch-1", "train/checkpoint-epoch-1"):
        released(tmp_path / "mine" / stage)
    with pytest.raises(ValueError, match=f"name one of {tmp_path / 'mine' / 'pretrain'}, {tmp_path / 'mine' / 'train'}$"):
        find_checkpoint(tmp_path / "mine")


def test_missing_weights_are_named(saved: Path, backbone: Backbone) -> None:
    (saved / "hypernetwork.safetensors").unlink()
    with pytest.raises(ValueError, match=str(saved / "hypernetwork.safetensors")):
        load_hypernetwork(saved, backbone)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_damaged_weights_are_named(saved: Path, backbone: Backbone, damage: str) -> None:
    file = saved / "hypernetwork.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "other": b"<html>404</html>" * 10}[damage])
    with pytest.raises(ValueError, match=f"{file}: cannot be read"):
        load_hypernetwork(saved, backbone)


def test_a_newer_format_says_upgrade(saved: Path, backbone: Backbone) -> None:
    edit_config(saved, lambda values: values.update(format=3))
    with pytest.raises(ValueError, match=r"config\.json: format 3.*reads 2.*upgrade"):
        load_hypernetwork(saved, backbone)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', b"\xff\xfe{}"])
def test_an_unreadable_configuration_is_named(saved: Path, text: str | bytes) -> None:
    (saved / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=str(saved / "config.json")):
        read_info(saved)


@pytest.mark.parametrize(
    ("change", "about"),
    [
        (lambda values: values.pop("hypernetwork"), "hypernetwork"),
        (lambda values: values.pop("stages"), "stages"),
        (lambda values: values["hypernetwork"].update(rnk=3), "hypernetwork.rnk: unknown key; did you mean rank"),
        (lambda values: values["hypernetwork"].update(layout="xy"), "hypernetwork.layout"),
        (lambda values: values["backbone"].pop("path"), "backbone.path: missing"),
    ],
)
def test_a_configuration_that_does_not_hold_is_named_with_the_key(
    saved: Path, change: Callable[[dict[str, Any]], object], about: str
) -> None:
    edit_config(saved, change)
    with pytest.raises(ValueError, match=str(saved / "config.json")) as error:
        read_info(saved)
    assert about in str(error.value)


def test_tensors_that_do_not_fit_are_all_told_with_both_shapes(saved: Path, backbone: Backbone) -> None:
    tensors = load_file(saved / "hypernetwork.safetensors")
    del tensors["m2p.layer_embedding"]
    tensors["m2p.odd"] = torch.zeros(2, 5)
    tensors["memory_tokens"] = torch.zeros(3, 32)
    save_file(tensors, saved / "hypernetwork.safetensors")
    with pytest.raises(ValueError, match=f"{saved} does not fit") as error:
        load_hypernetwork(saved, backbone)
    # Values of a layer at rank 2: q and o (32 + 32), k and v (32 + 16), gate, up and down (32 + 64).
    tokens = -(-2 * (2 * 64 + 2 * 48 + 3 * 96) // 32)
    assert "m2p.layer_embedding: is missing, expected [3, 32]" in str(error.value)
    assert "m2p.odd: unexpected tensor [2, 5]" in str(error.value)
    assert f"memory_tokens: has shape [3, 32], expected [{tokens}, 32]" in str(error.value)


@pytest.mark.parametrize(
    "targets",
    [
        TARGETS[:3],
        # As many, of the same shapes, in another order: only the names can tell.
        ("o_proj", "k_proj", "v_proj", "q_proj", "gate_proj", "up_proj", "down_proj"),
    ],
)
def test_a_backbone_hooked_for_other_targets_is_refused(saved: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"targets|does not fit"):
        load_hypernetwork(saved, Backbone(tiny_model(), targets=targets))


# --- released files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("damage", ["truncated", "empty", "html", "lfs", "hello"])
def test_a_damaged_released_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    file = released(tmp_path / "x") / name
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "html": b"<!doctype html><title>404</title>",
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "hello": b"hello world",
        }[damage]
    )
    with pytest.raises(ValueError, match=f"{file}: not a file of plain weights"):
        read_released(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mem_tokens.pt", {"weight": torch.zeros(2)}),
        ("mem_tokens.pt", [1, 2]),
        ("metanetwork.pth", torch.zeros(3)),
        ("metanetwork.pth", {"layer_pe": 3}),
        ("metalora.pth", torch.zeros(3)),
        ("metalora.pth", {0: {"attention": {}}}),
        ("metalora.pth", {0: torch.zeros(1)}),
    ],
)
def test_a_released_file_that_holds_something_else_is_named(tmp_path: Path, name: str, content: object) -> None:
    file = released(tmp_path / "x") / name
    torch.save(content, file)
    with pytest.raises(ValueError, match=str(file)):
        read_released(tmp_path / "x")


class Attack:
    """Unpickled without care, it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("container", ["pickle", "torch"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path, name: str, container: str) -> None:
    directory = released(tmp_path / "x")
    pickle.loads(pickle.dumps(Attack(tmp_path / "the attack works")))
    assert (tmp_path / "the attack works").exists()
    attack = {"layer_pe": Attack(tmp_path / "harm")}
    if container == "pickle":
        (directory / name).write_bytes(pickle.dumps(attack))
    else:
        torch.save(attack, directory / name)
    with pytest.raises(ValueError, match=f"{directory / name}: not a file of plain weights"):
        read_released(directory)
    assert not (tmp_path / "harm").exists()


def test_the_info_of_another_stage_is_told_apart(tmp_path: Path, hypernetwork: Hypernetwork) -> None:
    for stages in ((), ("pretrain",)):
        info = replace(INFO, stages=stages)
        save_hypernetwork(tmp_path, hypernetwork.state_dict(), info)
        assert read_info(tmp_path) == info


def test_a_checkpoint_of_ours_can_leave_in_the_published_format(tmp_path: Path, backbone: Backbone) -> None:
    """Exactly: the same tensors come back, in files laid out as the released ones are."""
    theirs = Path(__file__).parent / "fixtures" / "tiny_qwen3" / "reference_checkpoint"
    write_released(tmp_path / "again", read_released(theirs))
    for name in RELEASED:
        first, second = (torch.load(folder / name, weights_only=True) for folder in (theirs, tmp_path / "again"))
        assert flat(first).keys() == flat(second).keys()
        for key, value in flat(first).items():
            assert torch.equal(value, flat(second)[key]) if isinstance(value, torch.Tensor) else value is flat(second)[key]
    hypernetwork = Hypernetwork(CONFIG, backbone)
    write_released(tmp_path / "ours", hypernetwork.state_dict())
    loaded = load_hypernetwork(tmp_path / "ours", backbone, config=CONFIG)
    for name, tensor in hypernetwork.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {key: value for name, inner in content.items() for key, value in flat(inner, f"{prefix}.{name!r}").items()}


def test_the_published_format_has_no_place_for_other_linears(tmp_path: Path) -> None:
    backbone = Backbone(tiny_model(), targets=("q_proj", "v_proj"))
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(targets=("q_proj", "v_proj")), backbone)
    with pytest.raises(ValueError, match="has all seven linears"):
        write_released(tmp_path / "x", hypernetwork.state_dict())
    assert not (tmp_path / "x").exists()


def test_the_published_format_has_no_place_for_standardised_states(tmp_path: Path) -> None:
    shape = tiny_hypernetwork_config(m2p=M2PConfig(layers=2, heads=2, standardise=True))
    hypernetwork = Hypernetwork(shape, Backbone(tiny_model(), targets=shape.targets))
    with pytest.raises(ValueError, match="no place for"):
        write_released(tmp_path / "x", hypernetwork.state_dict())
    assert not (tmp_path / "x").exists()


def test_the_command_writes_the_published_format(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["release", str(saved), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    ours = read_weights(saved)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in read_released(tmp_path / "out").items())
    assert main(["release", str(saved), str(tmp_path / "out")]) == 2
    assert "mem_tokens.pt is there already; name another folder" in capsys.readouterr().err


def test_a_checkpoint_is_not_released_over_itself(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    assert main(["release", str(saved), str(saved)]) == 2
    assert f"{saved}: holds a checkpoint of ours, which these files would hide; name another folder" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert main(["release", str(saved), str(tmp_path / "notes")]) == 2
    assert "holds something else (mine.txt)" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["mine.txt"]
