"""Hypernetworks on disk: our directories, and the published three-file ones wherever a checkpoint is asked for.

Ours holds ``config.json`` (written last) and ``hypernetwork.safetensors``. For the others see `shine.released`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import shine
from shine.backbone import Backbone
from shine.config import BackboneConfig, HypernetworkConfig
from shine.files import restore
from shine.fingerprint import Fingerprint
from shine.hub import download, hub_id
from shine.hypernetwork import Hypernetwork
from shine.m2p import MEASURED
from shine.parsing import parse
from shine.released import RELEASED_FILES, is_released, read_released
from shine.zoo import HYPERNETWORKS

FORMAT = 2
CONFIG_FILE, WEIGHTS_FILE = "config.json", "hypernetwork.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a directory of ours says about itself: enough to load it without the configuration that trained it.

    Attributes:
        backbone: how the backbone was loaded.
        hypernetwork: ranks, layout, targets, depth.
        stages: those behind it, oldest first.
        fingerprint: of the backbone it was trained on; ``None`` in checkpoints of format 1.
        revision: the hub's commit of that backbone, where it came from there.
        variant: what was done to its weights, where something was: see `shine.loading.variant_name`.
        context_length: most tokens of a context in the last stage; ``None`` in checkpoints that were written before this was kept.
    """

    backbone: BackboneConfig
    hypernetwork: HypernetworkConfig
    stages: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    revision: str | None = None
    variant: str | None = None
    context_length: int | None = None


def find_checkpoint(path: str | Path) -> Path:
    """The directory to load from: ``path`` itself, or the newest checkpoint inside it (``final``, else the highest step or epoch).

    Args:
        path: a directory, a name that is shipped (`shine.zoo.HYPERNETWORKS`; write ``./name`` for a folder of that name), or a
            hub's ``hf:owner/name`` or ``ms:owner/name``, which is downloaded first; see `shine.hub`.

    Raises:
        ValueError: nothing there can be loaded.
    """
    if (remote := hub_id(path)) is not None:
        return download(remote)
    if path in HYPERNETWORKS:
        path = HYPERNETWORKS[str(path)]
    path = Path(path).expanduser()
    for place in (path, path / "final"):
        restore(place)
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint directory; train the stage that makes it, or download it")
    if (path / CONFIG_FILE).exists() or is_released(path):
        return path
    # A name with a dot in front is a folder that a killed run was still writing.
    children = [child for child in path.iterdir() if not child.name.startswith(".")]
    inside = sorted((child for child in children if (child / CONFIG_FILE).exists() or is_released(child)), key=_age)
    if not inside:
        below = sorted({file.parent.parent for name in (CONFIG_FILE, RELEASED_FILES[0]) for file in path.glob(f"*/*/{name}")})
        more = f"; name one of {', '.join(map(str, below))}" if below else ""
        raise ValueError(f"{path}: holds neither {CONFIG_FILE} nor {', '.join(RELEASED_FILES)}, nor a folder that does{more}")
    return inside[-1]


def _age(directory: Path) -> tuple[bool, int]:
    number = re.search(r"-(\d+)$", directory.name)
    return directory.name == "final", int(number[1]) if number else -1


def is_unfinished(directory: Path) -> bool:
    """Whether this is a step of a run, or its best so far, rather than its end."""
    return bool(re.fullmatch(r"(step|best)-\d+", directory.name))


def read_info(path: str | Path) -> CheckpointInfo | None:
    """What the checkpoint says about itself; ``None`` for a released directory, which says nothing.

    Raises:
        ValueError: the configuration file cannot be read, or is of a newer format.
    """
    directory = find_checkpoint(path)
    if is_released(directory):
        return None
    file = directory / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); fetch or train the checkpoint again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds no configuration; fetch or train the checkpoint again")
    if values.get("format") not in (1, FORMAT):
        raise ValueError(f"{file}: format {values.get('format')!r}, this version of shine reads {FORMAT}: upgrade shine")
    try:
        # Directories of before say nothing of these two, and in format 1 a fingerprint left out things that matter.
        known = {"variant": None, "context_length": None, **values}
        if values["format"] == 1:
            known["fingerprint"] = None
        return parse(CheckpointInfo, {field.name: known[field.name] for field in fields(CheckpointInfo)})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def effective_config(path: str | Path | None, config: HypernetworkConfig) -> HypernetworkConfig:
    """The shape of the hypernetwork that ``path`` holds: its own record; ``config`` for a released directory, or without a path."""
    info = read_info(path) if path is not None else None
    return info.hypernetwork if info is not None else config


def introduce(directory: Path, config: HypernetworkConfig) -> list[str]:
    """What a reader should know of the checkpoint that was found, beside what is ``config``-ured: lines to print."""
    info = read_info(directory)
    stages = "released" if info is None else ", ".join(info.stages) or "no stage recorded"
    lines = [f"hypernetwork: {directory} (stages: {stages})"]
    if is_unfinished(directory):
        lines.append(f"this is a step of a run, not its end: {directory}")
    if info is not None and info.hypernetwork != config:
        lines.append(f"the hypernetwork is as it was trained, not as configured: {info.hypernetwork}")
    return lines


