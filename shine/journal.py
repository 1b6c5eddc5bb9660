"""Rows of JSON appended to a file as they come, so that what was stopped or killed goes on after its last row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Journal:
    """A file of JSON objects, one a line. As a context it is open for `append`.

    A row reaches the system before `append` returns; the torn last line that a killed process leaves is no row, and opening
    removes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows so far, none if there is no file.

        Raises:
            ValueError: a line before the last is not a JSON object; the message names file and line.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{self.path}:{number}: damaged ({error}); delete this line, or the file") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{self.path}:{number}: not a JSON object; delete this line, or the file")
                yield row

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(_end_of_last_line(self.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def _end_of_last_line(path: Path, *, block: int = 1 << 16) -> int:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - block, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
