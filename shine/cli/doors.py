"""What the Hydra doors at the top level share: plain values in, a short error out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from shine.config import parse

T = TypeVar("T")


def run_door(kind: type[T], values: object, action: Callable[[T], Any]) -> None:
    """Parse a configuration and act on it; what a user can mend ends in one message and exit code 2, without a traceback."""
    try:
        assert isinstance(values, dict)
        action(parse(kind, values))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
