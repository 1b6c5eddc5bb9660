"""The device that is meant, how fast it is, and the type that a backbone is held in there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model
from processes import Fault, run_ranks
from runs import losses_of, stage_config, train_config
from test_evaluation import evaluation_config, write_examples
from test_ranks import go_back_to_a_save

from shine import devices, loading
from shine.backbone import TARGETS, Backbone
from shine.checkpoint import CheckpointInfo, read_info, save_hypernetwork
from shine.config import BackboneConfig
from shine.devices import find_device, matrix_rate, slow_at_bfloat16
from shine.evaluation.run import evaluate
from shine.hypernetwork import Hypernetwork
from shine.model import Shine
from shine.training.stage import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_anew() -> Iterator[None]:
    slow_at_bfloat16.cache_clear()
    yield
    slow_at_bfloat16.cache_clear()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device 0, there are 0"):
        find_device("cuda")
    with pytest.raises(ValueError, match="set it to auto, cpu, cuda"):
        find_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)


def test_the_matrix_rate_is_that_of_this_machine() -> None:
    state = torch.get_rng_state()
    assert 1e8 < matrix_rate(torch.device("cpu"), torch.float32, seconds=0.05) < 1e14
    assert torch.equal(state, torch.get_rng_state())


def test_a_cpu_is_slow_at_bfloat16_where_its_matrix_rates_say_so() -> None:
    """On either kind of machine; between them, where float32 is hardly faster, either answer is right."""
    gain = matrix_rate(CPU, torch.float32, seconds=0.05) / matrix_rate(CPU, torch.bfloat16, seconds=0.05)
    state = torch.get_rng_state()
    found = slow_at_bfloat16(CPU)
    assert torch.equal(state, torch.get_rng_state())
    assert found or gain < 3
    assert not found or gain > 0.75


def test_each_gpu_says_whether_it_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4, a V100, an A100, a GeForce 40; a GPU of AMD's does."""
    found = [(7, 5), (7, 0), (8, 0), (8, 9)]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device.index])
    assert [slow_at_bfloat16(torch.device("cuda", index)) for index in range(4)] == [True, True, False, False]
    slow_at_bfloat16.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not slow_at_bfloat16(torch.device("cuda", 0))


def test_what_is_slow_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(10_000))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(times))
    assert not slow_at_bfloat16(CPU)
    taken = next(times)
    assert not slow_at_bfloat16(CPU)
    assert next(times) == taken + 1


def pretend(monkeypatch: pytest.MonkeyPatch, *, slow: bool, memory: int = 1 << 40) -> None:
    monkeypatch.setattr(loading, "slow_at_bfloat16", lambda device: slow)
    monkeypatch.setattr(loading, "room", lambda device, *, ranks: memory // ranks)


@pytest.mark.parametrize(
    ("asked", "slow", "share", "held"),
    [
        ("auto", False, 1.0, "bfloat16"),
        ("auto", True, 1.0, "float32"),
        ("auto", True, 0.99, "bfloat16"),
        ("bfloat16", True, 1.0, "bfloat16"),
        ("float32", False, 0.0, "float32"),
        ("float64", True, 0.0, "float64"),
    ],
)
def test_a_backbone_is_held_in_the_type_that_its_device_is_good_at(
    asked: str, slow: bool, share: float, held: str, tiny_backbone_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 only where that takes up to half of a rank's memory: ``share`` is of what it would have to be."""
    weights = sum(parameter.numel() for parameter in tiny_model().parameters()) * 4
    pretend(monkeypatch, slow=slow, memory=int(2 * weights * share))
    config = BackboneConfig(path=tiny_backbone_folder, dtype=asked, device="cpu")  # type: ignore[arg-type]
    backbone, _ = loading.load_backbone(config, targets=TARGETS)
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {getattr(torch, held)}
    pretend(monkeypatch, slow=slow, memory=int(2 * weights * share) * 3)
    assert loading.with_dtype(config, ranks=3).dtype == held


def test_a_folder_without_a_model_is_named_by_who_asks_for_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, slow=True)
    with pytest.raises(ValueError, match=r"cannot load backbone .*config\.json.* belong there"):
        loading.with_dtype(BackboneConfig(path=str(tmp_path), device="cpu"))


def test_weights_may_wait_in_host_memory_for_the_device_that_they_are_loaded_for(
    tiny_backbone_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their type and the attention are the device's, not those of the place where they wait."""
    monkeypatch.setattr(loading, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(loading, "slow_at_bfloat16", lambda device: device.type == "cpu")
    config = BackboneConfig(path=tiny_backbone_folder)
    backbone, _ = loading.load_backbone(config, targets=TARGETS, in_host_memory=True)
    assert (backbone.dtype, backbone.device) == (torch.bfloat16, CPU)
    assert backbone.model.config._attn_implementation == "fused"


@pytest.mark.parametrize(("trained", "held"), [("bfloat16", "float32"), ("auto", "float32"), ("float64", "float64")])
def test_a_checkpoint_comes_back_in_a_type_that_the_device_is_good_at(
    trained: str, held: str, tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only bfloat16 gives way, and only where it is recorded: what is asked for stays."""
    pretend(monkeypatch, slow=True)
    config = BackboneConfig(path=tiny_backbone_folder, dtype=trained, device="cpu")  # type: ignore[arg-type]
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), Backbone(tiny_model()))
    save_hypernetwork(tmp_path / "final", hypernetwork.state_dict(), CheckpointInfo(config, hypernetwork.config))
    assert Shine.from_pretrained(tmp_path, device="cpu").backbone.dtype == getattr(torch, held)
    rounded = Shine.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    assert rounded.backbone.dtype == torch.bfloat16
    assert Shine.from_pretrained(tmp_path, backbone=rounded.config, device="cpu").backbone.dtype == torch.bfloat16


def test_predictions_in_one_type_are_not_gone_on_with_in_another(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_examples(tmp_path / "mine.jsonl")
    config = evaluation_config(tiny_backbone_folder, tmp_path, methods=("only_question",))
    config = replace(config, backbone=replace(config.backbone, dtype="auto"))
    pretend(monkeypatch, slow=False)
    assert evaluate(config)["config"]["backbone"]["dtype"] == "bfloat16"
    pretend(monkeypatch, slow=True)
    assert evaluate(config)["config"]["backbone"]["dtype"] == "float32"
    assert "begins again" in capsys.readouterr().out


def test_a_run_says_and_records_its_type_and_goes_on_in_no_other(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=4, save_every=2))
    config = replace(config, backbone=replace(config.backbone, dtype="auto"))
    pretend(monkeypatch, slow=True)
    final = train(config)
    assert "frozen in float32" in capsys.readouterr().out
    info = read_info(final)
    assert info is not None
    assert info.backbone.dtype == "float32"
    go_back_to_a_save(tmp_path, step=2)
    resumed = replace(config, resume="latest")
    pretend(monkeypatch, slow=False)
    with pytest.raises(ValueError, match=r"backbone\.dtype: 'float32' -> 'bfloat16'"):
        train(resumed)
    # As it was computed, on whichever machine.
    train(replace(resumed, backbone=replace(config.backbone, dtype="float32")))
    assert len(losses_of(tmp_path)) == 4


def test_the_first_rank_decides_for_all(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Of two machines that are good at different types."""
    config = BackboneConfig(path=tiny_backbone_folder, device="cpu")
    stage = stage_config(micro_batch_size=1, steps=2)
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "run", fault=Fault("speed"), backbone=config, stage=stage) == [0, 0]
    expected = loading.with_dtype(config).dtype
    for rank in range(2):
        assert f"frozen in {expected}" in (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
