"""A dry run: the whole of an experiment, once through, on a tiny backbone."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from shine.checkpoint import effective_config, find_checkpoint, read_info, read_weights
from shine.config import DataConfig, SourceConfig, TrainConfig
from shine.training.start import find_stage
from shine.training.state import find_resume
from shine.zoo import ASSETS

ROWS = 64
"""How many contexts of each source a dry run reads."""


def check_start(config: TrainConfig) -> None:
    """Make sure that what a run would start from is there and can be read, which a dry run, on another backbone, does not load.

    Raises:
        ValueError: it is not, or belongs to other task tokens.
    """
    if config.resume not in (None, "auto", "latest"):
        find_resume(str(config.resume), Path(config.output).expanduser(), say=print)
    if config.checkpoint is None:
        return
    directory = find_stage(config.checkpoint)
    read_weights(directory)
    info = read_info(directory)
    if info is not None and info.backbone.task_tokens != config.backbone.task_tokens:
        raise ValueError(
            f"{directory} was trained with other backbone.task_tokens, {info.backbone.task_tokens}: set them as they were"
        )


@contextmanager
def rehearsal(config: TrainConfig, *, ranks: int, say: Callable[[str], None]) -> Iterator[TrainConfig]:
    """The configuration of a dry run, and a folder for it that is gone afterwards.

    Everything is as configured, and as the checkpoint to start from is shaped, but the backbone (two layers, H 128, wide enough for
    ranks up to 128), the number of samples and steps, and sources that are not on this machine, for which invented worlds stand in.
    """
    start = None if config.checkpoint is None else find_checkpoint(config.checkpoint)
    with tempfile.TemporaryDirectory(prefix="shine-dry-run-") as folder, _cache_in(folder):
        stage = replace(
            config.stage,
            steps=1,
            batch_size=2 * ranks * config.stage.micro_batch_size,
            evaluate_every=1,
            evaluation_batches=1,
            save_every=0,
            log_every=1,
        )
        yield replace(
            config,
            dry_run=False,
            evaluate_at_end=False,
            backbone=replace(config.backbone, path=_tiny_backbone(Path(folder) / "backbone")),
            hypernetwork=effective_config(start, config.hypernetwork),
            stage=stage,
            data=_rehearsed(config.data, say),
            checkpoint=None,
            from_scratch=True,
            resume=None,
            output=str(Path(folder) / "run"),
        )


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """What is made for good elsewhere goes with this folder."""
    before = os.environ.get("SHINE_CACHE")
    os.environ["SHINE_CACHE"] = str(Path(folder) / "cache")
    try:
        yield
    finally:
        os.environ.pop("SHINE_CACHE")
        if before is not None:
            os.environ["SHINE_CACHE"] = before


def _tiny_backbone(folder: Path) -> str:
    """Random weights behind the tokenizer of the CPU world, with rows to spare for any task tokens."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
    )
    # Not the model's own save_pretrained, which writes on one rank alone.
    shape.save_pretrained(folder)
    save_file(Qwen3ForCausalLM(shape).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    for file in (ASSETS / "cpu-world" / "backbone").glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


def _rehearsed(data: DataConfig, say: Callable[[str], None]) -> DataConfig:
    """A few contexts of each source that is here, and as many invented ones for each that is not, which one line names."""
    missing: list[str] = []

    def few(role: str, sources: Mapping[str, SourceConfig]) -> dict[str, SourceConfig]:
        found = {}
        for number, (name, source) in enumerate(sources.items()):
            if source.path is not None and not Path(source.path).expanduser().exists():
                missing.append(f"{role}.{name} ({source.path})")
                source = SourceConfig(kind="worlds", options={"count": ROWS, "seed": number})
            found[name] = replace(source, limit=min(source.limit or ROWS, ROWS))
        return found

    rehearsed = DataConfig(train=few("data.train", data.train), validation=few("data.validation", data.validation))
    if missing:
        say(f"dry run: not on this machine, so that invented worlds stand in: {', '.join(missing)}")
    return rehearsed
