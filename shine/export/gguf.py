"""GGUF, the adapter as llama.cpp and Ollama read it, and the Modelfile that goes with it.

What llama.cpp expects was read in its loader (``src/llama-adapter.cpp``) and its converter (``convert_lora_to_gguf.py``), of the
version that llama-cpp-python 0.3.36 carries, and is tested against that build: ``general.type`` is ``adapter``,
``adapter.type`` is ``lora``, each pair is a ``blk.N.NAME.weight.lora_a`` of ``(r, in)`` and a ``.lora_b`` of ``(out, r)``, and the
update is multiplied by ``adapter.lora.alpha / r``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor
from transformers import PretrainedConfig

from shine.chat import END, END_OF_TEXT, START
from shine.export.ranks import padded
from shine.files import may_replace, written_beside
from shine.lora import LoRA
from shine.parsing import parse
from shine.provenance import Provenance

ADAPTER_FILE, MODELFILE = "adapter.gguf", "Modelfile"
FILES = frozenset((ADAPTER_FILE, MODELFILE))
BASE = "./backbone.gguf"
"""What a Modelfile builds on where nobody says."""
CONTEXTS_KEY = "shine.contexts"


@dataclass(frozen=True)
class GGUFArchitecture:
    """How llama.cpp holds a model type.

    Attributes:
        kind: llama.cpp's name for it, which decides the names of the tensors.
        interleaved: whether the rows of q and k are reordered: llama.cpp rotates neighbouring rows of a head in Llama-shaped
            models, transformers row ``i`` with row ``i + head_dim / 2``.
    """

    kind: gguf.MODEL_ARCH
    interleaved: bool


ARCHITECTURES = {
    "llama": GGUFArchitecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": GGUFArchitecture(gguf.MODEL_ARCH.QWEN2, interleaved=False),
    "qwen3": GGUFArchitecture(gguf.MODEL_ARCH.QWEN3, interleaved=False),
}
"""By ``model_type`` of a transformers configuration. Those that were run in llama.cpp; another needs a look at its converter."""


def gguf_tensors(lora: LoRA, config: PretrainedConfig) -> dict[str, Tensor]:
    """Names and float32 values as they lie in the file: ``lora_a (r, in)`` and ``lora_b (out, r)`` of each linear.

    Args:
        lora: of a batch of one.
        config: of the backbone it is for.

    Raises:
        ValueError: the LoRA holds several adapters, llama.cpp's layout of this backbone is not known here, or a linear has no
            counterpart there.
    """
    if lora.batch != 1:
        raise ValueError(f"a GGUF file holds one adapter, this LoRA {lora.batch}: write each into a file, with lora.select([i])")
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"no GGUF for backbones of type {config.model_type} (only {known}): export to peft instead")
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture.kind, config.num_hidden_layers)
    tensors = {}
    for path, (a, b) in padded(lora, lora.rank).items():
        name = names.get_name(path)
        if name is None:
            raise ValueError(f"llama.cpp knows no linear {path} in a {config.model_type} model: export to peft instead")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.rsplit(".", 1)[-1])
        if architecture.interleaved and heads is not None:
            b = b.unflatten(2, (heads, 2, -1)).transpose(3, 4).flatten(2)
        tensors[f"{name}.weight.lora_a"] = a[0].mT.detach().float().cpu().contiguous()
        tensors[f"{name}.weight.lora_b"] = b[0].mT.detach().float().cpu().contiguous()
    return tensors


def write_gguf(lora: LoRA, directory: Path, *, config: PretrainedConfig, base: str) -> None:
    """Write a folder of ``adapter.gguf`` and a ``Modelfile``; it appears whole or not at all.

    Where the adapter comes from is kept in the file, as JSON under ``shine.contexts``.

    Args:
        config: of the backbone.
        base: what Ollama builds on: the backbone's GGUF file, or its name in Ollama.

    Raises:
        ValueError: see `gguf_tensors`; or there is something else in the folder.
        OSError: the folder cannot be written.
    """
    may_replace(directory, names=FILES, what="adapter")
    tensors = gguf_tensors(lora, config)
    with written_beside(directory) as folder:
        writer = gguf.GGUFWriter(os.fspath(folder / ADAPTER_FILE), gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type].kind])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # The scale is in B already, so alpha is the rank and their quotient one.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.rank))
        if lora.provenance:
            writer.add_string(CONTEXTS_KEY, json.dumps([asdict(span) for span in lora.provenance[0]]))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (folder / MODELFILE).write_text(modelfile(base=base), encoding="utf-8")


def read_contexts(directory: Path) -> list[dict[str, Any]]:
    """What `write_gguf` noted of where an adapter comes from: the fields of `shine.provenance.Provenance`.

    Raises:
        ValueError: the file or its record is damaged.
    """
    file = directory / ADAPTER_FILE
    try:
        field = gguf.GGUFReader(file).get_field(CONTEXTS_KEY)
        contexts = [] if field is None else json.loads(field.contents())
        return [asdict(parse(Provenance, context)) for context in contexts]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise ValueError(f"{file}: cannot be read ({reason}); export the adapter again") from None


def modelfile(*, base: str, adapter: str = f"./{ADAPTER_FILE}") -> str:
    """An Ollama Modelfile: the base, the adapter, plain ChatML without a system turn, its stop tokens, greedy answers."""
    turn = f"{START}{{{{ .Role }}}}\n{{{{ .Content }}}}{END}\n"
    template = f'{{{{ range .Messages }}}}{{{{ if ne .Role "system" }}}}{turn}{{{{ end }}}}{{{{ end }}}}{START}assistant\n'
    return (
        f'FROM {base}\nADAPTER {adapter}\nTEMPLATE """{template}"""\n'
        f"PARAMETER stop {END}\nPARAMETER stop {END_OF_TEXT}\nPARAMETER temperature 0\n"
    )
