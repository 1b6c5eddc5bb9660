"""A result folder while it grows and when it is whole.

Each rank appends what it has computed to a part file of its own, one unit at a time: the predictions of one method for one batch
of contexts. What a killed run left of a unit does not count, and the unit is computed again, in the same batch. When every unit is
there, the parts become ``predictions.jsonl``, in the order of the plan, so that the file is the same, byte for byte, whoever
computed what and however often the run was interrupted. Times, which are never twice the same, lie in ``timings.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from shine.data.examples import Example
from shine.files import file_written_beside

PREDICTIONS_FILE, SUMMARY_FILE, TIMINGS_FILE, PLAN_FILE = "predictions.jsonl", "summary.json", "timings.jsonl", "plan.json"
Row = Mapping[str, Any]
Key = tuple[str, str, str, Any]


@dataclass(frozen=True)
class Unit:
    """What is computed and written in one piece.

    Attributes:
        number: its place in the plan.
        examples: one batch of contexts.
        task: of a pretraining evaluation, else empty.
    """

    number: int
    source: str
    method: str
    examples: tuple[Example, ...]
    task: str = ""

    def predictions(self) -> list[Key]:
        """The key of each that it makes."""
        if self.task:
            return [(self.source, self.method, example.id, self.task) for example in self.examples]
        return [(self.source, self.method, example.id, turn) for example in self.examples for turn in range(len(example.turns))]


def key_of(row: Row) -> Key:
    """What tells a prediction from every other of its folder."""
    return row["source"], row["method"], row["id"], row["task"] if "task" in row else row["turn"]


class ResultFolder:
    """The files of one evaluation; the first rank opens and closes it, every rank appends to it.

    Args:
        order: the predictions of all units as they stand in the end.
        plan: what the predictions follow from; what a folder with another plan holds is set aside, and it is begun again.
    """

    def __init__(self, folder: Path, units: Sequence[Unit], order: Sequence[Key], plan: Mapping[str, Any]) -> None:
        assert sorted(map(str, order)) == sorted(str(key) for unit in units for key in unit.predictions())
        self.folder, self.units, self.order = folder, units, order
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))
        self._lock = FileLock(folder / ".lock")

    def open(self, *, resume: bool) -> tuple[set[int], str]:
        """Make the folder ready and return the numbers of the units that are done, and what to tell the reader.

        Until `release`, or the end of this process, no other evaluation can open it.

        Raises:
            ValueError: another one has it open: also one whose launcher was killed and whose ranks live on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"output={self.folder}: another evaluation is writing there; let it end, end its processes, or choose another "
                "folder"
            ) from None
        found = {**self._rows(), **_by_key(_whole_lines(self.folder / PREDICTIONS_FILE))}
        note = ""
        if found and not (resume and self._same_plan()):
            note, found = f"begins again: the evaluation that was in {self.folder} is in {self._set_aside()}", {}
        done = {unit.number for unit in self.units if all(key in found for key in unit.predictions())}
        if done:
            note = f"goes on with {len(done)} of {len(self.units)} batches that are in {self.folder}"
        kept = [found[key] for unit in self.units if unit.number in done for key in unit.predictions()]
        timings = [row for row in _whole_lines(self.folder / TIMINGS_FILE) if row["unit"] in done]
        # Before anything else: a run that fails leaves no old summary beside new predictions.
        (self.folder / SUMMARY_FILE).unlink(missing_ok=True)
        _replace(self.part(0), kept)
        _replace(self.folder / TIMINGS_FILE, timings)
        _replace(self.folder / PLAN_FILE, [self.plan])
        for other in [*self.parts()[1:], self.folder / PREDICTIONS_FILE]:
            other.unlink(missing_ok=True)
        return done, note

    def append(self, rank: int, unit: Unit, rows: Sequence[Row], timing: Row) -> None:
        """Write a unit down. Its time first: a unit without its time would be one that counts and took none."""
        with (self.folder / TIMINGS_FILE).open("ab") as lines:
            lines.write(_lines([{"unit": unit.number, "source": unit.source, "method": unit.method, **timing}]))
        with self.part(rank).open("ab") as lines:
            lines.write(_lines(rows))

    def close(self) -> list[Row]:
        """Merge the parts into ``predictions.jsonl`` and return its rows.

        Raises:
            RuntimeError: a prediction is missing.
        """
        found = self._rows()
        if missing := [key for key in self.order if key not in found]:
            raise RuntimeError(
                f"{self.folder}: {len(missing)} predictions are missing, {missing[0]} first; start it again to go on"
            )
        rows = [found[key] for key in self.order]
        _replace(self.folder / PREDICTIONS_FILE, rows)
        for part in self.parts():
            part.unlink()
        return rows

    def release(self) -> None:
        """Let others open the folder."""
        self._lock.release()

    def timings(self) -> list[Row]:
        """The last time that each unit took."""
        return list({row["unit"]: row for row in _whole_lines(self.folder / TIMINGS_FILE)}.values())

    def part(self, rank: int) -> Path:
        """Where a rank appends."""
        return self.folder / f"predictions.part-{rank:04d}.jsonl"

    def parts(self) -> list[Path]:
        """The part files that are there."""
        return sorted(self.folder.glob("predictions.part-*.jsonl"))

    def _rows(self) -> dict[Key, Row]:
        return _by_key(row for part in self.parts() for row in _whole_lines(part))

    def _same_plan(self) -> bool:
        return list(_whole_lines(self.folder / PLAN_FILE)) == [self.plan]

    def _set_aside(self) -> Path:
        """Move all that an evaluation and its judges wrote into a folder that says when, whole enough to be reported on."""
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        names = chain([now], (f"{now}_{number}" for number in count(2)))
        place = next(path for name in names if not (path := self.folder / "abandoned" / name).exists())
        place.mkdir(parents=True)
        judged = sorted(self.folder.glob("judge-*.json*"))
        # Predictions last: while one is left here, a start after a kill sees that there is something to set aside.
        files = [*judged, *(self.folder / name for name in (SUMMARY_FILE, TIMINGS_FILE, PLAN_FILE)), *self.parts()]
        for file in (*files, self.folder / PREDICTIONS_FILE):
            if file.exists():
                file.rename(place / file.name)
        return place


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a whole file."""
    with file.open("rb") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    return {key_of(row): row for row in rows}


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, without a last line that a kill cut short."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _replace(file: Path, rows: Iterable[Row]) -> None:
    with file_written_beside(file) as lines:
        lines.write(_lines(rows))
