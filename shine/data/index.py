"""What was once read, tokenised and grouped, kept on disk: built by the first process that needs it, opened by all others."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from shine.config import SourceConfig
from shine.data.sources.files import split_files
from shine.files import cache_folder, written_beside

META_FILE = "meta.json"


def index_folder() -> Path:
    """Where indexes live: ``$SHINE_CACHE/data``, by default ``~/.cache/shine/data``. Whatever is in there can be deleted."""
    return cache_folder() / "data"


def indexed(
    key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], *, say: Callable[[str], None]
) -> tuple[Path, Mapping[str, Any]]:
    """The folder of an index and what its builder noted, built now if there is none for this key.

    Several processes may ask at once: one builds, the others wait. A folder appears whole or not at all.

    Args:
        key: all that the index depends on; another key is another folder.
        build: writes files into a folder and returns what is to be noted.
        say: told when an index is built, and where.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]
    folder = index_folder() / name
    while not _hold(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock(folder)):
            if not (folder / META_FILE).exists():
                _build(folder, key, build, say=say)
    meta = folder / META_FILE
    # When it was last used, which `prune` asks; a cache that may only be read has no such time.
    with contextlib.suppress(OSError):
        os.utime(meta)
    return folder, json.loads(meta.read_text(encoding="utf-8"))["noted"]


_held: dict[int, int] = {}
"""What this process has open: a descriptor for each folder, by the folder's number on its disk."""


def _hold(folder: Path) -> bool:
    """Keep an index from being removed as long as this process lives; whether there is one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    number = os.fstat(descriptor).st_ino
    # Where the file system has no locks, nobody can hold one and `prune` cannot remove any.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    # It may have been removed before it was held, and be another one by now.
    there = (folder / META_FILE).exists() and folder.stat().st_ino == number
    if not there or number in _held:
        os.close(descriptor)
    else:
        _held[number] = descriptor
    return there


def _lock(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _build(folder: Path, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], *, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    with written_beside(folder) as partial:
        text = json.dumps({"key": key, "noted": build(partial)}, default=str, indent=1)
        (partial / META_FILE).write_text(text + "\n", encoding="utf-8")
    say(f"read and tokenised in {time.monotonic() - started:.1f} s, kept in {folder}")


@dataclass(frozen=True)
class Index:
    """An index on this machine.

    Attributes:
        size: in bytes.
        used: when it was last opened, in seconds of the epoch.
        stage: name and lengths; empty for what a killed process left half-written.
        sources: what it was made from.
    """

    folder: Path
    size: int
    used: float
    stage: str = ""
    sources: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """It was finished."""
        return bool(self.stage)


def list_indexes() -> list[Index]:
    """All indexes on this machine, the one used last first; those that killed processes left half-written as well."""
    folders = (path for path in index_folder().glob("*") if path.is_dir()) if index_folder().is_dir() else ()
    found = [index for path in folders if (index := _look_at(path)) is not None]
    return sorted(found, key=lambda index: -index.used)


def _look_at(folder: Path) -> Index | None:
    """``None`` if it goes away just now."""
    try:
        stats = [file.stat() for file in folder.iterdir()]
        size, used = sum(stat.st_size for stat in stats), max((stat.st_mtime for stat in stats), default=folder.stat().st_mtime)
        if not (folder / META_FILE).exists():
            return Index(folder, size, used)
        key = json.loads((folder / META_FILE).read_text(encoding="utf-8"))["key"]
        name, context, conversation = key["stage"]
        sources = tuple(_named(source) for source in key["sources"])
        return Index(folder, size, (folder / META_FILE).stat().st_mtime, f"{name} {context}/{conversation}", sources)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError):
        # Of other code, or damaged: nobody will open it again.
        return Index(folder, size, used)


def _named(source: Mapping[str, Any]) -> str:
    return f"{source['kind']}:{source['path']}" if source["path"] is not None else str(source["kind"])


def prune(older_than: float, *, now: float) -> tuple[list[Index], list[Index]]:
    """Remove what was not used for ``older_than`` seconds.

    Returns:
        The indexes that were removed, and those that were left because a process has them open, or is building them (or because the
        file system cannot tell).
    """
    old = [index for index in list_indexes() if now - index.used >= older_than]
    removed = [index for index in old if _remove(index.folder)]
    return removed, [index for index in old if index not in removed]


def _remove(folder: Path) -> bool:
    name = folder.name.strip(".").partition(".")[0]
    lock = FileLock(_lock(folder.parent / name))
    try:
        # Who builds it holds this one.
        with lock.acquire(timeout=0):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Renamed first: who looks for it finds it whole or not at all.
                gone = folder.with_name(f".{name}.{os.getpid()}.removed")
                folder.rename(gone)
                shutil.rmtree(gone)
            finally:
                os.close(descriptor)
    except (OSError, Timeout):
        return False
    return True


def data_fingerprint(source: SourceConfig) -> dict[str, Any]:
    """What a source's examples depend on: its configuration, and name, size and time of change of each file it reads."""
    path = Path(source.path).expanduser() if source.path is not None else None
    if path is None:
        files = []
    elif source.kind == "folder" and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = split_files(source)
    stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return {**asdict(source), "options": {**source.options}, "files": stats}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how a tokenizer cuts a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    # Set by the last call, not by the tokenizer.
    kept = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


SAMPLE_CODE = ("examples", "gaps", "grouping", "pieces", "samples", "splits", "stories", "table", "tally", "worlds")
"""Modules of ``shine/data`` that the samples of a source depend on, beside its sources."""


def code_fingerprint() -> str:
    """A hash of the code that makes samples, and of the chat format: an index made by other code is made again."""
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in SAMPLE_CODE] + sorted((here / "sources").glob("*.py"))
    files += [here.parent / name for name in ("chat.py", "pieces.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
