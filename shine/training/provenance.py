"""Which configuration, code and libraries a run had, and what differs when it goes on with others."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers

import shine
from shine.config import TrainConfig

SILENT = ("allow_changes", "checkpoint", "from_scratch", "resume")
"""Keys that say how a run was started, which a resumed one was in another way."""
FREE = (
    "engine",
    "output",
    "backbone.path",
    "backbone.allow_variant",
    "backbone.device",
    "backbone.activation_checkpointing",
    "backbone.shard",
    "stage.micro_batch_size",
    "stage.pad_to_multiple",
    "stage.evaluate_every",
    "stage.evaluation_batches",
    "stage.save_every",
    "stage.log_every",
    "stage.check_every",
    "stage.keep",
    "data.train.*.path",
    "data.validation*",
    "data.test*",
    "evaluate_at_end",
    "scoring*",
)
"""Keys that may differ when a run is resumed: they leave the result alone (micro-batches and padding up to rounding), or something
else stands for them, as the fingerprint of the samples does for where they lie."""


EARLIER = {"stage.optimizer": "adamw", "stage.conversations_per_context": 1}
"""What runs did that were recorded before there was a choice."""


def run_record(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration with the versions of what it ran on."""
    return {"config": asdict(config), "versions": versions()}


def versions() -> dict[str, str | None]:
    """Versions of code, libraries and Python, and what computes."""
    return {
        "shine": shine.__version__,
        "revision": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
    }


def git_revision() -> str | None:
    """The commit of the code that runs, with ``+changes`` where files differ from it; ``None`` outside a checkout."""
    try:
        code = Path(shine.__file__).resolve().parents[1]
        # Installed into a folder of somebody's repository, the code is not that repository's.
        if not (code / ".git").exists():
            return None
        place = {"cwd": code, "capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **place).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **place).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed.strip() else str(commit)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """How two resolved configurations differ: what leaves the result alone, and what changes it, each as ``key: old -> new``."""
    old, new = {**EARLIER, **dict(_flat(before))}, {**EARLIER, **dict(_flat(now))}
    free: list[str] = []
    binding: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        if key not in SILENT and old.get(key) != new.get(key):
            line = f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            (free if any(fnmatchcase(key, pattern) for pattern in FREE) else binding).append(line)
    return free, binding


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(values, list | tuple):
        yield prefix, list(values)
    else:
        yield prefix, values
