"""Rows of files on this machine, each with the place it stands in, so that whatever is wrong with one can be named.

Folders are read in the layout the hub gives them (``hf download``); the ``datasets`` library finds the files of a split there. Read
are parquet, JSON (one object a line, or one list of objects), and plain text (one row a line), the latter two also as ``.gz``.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ijson
import pyarrow as pa
import pyarrow.parquet as pq

from shine.config import SourceConfig
from shine.data.sources.json_lists import list_items

T = TypeVar("T")
Row = Mapping[str, Any]
_NAMES = {
    str: "a text",
    str | None: "a text",
    int: "a whole number",
    int | str: "a text or a whole number",
    Sequence: "a list",
    Mapping: "a table",
    Mapping | Sequence | str: "titles with their sentences",
    bool: "true or false",
}
_ODD = (TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What a value of a shape that nobody thought of makes a parser raise."""
_DAMAGED = (pa.ArrowException, ijson.JSONError, EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class Source:
    """What a reader is given beside its own options.

    Attributes:
        config: kind, path, split and the rest.
        skip: counts what is left out, by reason and place.
        tokens: how many tokens a text has, for readers that cut or fill to a length.
    """

    config: SourceConfig
    skip: Callable[[str, str], None]
    tokens: Callable[[str], int]


def existing(config: SourceConfig) -> Path:
    """The folder or file of a source.

    Raises:
        ValueError: it has no path, or there is nothing there.
    """
    if config.path is None:
        raise ValueError(f"data source {config.kind!r} needs a path: set it to the folder that holds the data")
    path = Path(config.path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; download the data there, or set the path of this {config.kind!r} source")
    return path


def split_files(config: SourceConfig) -> list[Path]:
    """The files of the source's split: the path itself where it is a file, else what the hub's layout says.

    Raises:
        ValueError: nothing there can be read, or there is no such split.
    """
    path = existing(config)
    if path.is_file():
        return [path]
    import datasets

    try:
        found = datasets.load_dataset_builder(str(path)).config.data_files
    except Exception as error:  # the library raises many kinds, each with its own text
        folders = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")))
        more = f"; its folders are {folders}" if folders else ""
        raise ValueError(f"{path}: holds no data set ({_first_line(error)}){more}: name the folder or file that does") from error
    splits = {str(name): [Path(file) for file in files] for name, files in (found or {}).items()}
    if config.split not in splits:
        raise ValueError(f"{path}: cannot read split {config.split!r}: there are {', '.join(splits) or 'no files'}; set split")
    return splits[config.split]


def parsed(source: Source, columns: Mapping[str, Any], parse: Callable[[Row, str], T], *, more: Sequence[str] = ()) -> Iterator[T]:
    """What ``parse(row, place)`` makes of every row of a split.

    A row that lacks a column, has a value of another type, or that ``parse`` refuses with a ``ValueError`` is an error that names
    its place, or is counted and left out where the source says ``malformed: skip``. A file that cannot be read on is always an
    error.

    Args:
        columns: what each row must hold, and of which type.
        more: columns to read where they are there.
    """
    for file in split_files(source.config):
        for place, row in _file_rows(file, kind=source.config.kind, wanted=[*columns, *more], needed=list(columns)):
            try:
                value = _parsed_row(row, columns, parse, place)
            except ValueError as error:
                if source.config.malformed == "refuse":
                    raise
                source.skip("malformed", str(error))
            else:
                yield value


def _parsed_row(row: Any, columns: Mapping[str, Any], parse: Callable[[Row, str], T], place: str) -> T:
    try:
        return parse(checked(row, columns, place), place)
    except _ODD as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"{place}: not laid out as this kind of source is ({said}); mend the file") from error


def checked(row: Any, columns: Mapping[str, Any], place: str) -> Row:
    """``row``, if it is a table that holds these columns of these types."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: {row!r:.60} is not a JSON object with {', '.join(columns)}; mend the file")
    for name, kind in columns.items():
        if name not in row:
            raise ValueError(f'{place}: "{name}" is missing (there are {", ".join(row)}); mend the file')
        value = row[name]
        # A text is a sequence too, but never the list that is meant; true is a number to Python alone.
        taken_for = (kind is Sequence and isinstance(value, str)) or (kind is not bool and isinstance(value, bool))
        if not isinstance(value, kind) or taken_for:
            raise ValueError(f"{place}: {name} is {value!r:.60}, not {_NAMES[kind]}; mend the file")
    return row


def spoken(row: Row, name: str, place: str) -> str:
    """The text under ``name``, if it is not blank."""
    text = str(row[name]).strip()
    if not text:
        raise ValueError(f"{place}: {name} is {row[name]!r:.60}, not a text that is not empty; mend the file")
    return text


def label(row: Row, name: str, place: str) -> str:
    """The text or whole number under ``name``, as a text; empty where there is none."""
    value = row.get(name)
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise ValueError(f"{place}: {name} is {value!r:.60}, not a text or a whole number; mend the file")
    return "" if value is None else str(value)


def texts(value: Any, name: str, place: str) -> list[str]:
    """``value``, if it is a list of texts none of which is blank."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(t, str) and t.strip() for t in value):
        raise ValueError(f"{place}: {name} is {value!r:.60}, not a list of texts that are not empty; mend the file")
    return list(value)


def _file_rows(file: Path, *, kind: str, wanted: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Rows and their places; a row that could not even be read is the ``ValueError`` that says so."""
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet_rows(file, kind=kind, wanted=wanted, needed=needed)
    if name.endswith((".json", ".jsonl", ".ndjson")):
        return _json_list_rows(file) if _begins_a_list(file) else _json_line_rows(file)
    if name.endswith(".txt"):
        return _line_rows(file, lambda line, place: {"text": line}, skip_blank=False)
    raise ValueError(f"{file}: cannot be read; convert it to .parquet, .json, .jsonl or .txt")


def _parquet_rows(file: Path, *, kind: str, wanted: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[str, Row]]:
    number = 0
    # Damage inside a parquet file shows as an error of the system too.
    with _damage_named(file, lambda: f"row {number}", OSError, UnicodeDecodeError), pq.ParquetFile(file) as table:
        there = table.schema_arrow.names
        if missing := [name for name in needed if name not in there]:
            raise ValueError(f"{file}: no column {', '.join(missing)} (there are {', '.join(there)}); is it a {kind!r} source?")
        for batch in table.iter_batches(batch_size=256, columns=[name for name in wanted if name in there]):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row


def _json_list_rows(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with _damage_named(file, lambda: f"item {number}"), _opened(file) as stream:
        for row in list_items(_without_mark(stream)):
            number += 1
            place = f"{file}, item {number}"
            yield place, ValueError(f"{place}: {row}") if isinstance(row, ValueError) else row


def _json_line_rows(file: Path) -> Iterator[tuple[str, Any]]:
    for number, (place, row) in enumerate(_line_rows(file, _json_line, skip_blank=True)):
        if number == 0 and isinstance(row, ValueError):
            # An object over several lines, or no JSON at all: mending one line would not do.
            row = ValueError(f"{row}; as it stands the file is not a list of objects and not one object a line")
        yield place, row


def _line_rows(file: Path, parse: Callable[[str, str], Any], *, skip_blank: bool) -> Iterator[tuple[str, Any]]:
    number = 0
    with _damage_named(file, lambda: f"line {number}"), _opened(file) as stream:
        for line in _without_mark(stream):
            number += 1
            place = f"{file}:{number}"
            try:
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                yield place, ValueError(f"{place}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8")
                continue
            if text.strip() or not skip_blank:
                yield place, parse(text, place)


def _json_line(line: str, place: str) -> Any:
    """The value on a line, or the error that says why there is none."""
    try:
        return json_value(line)
    except ValueError as error:
        return ValueError(f"{place}: {error}; mend the line")


def json_value(text: str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: it holds none, or half a character; the message says why, not where.
    """
    try:
        value = json.loads(text)
        # Only an escape can stand for half a character, which is no text.
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else _first_line(error)
        raise ValueError(f"not JSON ({where})") from None


def _begins_a_list(file: Path) -> bool:
    with _damage_named(file, lambda: "its beginning"), _opened(file) as stream:
        return _without_mark(stream).read(4096).lstrip().startswith(b"[")


def _opened(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _without_mark(stream: BinaryIO) -> BinaryIO:
    """The stream after its byte order mark, if it has one."""
    if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        stream.seek(0)
    return stream


@contextmanager
def _damage_named(file: Path, after: Callable[[], str], *more: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (*_DAMAGED, *more) as error:
        raise ValueError(f"{file}: damaged after {after()} ({_first_line(error)}); download or write it again") from error


def _first_line(error: BaseException) -> str:
    # The parser of JSON lists says it in bytes.
    said = error.args[0].decode("utf-8", "replace") if error.args and isinstance(error.args[0], bytes) else str(error)
    return next((line.strip().rstrip(".") for line in said.splitlines() if line.strip()), type(error).__name__)