def save_hypernetwork(
    directory: Path, weights: Mapping[str, Tensor], info: CheckpointInfo, *, dtype: torch.dtype | None = None
) -> None:
    """Write weights, then ``config.json``, into ``directory``.

    Args:
        weights: the ``state_dict`` of a hypernetwork.
        dtype: store what was trained in this type instead of its own; what was measured (`shine.m2p.StateStandard`) keeps its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", None if name.startswith(MEASURED) else dtype).contiguous()
        for name, tensor in weights.items()
    }
    save_file(tensors, directory / WEIGHTS_FILE)
    text = json.dumps({"format": FORMAT, "shine": shine.__version__, **asdict(info)}, indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_hypernetwork(path: str | Path, backbone: Backbone, *, config: HypernetworkConfig | None = None) -> Hypernetwork:
    """The hypernetwork in a checkpoint directory, on the backbone's device.

    Args:
        path: ours or a released directory, or a folder of such; see `find_checkpoint`.
        backbone: the model it was trained for.
        config: what a released directory does not record; a directory of ours knows its own.

    Raises:
        ValueError: nothing to load, a released directory without ``config``, or a tensor that does not fit: the message
            names the tensor, its shape and the shape that was expected.
    """
    directory = find_checkpoint(path)
    info = read_info(directory)
    if info is None and config is None:
        raise ValueError(f"{directory}: a released checkpoint has no configuration: name the experiment it was trained with")
    hypernetwork = Hypernetwork(info.hypernetwork if info is not None else config or HypernetworkConfig(), backbone)
    tensors = read_weights(directory)
    remedy = "set the ranks, depth and targets it was trained with"
    if info is not None:
        remedy = f"it was trained on backbone {info.backbone.path}: set backbone=... to that model"
    _check_shapes(hypernetwork, tensors, directory, remedy=remedy)
    hypernetwork.load_state_dict(tensors)
    return hypernetwork.to(backbone.device)


def check_backbone(path: str | Path, *, config: BackboneConfig, found: Fingerprint) -> None:
    """Make sure that a checkpoint of ours meets the backbone it was trained on; a released one does not say which.

    Args:
        config: how the backbone was loaded.
        found: its fingerprint.

    Raises:
        ValueError: it is another one, or a variant without ``allow_variant``, or other tokens stand for the tasks.
    """
    directory = find_checkpoint(path)
    info = read_info(directory)
    if info is None:
        return
    variant = f" ({info.variant})" if info.variant else ""
    trained = f"{directory} was trained on backbone {info.backbone.path}{variant}"
    if info.backbone.task_tokens != config.task_tokens:
        raise ValueError(
            f"{trained} with backbone.task_tokens {asdict(info.backbone.task_tokens)}, now they are {asdict(config.task_tokens)}: "
            "set them as they were"
        )
    if info.fingerprint is not None and info.fingerprint != found:
        both = f"{trained} (fingerprint {info.fingerprint}), and {config.path} is another ({found})"
        if not found.is_variant_of(info.fingerprint):
            raise ValueError(f"{both}: set backbone=... to the model it was trained on")
        if not config.allow_variant:
            raise ValueError(
                f"{both}: the same architecture and vocabulary with other weights, quantised, dequantised or tuned; use the one "
                "it was trained on, or allow this one: backbone.allow_variant=true in a configuration, --allow-variant on the "
                "command line, allow_variant=True in Python"
            )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under our names, ours or released, without a backbone.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    directory = find_checkpoint(path)
    if is_released(directory):
        return read_released(directory)
    file = directory / WEIGHTS_FILE
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); fetch or train the checkpoint again") from None


def _check_shapes(hypernetwork: Hypernetwork, tensors: Mapping[str, Tensor], directory: Path, *, remedy: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in hypernetwork.state_dict().items()}
    problems = [f"{name}: is missing, expected {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [f"{name}: unexpected tensor {list(tensors[name].shape)}" for name in tensors if name not in expected]
    problems += [
        f"{name}: has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        config = hypernetwork.config
        more = f"\n  and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(
            f"{directory} does not fit this backbone with rank={config.rank}, meta_rank={config.meta_rank}, "
            f"m2p.layers={config.m2p.layers}:\n  " + "\n  ".join(problems[:6]) + more + f"\n{remedy}"
        )


def output_folder(path: str | Path) -> Path:
    """A folder that a run may write into, which need not be there yet; nothing is made.

    Raises:
        ValueError: it cannot be written.
    """
    folder = Path(path).expanduser()
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "cannot be written" if there.is_dir() else "is a file"
        raise ValueError(f"output={folder}: {there} {reason}; choose another folder")
    return folder
