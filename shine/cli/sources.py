"""How a source is named on the command line: ``KIND[:PATH][,KEY=VALUE]...``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import yaml

from shine.config import SourceConfig, parse

SYNTAX = "KIND[:PATH][,KEY=VALUE]..., as in race:data/race/all,split=validation,cloze=false"
_OWN = {field.name for field in fields(SourceConfig)} - {"kind", "path", "options"}


def parse_source(text: str) -> SourceConfig:
    """The source that ``text`` names; keys that every source has are its own, others are options of its kind.

    Raises:
        ValueError: it cannot be understood.
    """
    head, *pairs = text.split(",")
    kind, _, path = head.partition(":")
    values: dict[str, Any] = {"kind": kind, "path": path or None, "options": {}}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ValueError(f"--source {text}: {pair!r} is no KEY=VALUE; a source is {SYNTAX}")
        (values if key in _OWN else values["options"])[key] = yaml.safe_load(value)
    return parse(SourceConfig, values)
