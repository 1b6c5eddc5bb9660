"""How a source is named on the command line: ``KIND[:PATH][,KEY=VALUE]...``."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import yaml

from shine.config import SourceConfig
from shine.parsing import parse

SYNTAX = "KIND[:PATH][,KEY=VALUE]..., as in race:data/race/all,split=validation,cloze=false"
_COMMA = re.compile(r",(?![^\[{]*[\]}])")
_OWN = {field.name for field in fields(SourceConfig)} - {"kind", "path", "options"}


def parse_source(text: str) -> SourceConfig:
    """The source that ``text`` names; keys that every source has are its own, others are options of its kind.

    Raises:
        ValueError: it cannot be understood.
    """
    head, *pairs = _COMMA.split(text)
    kind, _, path = head.partition(":")
    values: dict[str, Any] = {"kind": kind, "path": path or None, "options": {}}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ValueError(f"--source {text}: {pair!r} is no KEY=VALUE; a source is {SYNTAX}")
        try:
            (values if key in _OWN else values["options"])[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--source {text}: {value!r} cannot be read ({str(error).splitlines()[0]})") from None
    return parse(SourceConfig, values)
