"""Whether a backbone is the one that an adapter was made for, by its configuration alone."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

from shine.fingerprint import Fingerprint, config_fingerprint
from shine.lora import LoRA
from shine.pretrained import first_line
from shine.zoo import resolve

REMEDY = "give --backbone the one it was made for"


def backbone_config(backbone: str, lora: LoRA, *, remedy: str = REMEDY) -> PretrainedConfig:
    """The configuration of the backbone that ``lora`` was made for, without its weights.

    Args:
        backbone: a folder, a hub id, or a name that SHINE knows.
        remedy: what to do where it is another.

    Raises:
        ValueError: there is none, or the adapter was made for one of another shape.
    """
    path = resolve(backbone)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # what a damaged one makes transformers raise is anybody's guess
        raise ValueError(f"{path}: no configuration of a model there ({first_line(error)}); {remedy}") from None
    found = config_fingerprint(config)
    for span in (span for spans in lora.provenance for span in spans):
        if Fingerprint.parse(span.backbone.fingerprint).config != found:
            raise ValueError(
                f"this adapter was made for backbone {span.backbone.name} (fingerprint {span.backbone.fingerprint}), and "
                f"{backbone} has another shape ({found}): {remedy}"
            )
    return config
