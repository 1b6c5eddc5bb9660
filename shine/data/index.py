"""What was once read, tokenised and grouped, kept on disk: built by the first process that needs it, opened by all others."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
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
    if not (folder / META_FILE).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / META_FILE).exists():
                _build(folder, key, build, say=say)
    return folder, json.loads((folder / META_FILE).read_text(encoding="utf-8"))["noted"]


def _build(folder: Path, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], *, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    with written_beside(folder) as partial:
        text = json.dumps({"key": key, "noted": build(partial)}, default=str, indent=1)
        (partial / META_FILE).write_text(text + "\n", encoding="utf-8")
    say(f"read and tokenised in {time.monotonic() - started:.1f} s, kept in {folder}")


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


def code_fingerprint() -> str:
    """A hash of the code under ``shine/data`` and of the chat format: an index made by other code is made again."""
    here = Path(__file__).parent
    files = [*sorted(here.rglob("*.py")), here.parent / "chat.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
