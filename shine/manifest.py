"""The manifest of a folder: size and SHA-256 of every other file, written last, so that a whole folder can be told from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

MANIFEST_FILE = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write the manifest of what lies in ``folder`` now."""
    manifest = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST_FILE
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def damage(directory: Path) -> str | None:
    """What is wrong with a folder that has a manifest; ``None`` when every file is whole."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            file = directory / name
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"
    return None


def unlisted(directory: Path, names: Iterable[str]) -> list[str]:
    """Which of ``names`` lie in a whole folder (see `damage`) and are not in its manifest."""
    manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    return [name for name in names if name not in manifest and (directory / name).exists()]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
