"""Small training runs that several tests share."""

from __future__ import annotations

import json
import platform
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from conftest import tiny_hypernetwork_config, tiny_tokenizer

from shine.config import BackboneConfig, DataConfig, SourceConfig, StageConfig, TrainConfig
from shine.data.build import samples_of
from shine.data.samples import Sample
from shine.data.sources import read_source
from shine.training.monitor import METRICS_FILE

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
WORLDS = SourceConfig(kind="worlds", options={"count": 60, "seed": 5})


def stage_config(name: str = "mqa", **changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": name,
        "context_length": 200,
        "conversation_length": 300,
        "learning_rate": 5e-3,
        "warmup_steps": 3,
        "steps": 20,
        "batch_size": 4,
        "micro_batch_size": 2,
        "log_every": 1,
    }
    return StageConfig(**{**values, **changes})


def train_config(folder: str, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "backbone": BackboneConfig(path=folder, dtype="float32", device="cpu"),
        "hypernetwork": tiny_hypernetwork_config(),
        "stage": stage_config(),
        "data": DataConfig(train={"worlds": WORLDS}, validation={"worlds": replace(WORLDS, options={"count": 8, "seed": 6})}),
        "output": str(output),
        "from_scratch": True,
        "seed": 1,
    }
    return TrainConfig(**{**values, **changes})


def stage_samples(name: str, count: int) -> list[Sample]:
    config = stage_config(name)
    samples = samples_of(read_source(WORLDS), tiny_tokenizer(), config, task_tokens=BackboneConfig(path="x").task_tokens, seed=0)
    found = [samples.sample(index, epoch=0) for index in range(count)]
    return [sample for sample in found if sample is not None]


def run_program(name: str, *arguments: str | Path) -> int:
    """The exit code of a program of the clone, such as ``train.py``, run in this process, where the large libraries are already
    loaded.
    """
    program = ROOT / name
    with mock.patch.object(sys, "argv", [str(program), *map(str, arguments)]):
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def losses_of(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def cpu_name() -> str:
    """The processor's own name where the system tells it: two with the same instructions may still sum in another order."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def fingerprint() -> dict[str, str]:
    """What exact equality of floating-point sums depends on."""
    return {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {cpu_name()}",
    }
