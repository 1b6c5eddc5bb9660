"""What vLLM and SGLang take, by their published rules; neither is needed here, and neither was run.

Read in their sources. vLLM: ``vllm/config/lora.py`` (ranks), ``vllm/lora/peft_helper.py`` (what it refuses in a configuration),
``vllm/entrypoints/openai/models/serving.py`` (names, loading). SGLang: ``python/sglang/srt/lora/lora_manager.py``
(``validate_new_adapter``), ``lora_registry.py``, ``managers/io_struct.py``. Both keep keys and values of earlier requests by an
adapter's identity, so that new weights need a name and a path of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shine.export.peft import CONFIG_FILE, WEIGHTS_FILE
from shine.zoo import FETCHED, SHIPPED, resolve

LINEARS = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
"""What both adapt in Qwen3, Qwen2 and Llama models, which they hold as ``qkv_proj`` and ``gate_up_proj`` and take apart again."""
_TENSOR = re.compile(r"base_model\.model\.[\w.]+\.lora_([AB])\.weight")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_AGAIN = "write it again with `shine export`"


@dataclass(frozen=True)
class Engine:
    """An inference server that loads PEFT adapters while it runs.

    Attributes:
        title: as its makers write it.
        ranks: the values that its option for the largest rank takes; empty where any will do.
        command: how to start it; ``{base}``, ``{rank}`` and ``{modules}`` are filled in.
        load, unload: paths of the requests below the server's address.
    """

    title: str
    ranks: tuple[int, ...]
    command: str
    load: str
    unload: str

    def check(self, name: str, *, rank: int, modules: Collection[str], base: str, server_rank: int | None = None) -> str:
        """Make sure that it takes an adapter, and say how it has to be started.

        Args:
            name: under which the adapter is to be registered.
            modules: last names of the linears that the adapter touches.
            base: the backbone.
            server_rank: the largest rank that a server was started with, where that is known.

        Raises:
            ValueError: it does not take it; every reason in one line, each with its remedy.
        """
        problems = name_problems(name)
        largest = self.ranks[-1] if self.ranks else rank
        if rank > largest:
            problems.append(f"rank {rank} is more than the largest it can be set to, {largest}: reduce it, --max-rank {largest}")
        elif server_rank is not None and rank > server_rank:
            problems.append(
                f"rank {rank} is more than the server's {server_rank}: start it with --max-lora-rank "
                f"{self.server_rank(rank)}, or reduce the adapter, --max-rank {server_rank}"
            )
        if odd := sorted(set(modules) - LINEARS):
            problems.append(f"it adapts no linear called {', '.join(odd)}: use a hypernetwork without these targets, or merge")
        if problems:
            raise ValueError(f"{name}: {self.title} would refuse it: {'; '.join(problems)}")
        return self.command.format(base=model_path(base), rank=self.server_rank(rank), modules=" ".join(sorted(modules)))

    def server_rank(self, rank: int) -> int:
        """The smallest value of its option for the largest rank that has room for ``rank``."""
        return next((value for value in self.ranks if value >= rank), rank)

    def check_folder(self, folder: Path, *, server_rank: int | None = None) -> str:
        """`check` of a PEFT folder on disk, and of what its files say.

        Raises:
            ValueError: it is none, it is damaged, or the engine does not take it.
        """
        config, shapes = _read(folder)
        problems = _config_problems(config) + _tensor_problems(shapes, rank=config["r"])
        if problems:
            raise ValueError(f"{folder}: {self.title} would refuse it: {'; '.join(problems)}")
        modules = {name.rsplit(".", 3)[1] for name in shapes}
        base = str(config.get("base_model_name_or_path") or "BACKBONE")
        return self.check(folder.absolute().name, rank=config["r"], modules=modules, base=base, server_rank=server_rank)


ENGINES = {
    "vllm": Engine(
        title="vLLM",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        command="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {base} --enable-lora --max-lora-rank {rank}",
        load="/v1/load_lora_adapter",
        unload="/v1/unload_lora_adapter",
    ),
    "sglang": Engine(
        title="SGLang",
        ranks=(),
        command=(
            "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
            "--lora-target-modules {modules}"
        ),
        load="/load_lora_adapter",
        unload="/unload_lora_adapter",
    ),
}


def name_problems(name: str) -> list[str]:
    """Why a name could not be asked for. It is part of a path, and SGLang splits ``BASE:NAME`` at the colon."""
    if _NAME.fullmatch(name):
        return []
    return [f"{name!r} cannot be a name: letters, digits, '.', '_' and '-', beginning with a letter or digit"]


def model_path(backbone: str) -> str:
    """What an engine calls a backbone: names of our own mean nothing to it. Others need not lie on this machine."""
    return resolve(backbone) if backbone in (*SHIPPED, *FETCHED) else backbone


def check_new_folder(folder: Path) -> None:
    """Make sure that no engine can have loaded something else from this path.

    Raises:
        ValueError: there is something already.
    """
    if folder.exists():
        raise ValueError(
            f"{folder} is there already, and an engine that loaded it keeps what it held: each adapter needs a new name and path"
        )


def _read(folder: Path) -> tuple[dict[str, Any], Mapping[str, list[int]]]:
    """The configuration of a PEFT folder, and the shape of each tensor."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: no PEFT adapter that can be read ({error}); write one with `shine export`") from None
    if not isinstance(config, dict) or not isinstance(config.get("r"), int) or not shapes:
        raise ValueError(f"{folder}: its {CONFIG_FILE} names no rank, or there are no weights; write it with `shine export`")
    return config, shapes


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    refused = {
        "modules_to_save": "trains whole modules (modules_to_save)",
        "use_dora": "is DoRA (use_dora)",
        "added_tokens": "adds tokens to the vocabulary (added_tokens)",
        "rank_pattern": "has several ranks (rank_pattern)",
        "alpha_pattern": "has several scales (alpha_pattern)",
    }
    problems = [f"it {what}: load it with PEFT itself, or merge it" for key, what in refused.items() if config.get(key)]
    if config.get("peft_type") != "LORA":
        problems.append(f"it is a PEFT adapter of type {config.get('peft_type')}, not LORA: load it with PEFT itself, or merge it")
    if config.get("bias", "none") != "none":
        problems.append("it changes biases (bias): load it with PEFT itself, or merge it")
    missing = [key for key in ("lora_alpha", "target_modules") if not config.get(key)]
    return problems + [f"its {CONFIG_FILE} has no {key}: {_AGAIN}" for key in missing]


def _tensor_problems(shapes: Mapping[str, list[int]], *, rank: int) -> list[str]:
    for name, shape in shapes.items():
        matched = _TENSOR.fullmatch(name)
        if matched is None:
            return [f"it cannot read a tensor called {name}: {_AGAIN}"]
        if shape[0 if matched[1] == "A" else 1] != rank:
            return [f"{name} of shape {shape} is not of rank {rank}, which the configuration says: {_AGAIN}"]
        other = name.replace(f".lora_{matched[1]}.", f".lora_{'AB'.replace(matched[1], '')}.")
        if other not in shapes:
            return [f"{name} has no counterpart {other}: {_AGAIN}"]
    return []
