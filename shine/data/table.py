"""Rows in an Arrow file, read where they lie: any number of them takes no memory but what the system lends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

T = TypeVar("T")
CHUNK = 1024
"""Rows written at once."""


class Table:
    """Rows of one schema on disk (memory-mapped) or in memory, read one at a time in any order."""

    def __init__(self, source: Path | pa.Buffer) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(source)) if isinstance(source, Path) else source)
        self._schema = reader.schema
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def value(self, column: str, row: int) -> Any:
        """One value; a list of numbers comes as a numpy array that shares the file's memory."""
        chunk = bisect_right(self._ends, row)
        scalar = self._batches[chunk].column(column)[row - (self._ends[chunk - 1] if chunk else 0)]
        return scalar.values.to_numpy() if isinstance(scalar, pa.ListScalar) else scalar.as_py()

    def column(self, name: str) -> pa.ChunkedArray:
        """All values of a column."""
        return pa.chunked_array([batch.column(name) for batch in self._batches], type=self._schema.field(name).type)


def write_table(sink: Path | None, schema: Mapping[str, pa.DataType], rows: Iterable[Mapping[str, Any]]) -> Table:
    """Write rows as they come, to a file or to memory (``None``), and open what was written."""
    memory = pa.BufferOutputStream()
    columns = pa.schema(schema.items())
    with pa.OSFile(str(sink), "wb") if sink is not None else memory as stream, pa.ipc.new_file(stream, columns) as writer:
        for chunk in in_chunks(rows, CHUNK):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=columns))
    return Table(sink if sink is not None else memory.getvalue())


def in_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last perhaps shorter, without holding more than one."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
