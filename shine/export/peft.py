"""A LoRA for PEFT, exactly, and whole models with a LoRA merged in.

PEFT computes ``x W^T + (x A^T) B^T alpha / r`` with ``A [r, in]`` and ``B [out, r]``: ours transposed, and ``alpha = r`` because
the scale is already inside.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from shine.export.ranks import padded
from shine.files import may_replace, written_beside
from shine.fingerprint import Fingerprint, fingerprint
from shine.lora import LoRA
from shine.parsing import parse
from shine.pretrained import load_model, load_tokenizer, without_progress_bars
from shine.provenance import Provenance
from shine.zoo import resolve

CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE, README_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "shine.json",
    "README.md",
)
FILES = frozenset((CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE, README_FILE))

_README = """\
---
base_model: {backbone}
library_name: peft
---

A LoRA that SHINE made from a context in one pass, for `{backbone}`; `shine.json` says from which context.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{backbone}"), "this folder")
```

It expects plain ChatML without a system turn, which many chat templates add:
`<|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\n`.
"""


def peft_tensors(lora: LoRA) -> dict[str, Tensor]:
    """What lies in PEFT's weights file, on the CPU: ``lora_A [r, in]`` and ``lora_B [out, r]`` of each linear.

    Raises:
        ValueError: these are several adapters.
    """
    if lora.batch != 1:
        raise ValueError(f"these are {lora.batch} adapters: export each into a folder of its own, lora.select([i])")
    tensors = {}
    for path, (a, b) in padded(lora, lora.rank).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a[0].mT.detach().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b[0].mT.detach().cpu().contiguous()
    return tensors


def peft_config(lora: LoRA, *, base: str) -> dict[str, Any]:
    """PEFT's ``adapter_config.json`` for an adapter of the backbone ``base``."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora.rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in lora}),
        "task_type": "CAUSAL_LM",
    }


def write_peft(lora: LoRA, directory: str | Path, *, backbone: str, dtype: torch.dtype | None = None) -> Path:
    """Write one adapter as the folder that ``PeftModel.from_pretrained`` reads.

    Where the linears have different ranks the narrower ones are padded with zeros, since engines take one rank for all.

    Args:
        backbone: what PEFT's configuration names as the base model: a folder or a hub id, or a name that SHINE knows.
        dtype: store the weights in this type instead of their own.

    Raises:
        ValueError: these are several adapters, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    folder = Path(directory).expanduser()
    tensors = {name: tensor.to(dtype) for name, tensor in peft_tensors(lora).items()}
    may_replace(folder, names=FILES, what="PEFT adapter")
    base = resolve(backbone)
    config = peft_config(lora, base=base)
    provenance = [asdict(span) for span in lora.provenance[0]] if lora.provenance else []
    with written_beside(folder) as beside:
        save_file(tensors, beside / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_json(beside / PROVENANCE_FILE, {"contexts": provenance})
        (beside / README_FILE).write_text(_README.format(backbone=base), encoding="utf-8")
        _write_json(beside / CONFIG_FILE, config)
    return folder


def holds(folder: Path, lora: LoRA) -> bool:
    """Whether a folder holds this very adapter, as `write_peft` writes it."""
    try:
        stored = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError):
        return False
    wanted = peft_tensors(lora)
    return stored.keys() == wanted.keys() and all(torch.equal(stored[name], tensor) for name, tensor in wanted.items())


@torch.no_grad()
def write_merged(lora: LoRA, directory: str | Path, *, backbone: str, dtype: torch.dtype | None = None) -> Path:
    """Write the backbone with the update added to its weights, as a folder that plain transformers loads.

    The sum is taken in float32 and rounded once to the type that is stored.

    Args:
        backbone: a folder, a hub id, or a name that SHINE knows.
        dtype: of the model that is written; by default that of the backbone's own files.

    Raises:
        ValueError: these are several adapters, they were made for another backbone, or the folder is not empty.
        OSError: the folder cannot be written.
    """
    lora.require_one()
    folder = Path(directory).expanduser()
    may_replace(folder, names=frozenset(), what="merged model")
    path = resolve(backbone)
    with without_progress_bars():
        model, tokenizer = load_model(path, dtype=dtype or "auto"), load_tokenizer(path)
    found = fingerprint(model, tokenizer)
    for span in (span for spans in lora.provenance for span in spans):
        wanted = Fingerprint.parse(span.backbone.fingerprint)
        # Not the vocabulary's: SHINE adds its task tokens to it.
        if (wanted.config, wanted.weights) != (found.config, found.weights):
            raise ValueError(
                f"this adapter was made for backbone {span.backbone.name} (fingerprint {wanted}), and {backbone} is another "
                f"({found}): give --backbone the one it was made for"
            )
    for name in lora:
        weight = model.get_submodule(name).weight
        weight.copy_(lora.merged_into(name, weight))
    with written_beside(folder) as beside, without_progress_bars():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if isinstance(model.generation_config, GenerationConfig):
            model.generation_config.save_pretrained(beside)
        _write_json(beside / PROVENANCE_FILE, {"contexts": [asdict(span) for spans in lora.provenance for span in spans]})
    return folder


def read_contexts(directory: Path) -> list[dict[str, Any]]:
    """What `write_peft` and `write_merged` noted of where an adapter comes from: the fields of `shine.provenance.Provenance`.

    Raises:
        ValueError: the record is damaged.
    """
    file = directory / PROVENANCE_FILE
    try:
        contexts = json.loads(file.read_text(encoding="utf-8"))["contexts"]
        return [asdict(parse(Provenance, context)) for context in contexts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{file}: its record of the context cannot be read ({reason}); export the adapter again") from None


def _write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
