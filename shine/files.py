"""Files and folders that appear whole or not at all, and where those lie that can be made again."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_ASIDE = re.compile(r"\.(.+)\.\d+-[0-9a-f]+\.replaced")


def cache_folder() -> Path:
    """Where what was fetched, converted or tokenised once is kept: ``$SHINE_CACHE``, by default ``~/.cache/shine``."""
    return Path(os.environ.get("SHINE_CACHE") or "~/.cache/shine").expanduser()


@contextmanager
def written_beside(directory: Path) -> Iterator[Path]:
    """A fresh folder to write into, renamed to ``directory`` when the block ends well, so that no half-written one is ever seen.

    What was written is on the disk before the name appears. An earlier ``directory`` is moved aside just before and removed after,
    so that a process that is killed in between loses neither (see `restore`). Threads and processes that write the same one at once
    do not meet, and the last of them stays.
    """
    # A link stays, and what it points at is replaced.
    directory = Path(os.path.realpath(directory))
    temporary = directory.with_name(f".{directory.name}.{_unique()}.partial")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        _take_place(temporary, directory)
        _flush(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        restore(directory)
        earlier = [aside for aside, place in moved_aside(directory.parent) if place == directory]
        if directory.exists():
            for aside in earlier:
                shutil.rmtree(aside, ignore_errors=True)


def _take_place(new: Path, directory: Path) -> None:
    while True:
        try:
            new.rename(directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Another writer may be doing the same.
        with suppress(FileNotFoundError):
            directory.rename(directory.with_name(f".{directory.name}.{_unique()}.replaced"))


def restore(directory: Path) -> None:
    """Give a folder back that a process was replacing when it was killed, if nothing has its name; else do nothing."""
    if directory.exists():
        return
    for aside, place in moved_aside(directory.parent):
        if place == directory:
            # Somebody else was quicker, or it may only be read.
            with suppress(OSError):
                aside.rename(directory)


def moved_aside(folder: Path) -> Sequence[tuple[Path, Path]]:
    """What `written_beside` moved aside in a folder, and where it was; the newest first."""
    found = [(child, match) for child in _children(folder) if (match := _ASIDE.fullmatch(child.name))]
    return [(child, folder / match[1]) for child, match in sorted(found, key=lambda pair: -_changed(pair[0]))]


def _children(folder: Path) -> Sequence[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unique() -> str:
    """A part of a name that no other thread, process or machine takes."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def file_written_beside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when the block ends well and its content is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_unique()}.partial")
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
