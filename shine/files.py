"""Files and folders that appear whole or not at all, and where those lie that can be made again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where what was fetched, converted or tokenised once is kept: ``$SHINE_CACHE``, by default ``~/.cache/shine``."""
    return Path(os.environ.get("SHINE_CACHE") or "~/.cache/shine").expanduser()


@contextmanager
def written_beside(directory: Path) -> Iterator[Path]:
    """A fresh folder to write into, renamed to ``directory`` when the block ends well, so that no half-written one is ever seen.

    What was written is on the disk before the name appears. An earlier ``directory`` gives way just before.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
        _flush(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def file_written_beside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when the block ends well and its content is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk; a file system that cannot flush folders says so and is believed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def may_replace(directory: Path, *, names: frozenset[str], what: str) -> None:
    """Make sure that ``directory`` can be written over: it is absent, empty, or holds nothing but files of these ``names``.

    Raises:
        ValueError: there is something else in it, or it is a file.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file: name a folder to write the {what} into")
    if others := sorted(child.name for child in directory.iterdir() if child.name not in names):
        raise ValueError(f"{directory} holds something else ({others[0]}), which the {what} would replace: name another folder")
