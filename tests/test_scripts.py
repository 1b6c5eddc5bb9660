"""The launch scripts, as users run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from shine.checkpoint import read_info
from shine.config import EvaluationConfig, TrainConfig, parse
from shine.training.loop import train

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*/*.sh"))
CALL = re.compile(r'^(train|evaluate) (.*) "\$@"$', re.MULTILINE)


def test_the_published_scripts_are_there() -> None:
    for size in ("0.6B", "1.7B", "8B"):
        for name in (
            "pretrain_group_4layer_8lora_128metalora",
            "meta_train_parallel_ift_pwc_4layer_8lora_128metalora",
            "meta_train_parallel_ift_c1qa_4layer_8lora_128metalora",
        ):
            assert (ROOT / "scripts" / f"Qwen3-{size}" / f"{name}.sh").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_script_is_posix_sh_and_adds_launching_only(script: Path) -> None:
    """dash reads it, its experiment composes for its size, and no value of the recipe stands in it."""
    subprocess.run(["sh", "-n", script], check=True)
    found = CALL.search(script.read_text())
    assert found is not None
    words = found[2].split()
    size = script.parent.name.removeprefix("Qwen3-").lower()
    if found[1] == "train":
        experiment, stage, name = words
        door, overrides = "train", [f"experiment={experiment}", f"stage={stage}", "output=x"]
    else:
        program, experiment, _, name = words
        door, overrides = program.removesuffix(".py"), [f"experiment={experiment}"]
        assert (ROOT / program).exists()
    assert experiment == f"qwen3-{size}"
    assert name == f"Qwen3-{size.upper()}_4layer_8lora_128metalora"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(door, overrides=overrides), resolve=True)
    config = parse(TrainConfig, values) if door == "train" else parse(EvaluationConfig, values)
    assert config.backbone.path == f"models/Qwen3-{size.upper()}"
    assert (config.hypernetwork.rank, config.hypernetwork.meta_rank, config.hypernetwork.m2p.layers) == (8, 128, 4)
    assert "=" not in found[2]


@pytest.mark.slow
def test_three_stages_chain_by_folder_through_the_scripts(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Two ranks under torchrun, then the test beside the last stage, all from a copy of the scripts in a folder of its own."""
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "test.py"):
        shutil.copy(ROOT / name, tmp_path)
    small = [
        "data=worlds",
        "data.train.worlds.options.count=40",
        "data.test.worlds.options.count=3",
        f"backbone.path={tiny_backbone_folder}",
    ]
    small += ["backbone.dtype=float32", "backbone.device=cpu", "hypernetwork.rank=2", "hypernetwork.meta_rank=4"]
    steps = ["data.validation.worlds.options.count=4", "stage.steps=2", "stage.batch_size=4", "stage.evaluate_every=0"]
    environment = {**os.environ, "GPUS": "2", "OMP_NUM_THREADS": "1", "NAME": "mine", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    folder = tmp_path / "scripts" / "Qwen3-8B"
    for script in ("pretrain_group", "meta_train_parallel_ift_pwc", "meta_train_parallel_ift_c1qa"):
        command = ["sh", str(folder / f"{script}_4layer_8lora_128metalora.sh"), *small, *steps]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
    info = read_info(tmp_path / "checkpoints" / "mine" / "train")
    assert info is not None
    assert info.stages == ("pretrain", "mqa", "1qa")
    run = subprocess.run(
        ["sh", str(folder / "test.sh"), *small, "max_new_tokens=4"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "checkpoints" / "mine" / "train" / "test" / "summary.json").exists()


@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
@pytest.mark.parametrize("experiment", sorted(file.stem for file in (ROOT / "configs" / "experiment").glob("*.yaml")))
def test_every_experiment_goes_once_through(
    experiment: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its own ranks, lengths and recipe; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = [f"experiment={experiment}", f"stage={stage}", "output=out", "dry_run=true", "backbone.device=cpu"]
        values: Any = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)
    config = parse(TrainConfig, values)
    train(config)
    said = capsys.readouterr().out
    assert "dry run: everything fits together, one step was done" in said
    assert f"{stage} backbone 1/1  loss" in said
    assert "validation/adapter_effective_rank" in said
    assert ("invented worlds stand in" in said) == (experiment != "cpu_world")
    assert list(tmp_path.iterdir()) == []
