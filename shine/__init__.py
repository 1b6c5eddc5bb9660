"""SHINE: a hypernetwork that reads a context once and writes it into the weights of the model that read it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shine.chat import Conversation
    from shine.lora import LoRA
    from shine.model import Shine
    from shine.store import Store

__all__ = ["Conversation", "LoRA", "Shine", "Store", "__version__"]
__version__ = "0.1.0"

_HOMES = {"Conversation": "shine.chat", "LoRA": "shine.lora", "Shine": "shine.model", "Store": "shine.store"}


def __getattr__(name: str) -> Any:
    # Only when asked for: torch and transformers take seconds, which `import shine` and `shine --help` should not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
