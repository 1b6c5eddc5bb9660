"""An adapter on disk: ``config.json`` says where it comes from, ``lora.safetensors`` holds its matrices.

They are called ``{path}.A``, ``[in, r]``, and ``{path}.B``, ``[r, out]``, with the path of the linear in the backbone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shine.files import may_replace, restore, written_beside
from shine.parsing import parse
from shine.provenance import Provenance

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "lora.safetensors"
FILES = frozenset((CONFIG_FILE, WEIGHTS_FILE))
Pairs = Mapping[str, tuple[Tensor, Tensor]]


def write_adapter(directory: Path, pairs: Pairs, provenance: Sequence[Provenance]) -> Path:
    """Write one adapter; see `shine.lora.LoRA.save`."""
    may_replace(directory, names=FILES, what="adapter")
    tensors = {
        f"{path}.{name}": matrix.contiguous() for path, pair in pairs.items() for name, matrix in zip("AB", pair, strict=True)
    }
    values = {"adapter": FORMAT, "contexts": [asdict(span) for span in provenance]}
    with written_beside(directory) as folder:
        save_file(tensors, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return directory


def read_adapter(directory: Path) -> tuple[Pairs, tuple[Provenance, ...]]:
    """What `write_adapter` wrote.

    Raises:
        ValueError: there is no adapter, or it is damaged or of a newer format.
    """
    provenance = read_provenance(directory)
    file = directory / WEIGHTS_FILE
    try:
        tensors = load_file(file)
        pairs = {name[:-2]: (tensor, tensors[f"{name[:-2]}.B"]) for name, tensor in tensors.items() if name.endswith(".A")}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); encode the context again") from None
    if not pairs:
        raise ValueError(f"{file}: holds no adapter; encode the context again")
    return pairs, provenance


def read_provenance(directory: Path) -> tuple[Provenance, ...]:
    """Where an adapter's spans come from, without reading its weights; empty where nobody knew.

    Raises:
        ValueError: there is no adapter, or it is of a newer format, or its record is damaged.
    """
    restore(directory)
    file = directory / CONFIG_FILE
    if not file.is_file():
        hint = "a PEFT folder, which SHINE writes but does not read" if (directory / "adapter_config.json").exists() else None
        raise ValueError(f"{directory}: {hint or f'no adapter there (no {CONFIG_FILE})'}; make one with `shine encode`")
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); encode the context again") from None
    if not isinstance(values, dict) or "adapter" not in values:
        raise ValueError(
            f"{directory}: not an adapter but something else (no 'adapter' in its {CONFIG_FILE}); make one with `shine encode`"
        )
    if values["adapter"] != FORMAT:
        raise ValueError(f"{file}: adapter format {values['adapter']!r}, this version of shine reads {FORMAT}: upgrade shine")
    try:
        return tuple(parse(Provenance, span) for span in values["contexts"])
    except (KeyError, TypeError, ValueError) as error:
        problem = str(error).splitlines()[-1].strip()
        raise ValueError(f"{file}: its record of a context does not hold ({problem}); encode the context again") from None


def read_shapes(directory: Path) -> dict[str, Any]:
    """Rank, number of linears, number of values and type of an adapter's weights, without reading them."""
    file = directory / WEIGHTS_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            slices = {name: tensors.get_slice(name) for name in names}
            shapes = {name: piece.get_shape() for name, piece in slices.items()}
            dtype = next(iter(slices.values())).get_dtype()
    except (SafetensorError, OSError, StopIteration) as error:
        raise ValueError(f"{file}: cannot be read ({error}); encode the context again") from None
    return {
        "rank": max(shape[1] for name, shape in shapes.items() if name.endswith(".A")),
        "linears": len(shapes) // 2,
        "parameters": sum(shape[0] * shape[1] for shape in shapes.values()),
        "dtype": dtype,
    }
