"""What the Hydra doors at the top level share: plain values in, a short error out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException

from shine.config import parse, unknown_key
from shine.training.stop import StoppedError

T = TypeVar("T")


def run_door(kind: type[T], values: object, action: Callable[[T], Any]) -> None:
    """Parse a configuration and act on it; what a user can mend ends in one message and exit code 2, without a traceback."""
    try:
        assert isinstance(values, dict)
        action(parse(kind, values))
    except ValueError as error:
        _give_up(str(error))
    except StoppedError as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + stopped.signal_number)


@contextmanager
def plain_refusals(kind: type) -> Iterator[None]:
    """What Hydra refuses before a door's function runs ends like everything else a user can mend: see `run_door`."""
    # Without it Hydra prints its own text and leaves with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except OverrideParseException as error:
        _give_up(f"{error.override}: {str(error).splitlines()[0]}; quote it for the shell, as in 'a.b=[1, 2]'")
    except HydraException as error:
        key = getattr(error.__cause__, "full_key", None)
        if isinstance(error, ConfigCompositionException) and key:
            _give_up(unknown_key(kind, key))
        _give_up(str(error).partition("\nConfig search path:")[0])


def _give_up(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
