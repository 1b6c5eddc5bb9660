"""Where examples come from: one small reader per kind of source, all giving the same `Example`.

Folders are read in the layout the hub gives them (``hf download``), whatever is in them: parquet, JSON or text.
"""

from __future__ import annotations

import codecs
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shine.config import SourceConfig
from shine.data.examples import Example, Turn
from shine.data.worlds import World


def read_source(config: SourceConfig) -> Iterator[Example]:
    """Examples of a source, one after the other.

    Raises:
        ValueError: an unknown kind, a missing folder, a column or field that is not there; the message names the place.
    """
    if config.kind not in READERS:
        raise ValueError(f"unknown data source {config.kind!r}: choose one of {', '.join(READERS)}")
    taken = inspect.signature(READERS[config.kind]).parameters.values()
    known = [option.name for option in taken if option.kind is inspect.Parameter.KEYWORD_ONLY]
    needed = [option.name for option in taken if option.kind is inspect.Parameter.KEYWORD_ONLY and option.default is option.empty]
    if unknown := sorted(set(config.options) - set(known)):
        raise ValueError(f"options.{unknown[0]}: a {config.kind!r} source does not take it (it takes {', '.join(known) or 'none'})")
    if missing := sorted(set(needed) - set(config.options)):
        raise ValueError(f"options.{missing[0]}: missing; a {config.kind!r} source needs it")
    examples = READERS[config.kind](config, **config.options)
    return itertools.islice(examples, config.skip, None if config.limit is None else config.skip + config.limit)


def read_named(sources: Mapping[str, SourceConfig], place: str) -> Iterator[Example]:
    """The examples of several named sources, one source after the other; an error says which one of ``place`` it was."""
    for name, source in sources.items():
        try:
            yield from read_source(source)
        except ValueError as error:
            raise ValueError(f"{place}.{name}: {error}") from None


def look_into(sources: Mapping[str, SourceConfig], place: str) -> None:
    """Read the first example of each source, so that what is wrong with one is said before a large model is loaded."""
    for name, source in sources.items():
        next(read_named({name: source}, place), None)


def read_squad(config: SourceConfig) -> Iterator[Example]:
    """SQuAD: one example a passage, with all its questions; every gold answer counts, the first is learned.

    SQuAD 2.0 has questions without an answer: they come without one.
    """
    rows = _rows(config, {"id": str, "context": str, "question": str, "answers": Mapping})
    for context, group in itertools.groupby(rows, key=lambda row: row["context"]):
        members = list(group)
        turns = tuple(Turn(row["question"].strip(), tuple(dict.fromkeys(_answers(row, config)))) for row in members)
        yield Example(id=members[0]["id"], context=context, turns=turns)


def _answers(row: Mapping[str, Any], config: SourceConfig) -> list[str]:
    texts = row["answers"].get("text")
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{config.path}: example {row['id']}: answers is {row['answers']!r:.60}, not a list of texts under 'text'")
    return list(texts)


def read_race(config: SourceConfig, *, cloze: bool = True) -> Iterator[Example]:
    """RACE as question and answer: the question alone, answered by the text of the right option.

    Args:
        cloze: keep the questions that are sentences with a blank (about half of them).
    """
    rows = _rows(config, {"example_id": str, "article": str, "question": str, "options": Sequence, "answer": str})
    for index, (article, group) in enumerate(itertools.groupby(rows, key=lambda row: row["article"])):
        members = [row for row in group if cloze or "_" not in row["question"]]
        turns = tuple(Turn(row["question"].strip(), (_right_option(row, config),)) for row in members)
        if turns:
            yield Example(id=f"{members[0]['example_id']}#{index}", context=article, turns=turns)


def _right_option(row: Mapping[str, Any], config: SourceConfig) -> str:
    letters = "ABCD"[: len(row["options"])]
    if row["answer"] not in tuple(letters):
        raise ValueError(
            f"{config.path}: example {row['example_id']}: the answer is {row['answer']!r}, not one of {', '.join(letters)}"
        )
    return str(row["options"][letters.index(row["answer"])]).strip()


