"""What the Hydra doors at the top level share: plain values in, a short error out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import OmegaConf

import shine
from shine.cli.commands import CONFIGS, in_clone
from shine.parsing import parse, unknown_key
from shine.training.distributed import SharedRefusalError
from shine.training.stop import StoppedError

T = TypeVar("T")


def run_door(kind: type[T], values: object, action: Callable[[T], Any]) -> None:
    """Parse a configuration and act on it; what a user can mend ends in one message and exit code 2, without a traceback.

    That is a ``ValueError`` that SHINE itself raised, and whatever the system says about a file.
    """
    try:
        assert isinstance(values, dict)
        action(parse(kind, values))
    except ValueError as error:
        if not _raised_by_us(error):
            raise
        if isinstance(error, SharedRefusalError) and not _first_rank():
            sys.exit(2)
        _give_up(str(error))
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        _give_up(f"{place}{error.strerror or error}; choose another place, or make room and permission in this one")
    except KeyboardInterrupt:
        print("stopped at once, without saving", file=sys.stderr, flush=True)
        sys.exit(130)
    except StoppedError as stopped:
        # All ranks stop together, and one says so.
        if _first_rank():
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + stopped.signal_number)


@contextmanager
def plain_refusals(kind: type) -> Iterator[None]:
    """What Hydra refuses before a door's function runs ends like everything else a user can mend: see `run_door`.

    A folder or hub id where the name of a backbone belongs is understood: ``backbone=models/mine`` is
    ``backbone=custom backbone.path=models/mine``.
    """
    # Without it Hydra prints its own text and leaves with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = _name_custom_backbones(sys.argv[1:])
    try:
        yield
    except HydraException as error:
        _give_up(_refusal(kind, error))


def composed(kind: type[T], door: str, overrides: Sequence[str]) -> T:
    """The configuration that a door would get with these words after its name, for commands that are no door themselves.

    Raises:
        ValueError: Hydra or `shine.parsing.parse` refuses them, or SHINE is installed without its clone, which holds ``configs/``.
    """
    try:
        with initialize_config_dir(str(in_clone(CONFIGS)), version_base="1.3"):
            values: Any = OmegaConf.to_container(compose(door, overrides=list(_name_custom_backbones(overrides))), resolve=True)
    except HydraException as error:
        raise ValueError(_refusal(kind, error)) from None
    return parse(kind, values)


def _refusal(kind: type, error: HydraException) -> str:
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not understood; quote it for the shell, as in 'a.b=[1, 2]'"
    key = getattr(error.__cause__, "full_key", None)
    if isinstance(error, ConfigCompositionException) and key:
        return unknown_key(kind, key)
    return str(error).partition("\nConfig search path:")[0]


def _name_custom_backbones(overrides: Sequence[str]) -> Iterator[str]:
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "backbone" and not (CONFIGS / "backbone" / f"{value}.yaml").exists() and ("/" in value or Path(value).is_dir()):
            yield from ("backbone=custom", f"backbone.path={value}")
        else:
            yield override


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(shine.__file__).parent)


def _give_up(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
