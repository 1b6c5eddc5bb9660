"""An ordinary LoRA that learns to read contexts in the prompt: the ceiling that an adapter made from the context is held against.

It sees what a stage of SHINE sees, with the context where a language model usually has it: in a system turn before the conversation
(`in_prompt`). What is trained (`shine.training.tuning`) is one LoRA for all contexts.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.chat import END, IGNORE, START, token_ids
from shine.data.samples import Sample
from shine.lora import LoRA


def starting_lora(backbone: Backbone, *, rank: int, generator: torch.Generator) -> LoRA:
    """A LoRA of batch one for every target linear that changes nothing yet: A uniform as a linear's weight starts, B zero.

    Both are parameters, float32 at least, on the backbone's device.
    """
    dtype, weights = torch.promote_types(torch.float32, backbone.dtype), {}
    for shape in itertools.chain.from_iterable(backbone.linear_shapes):
        bound = 1 / math.sqrt(shape.in_features)
        a = torch.empty(1, shape.in_features, rank, dtype=dtype).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(1, rank, shape.out_features, dtype=dtype)
        weights[shape.path] = (nn.Parameter(a.to(backbone.device)), nn.Parameter(b.to(backbone.device)))
    return LoRA(weights)


class Reader(nn.Module):
    """The LoRA that is trained, called as a hypernetwork is and the same whatever it is shown."""

    def __init__(self, backbone: Backbone, *, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        lora = starting_lora(backbone, rank=rank, generator=torch.Generator().manual_seed(seed))
        self.scale, self.paths = alpha / rank, list(lora)
        self.A = nn.ParameterList(a for a, _ in lora.values())
        self.B = nn.ParameterList(b for _, b in lora.values())

    def forward(self, *_context: object, dtype: torch.dtype | None = None) -> LoRA:
        """The LoRA, of batch one."""
        lora = LoRA({path: (a, b) for path, a, b in zip(self.paths, self.A, self.B, strict=True)})
        return lora.scale(self.scale).to(dtype=dtype)


def in_prompt(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The same sample with the context in a system turn before the conversation, and one token for the context that is left."""
    ids = token_ids(tokenizer, f"{START}system\n") + sample.context_ids + token_ids(tokenizer, f"{END}\n")
    return replace(
        sample,
        context_ids=sample.context_ids[:1],
        input_ids=ids + sample.input_ids,
        labels=[IGNORE] * len(ids) + sample.labels,
    )


def read_reader(directory: str, backbone: Backbone) -> LoRA:
    """The LoRA in a folder that ``shine tune-reader`` wrote, batch one.

    Raises:
        ValueError: there is none, or it does not fit the backbone.
    """
    reader = LoRA.load(directory)
    if odd := backbone.misfits(reader):
        raise ValueError(f"reader={directory}: {odd[0]} does not fit this backbone; train one on it with shine tune-reader")
    return reader