def read_text(config: SourceConfig, *, column: str = "text") -> Iterator[Example]:
    """Plain texts: one example a row of the ``text`` column, without turns; an empty row is an empty context."""
    for index, row in enumerate(_rows(config, {column: str | None})):
        yield Example(id=f"{config.split}-{index}", context=(row[column] or "").strip())


def read_jsonl(config: SourceConfig) -> Iterator[Example]:
    """A user's own file, one object a line: ``{"context": ..., "turns": [{"question": ..., "answers": [...]}]}``.

    ``id`` and ``kind`` are optional, and so are the turns where only the context matters.
    """
    path = _existing(config)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the file in it, one JSON object a line")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(line, f"{path}:{number}")


def read_worlds(
    config: SourceConfig,
    *,
    count: int,
    seed: int,
    facts: tuple[int, int] = World.facts,
    people: tuple[int, int] = World.people,
    kinds: tuple[int, int] = World.kinds,
) -> Iterator[Example]:
    """Invented worlds, ``count`` contexts drawn from ``seed``; the rest as in `World`."""
    bounds = {"facts": facts, "people": people, "kinds": kinds}
    try:
        pairs = {name: (int(least), int(most)) for name, (least, most) in bounds.items()}
        count, seed = int(count), int(seed)
    except (TypeError, ValueError):
        raise ValueError(f"worlds: each of {bounds} must be a pair of whole numbers, count and seed numbers") from None
    return World(seed=seed, **pairs).examples(count)


_NAMES = {str: "a text", str | None: "a text", Sequence: "a list", Mapping: "a table"}
READERS: dict[str, Callable[..., Iterator[Example]]] = {
    "squad": read_squad,
    "race": read_race,
    "text": read_text,
    "jsonl": read_jsonl,
    "worlds": read_worlds,
}


def _existing(config: SourceConfig) -> Path:
    if config.path is None:
        raise ValueError(f"data source {config.kind!r} needs a path: set it to the folder that holds the data")
    path = Path(config.path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; download the data there, or set the path of this {config.kind!r} source")
    return path


def _rows(config: SourceConfig, columns: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows of a folder in the hub's layout.

    Args:
        columns: what each row must hold, and of which type.
    """
    import datasets

    path = _existing(config)
    try:
        table = datasets.load_dataset(str(path), split=config.split, streaming=True)
        first = next(iter(table), None)
    except Exception as error:  # the library raises many kinds, each with its own text
        raise ValueError(f"{path}: cannot read split {config.split!r} ({type(error).__name__}: {error})") from error
    missing = [name for name in columns if first is not None and name not in first]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)} (there are {', '.join(first or {})}); is it a {config.kind!r} folder?"
        )
    return _checked(table, columns, f"{path}, split {config.split}")


def _checked(table: Iterable[Mapping[str, Any]], columns: Mapping[str, Any], place: str) -> Iterator[Mapping[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(table, start=1):
            for name, kind in columns.items():
                if not isinstance(row[name], kind):
                    raise ValueError(f"{place}, row {number}: {name} is {row[name]!r:.60}, not {_NAMES[kind]}; mend the file")
            yield row
    except (GeneratorExit, ValueError):
        raise
    except Exception as error:  # a damaged file shows in the middle of reading
        raise ValueError(f"{place}: damaged after row {number} ({type(error).__name__}: {error}); download it again") from error


def _parse_line(line: bytes, place: str) -> Example:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    context = row.get("context") if isinstance(row, dict) else None
    if not isinstance(context, str) or not context.strip():
        raise ValueError(f'{place}: "context" must be a text that is not empty')
    turns = []
    given = row.get("turns", [])
    if not isinstance(given, list):
        raise ValueError(f'{place}: "turns" must be a list')
    for turn in given:
        answers = turn.get("answers") if isinstance(turn, dict) else None
        question = turn.get("question") if isinstance(turn, dict) else None
        if not isinstance(question, str) or not question.strip() or not isinstance(answers, list):
            raise ValueError(f'{place}: each turn needs a "question" (a text that is not empty) and "answers" (list of texts)')
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise ValueError(f'{place}: "answers" must hold at least one text, none of them empty')
        turns.append(Turn(question, tuple(answers), str(turn.get("kind", ""))))
    return Example(id=str(row.get("id", place)), context=context, turns=tuple(turns))
