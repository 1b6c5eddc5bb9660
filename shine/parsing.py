"""Plain nested values to the configurations of `shine.config`, with a remedy for each value that does not hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def parse(kind: type[T], values: Mapping[str, Any]) -> T:
    """Plain nested values (what a YAML file holds) to a configuration.

    Raises:
        ValueError: an unknown key, a missing one, or a value of the wrong type or range; each line names the key and the remedy.
    """
    try:
        return TypeAdapter(kind).validate_python(_without_open(values))
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise ValueError("the configuration does not hold:\n  " + "\n  ".join(lines)) from None


def unknown_key(kind: type, path: str) -> str:
    """What to say of a dotted ``path`` whose last part ``kind`` does not know, with the remedy."""
    parts = path.split(".")
    known = _keys_beside(kind, tuple(parts))
    if not known:
        return f"{path}: there is no such entry; a new one is added with +{path}=..."
    if parts[-1] in known:
        return f"{path}: the chosen configuration files leave this key out; set it with +{path}=..."
    near = difflib.get_close_matches(parts[-1], known, n=1)
    return f"{path}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")


def _without_open(values: Any) -> Any:
    """Without the values that a YAML file left open for the command line to set (``???``), so that they count as missing."""
    if not isinstance(values, Mapping):
        return values
    return {key: _without_open(value) for key, value in values.items() if value != "???"}


def _explain(kind: type, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(kind, key)
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; set {key}=..."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{key}: {message}" if isinstance(problem["input"], Mapping) else f"{key}: {message} (it is {problem['input']!r})"


def _keys_beside(kind: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location[:-1]:
        kind = get_type_hints(kind)[part] if is_dataclass(kind) else get_args(kind)[1]
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []
