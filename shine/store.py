"""A folder of adapters by name: each context in versions, any of them composed into one adapter.

``store/NAME/1``, ``store/NAME/2``, ...: adapters as `LoRA.save` writes them, the highest number being the current one. A version is
never written over, so that an engine which loaded it by name and path keeps what it has.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from shine.adapter_files import read_provenance, read_shapes
from shine.lora import LoRA
from shine.provenance import Provenance

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Entry:
    """A context in the store: its current version and where that comes from.

    Attributes:
        damage: why it cannot be read, with the remedy; ``None`` for one that can.
    """

    name: str
    version: int
    folder: Path
    provenance: tuple[Provenance, ...]
    damage: str | None = None


class Store:
    """Adapters in a plain folder, which is made when something is added. Processes that write at once take turns.

    Raises:
        ValueError: (any method) a name that is not there, is there already, or cannot be one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def list(self) -> list[Entry]:
        """What is in it, in the order of the names; a damaged adapter says so in its entry and hides no other."""
        return [self._look_at(name) for name in self._names()]

    def entry(self, name: str) -> Entry:
        """The current version of one context."""
        version, folder = self._current(name)
        return Entry(name, version, folder, read_provenance(folder))

    def add(self, name: str, lora: LoRA) -> Entry:
        """Keep a new context's adapter under a name of its own."""
        with self._writing(name):
            if self._versions(name):
                raise ValueError(f"{name!r} is in {self.folder} already: update it, or choose another name")
            return self._write(name, lora, 1)

    def update(self, name: str, lora: LoRA) -> Entry:
        """A new version of a context; one that was read from the same text by the same hypernetwork changes nothing.

        It is written all the same where the one before is damaged.
        """
        with self._writing(name):
            before = self._look_at(name)
            if before.damage is None and lora.provenance and _what(before.provenance) == _what(lora.provenance[0]):
                return before
            return self._write(name, lora, before.version + 1)

    def forget(self, name: str) -> None:
        """Remove a context with all its versions."""
        with self._writing(name):
            self._current(name)
            # Renamed first: who looks finds it whole or not at all, whatever happens to this process.
            shutil.rmtree((self.folder / name).rename(self.folder / f".{name}.forgotten"))

    def load(self, name: str, *, version: int | None = None) -> LoRA:
        """The adapter of a context, the current version or an earlier one."""
        current, folder = self._current(name)
        if version is not None and version not in self._versions(name):
            raise ValueError(f"{name!r} has no version {version}; it has {', '.join(map(str, self._versions(name)))}")
        return LoRA.load(folder.with_name(str(version or current)))

    def compose(self, names: Sequence[str]) -> LoRA:
        """One adapter that holds these contexts: the exact sum of their current updates, ranks side by side.

        Composed again after `update`, only the span of the updated context is another.
        """
        if not names:
            raise ValueError("nothing to compose: name at least one context")
        return LoRA.concat([self.load(name) for name in names])

    def _current(self, name: str) -> tuple[int, Path]:
        """Number and folder of the current version, unread."""
        versions = self._versions(name)
        if not versions:
            raise ValueError(f"{self.folder} has no {name!r}; it has {', '.join(self._names()) or 'nothing yet'}")
        return versions[-1], self.folder / name / str(versions[-1])

    def _look_at(self, name: str) -> Entry:
        version, folder = self._current(name)
        try:
            read_shapes(folder)
            return self.entry(name)
        except ValueError as error:
            return Entry(name, version, folder, (), damage=str(error))

    def _names(self) -> Sequence[str]:
        names = sorted(child.name for child in self.folder.iterdir()) if self.folder.is_dir() else []
        return [name for name in names if self._versions(name)]

    def _versions(self, name: str) -> Sequence[int]:
        folder = self.folder / name
        if not _NAME.fullmatch(name) or not folder.is_dir():
            return []
        return sorted(int(child.name) for child in folder.iterdir() if re.fullmatch(r"[1-9]\d*", child.name))

    def _write(self, name: str, lora: LoRA, version: int) -> Entry:
        lora.save(self.folder / name / str(version))
        return self.entry(name)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a name: use letters, digits, '.', '-' and '_', a letter or digit first")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            # Nobody else writes now, so this is of a process that was killed.
            for left in (*self.folder.glob(".*.forgotten"), *(self.folder / name).glob(".*.partial")):
                shutil.rmtree(left, ignore_errors=True)
            yield


def _what(spans: Sequence[Provenance]) -> Sequence[tuple[object, ...]]:
    """What makes an adapter the same again: everything but when it was made, and what the context is called."""
    return [
        (s.context.sha256, s.context.read, s.context.pieces, s.rank, s.strength, s.hypernetwork.fingerprint, s.backbone.fingerprint)
        for s in spans
    ]
