"""Public question sets in their hub layouts: passages with the questions asked about them."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from shine.data.examples import Example, Turn
from shine.data.sources.files import Row, Source, json_value, label, parsed, spoken, texts

T = TypeVar("T")
NO_ANSWER = "No Answer Present."
"""What MS MARCO v2.1 has in place of an answer."""


def read_squad(
    source: Source, *, titles: Sequence[str] | None = None, pad_to: int | None = None, seed: int = 0
) -> Iterator[Example]:
    """``rajpurkar/squad``: one example a passage, with all its questions; every gold answer counts, the first is learned.

    SQuAD 2.0 has questions without an answer: they come without one.

    Args:
        titles: the articles to take, as the column ``title`` names them; an error at the end of the split where one was not there.
        pad_to: put each passage among others of the split, so many that contexts have this many tokens on average (published: 512,
            1,024 and 2,048).
        seed: of which others, and in which order.
    """
    columns = {"id": str, "context": str, "question": str, "answers": Mapping}
    if isinstance(titles, str) or (titles is not None and not titles):
        raise ValueError(f"options.titles={titles!r}: give a list of articles, as in [Geology,Islamism]")
    if titles is None:
        rows = parsed(source, columns, _squad_row)
    else:
        rows = _of_articles(parsed(source, {**columns, "title": str}, _titled_squad_row), titles, source)
    examples = _by_context(rows)
    return examples if pad_to is None else _among_others(list(examples), source, target=pad_to, seed=seed)


def _squad_row(row: Row, place: str) -> tuple[str, str, Turn]:
    answers = texts(row["answers"].get("text"), "answers", f"{place} ({row['id']})")
    return row["id"], row["context"], Turn(spoken(row, "question", place), tuple(dict.fromkeys(answers)))


def _titled_squad_row(row: Row, place: str) -> tuple[str, tuple[str, str, Turn]]:
    return row["title"], _squad_row(row, place)


def _of_articles(rows: Iterable[tuple[str, T]], titles: Sequence[str], source: Source) -> Iterator[T]:
    missing = set(titles)
    for title, row in rows:
        missing.discard(title)
        if title in titles:
            yield row
    if missing:
        raise ValueError(f"{source.config.path}: has no article {sorted(missing)[0]}; mend options.titles, or give another split")


def _by_context(rows: Iterable[tuple[str, str, Turn]]) -> Iterator[Example]:
    """Rows of (id, context, turn) as examples: rows in a row with one context belong together, and have the first one's id."""
    for context, group in itertools.groupby(rows, key=lambda row: row[1]):
        members = list(group)
        yield Example(id=members[0][0], context=context, turns=tuple(turn for _, _, turn in members))


def _among_others(examples: Sequence[Example], source: Source, *, target: int, seed: int) -> Iterator[Example]:
    lengths = [source.tokens(example.context) for example in examples]
    for index, example in enumerate(examples):
        rng = random.Random(f"{seed} {example.id}")
        members, total = [index], lengths[index]
        while len(members) < len(examples):
            other = rng.randrange(len(examples))
            if other in members:
                continue
            # Nearer to the target with it than without: above and below cancel out on average.
            if abs(total + lengths[other] - target) >= abs(total - target):
                break
            members.append(other)
            total += lengths[other]
        rng.shuffle(members)
        yield Example(example.id, "\n\n".join(examples[member].context for member in members), example.turns)


def read_race(source: Source, *, cloze: bool = True) -> Iterator[Example]:
    """``ehovy/race`` as question and answer: the question alone, answered by the text of the right option.

    Args:
        cloze: keep the questions that are sentences with a blank (about half of them).
    """
    columns = {"example_id": str, "article": str, "question": str, "options": Sequence, "answer": str}
    rows = parsed(source, columns, _race_row)
    kept = (row for row in rows if cloze or "_" not in row[2].question)
    for index, example in enumerate(_by_context(kept)):
        # One file of RACE may hold two passages.
        yield Example(f"{example.id}#{index}", example.context, example.turns)


def _race_row(row: Row, place: str) -> tuple[str, str, Turn]:
    options = texts(row["options"], "options", place)
    letters = "ABCD"[: len(options)]
    if row["answer"] not in tuple(letters):
        raise ValueError(f"{place}: the answer is {row['answer']!r}, not one of {', '.join(letters)}")
    return row["example_id"], row["article"], Turn(spoken(row, "question", place), (options[letters.index(row["answer"])].strip(),))


def read_hotpotqa(source: Source) -> Iterator[Example]:
    """``hotpotqa/hotpot_qa``, folder ``distractor``: ten paragraphs, two of which hold the answer; a turn's kind is its type."""
    return parsed(source, {"id": str, "question": str, "answer": str, "context": Mapping}, _hotpotqa_row, more=["type"])


def _hotpotqa_row(row: Row, place: str) -> Example:
    return _one_question(row, row["id"], _paragraphs(row["context"], place), [row["answer"]], place)


def read_2wiki(source: Source, *, aliases: str | None = None) -> Iterator[Example]:
    """2WikiMultihopQA: ``framolfese/2WikiMultihopQA`` (laid out as HotpotQA is), or ``xanhho/2WikiMultihopQA`` and the authors' own
    files (``_id``, and the context a list of titles with sentences, perhaps as JSON text).

    Args:
        aliases: the authors' ``id_aliases.json``. As in their script (``2wikimultihop_evaluate_v1.1.py``), the aliases and demonyms
            of the entity that is the answer count as golds too; rows name it in ``answer_id``, empty where the answer is none.
    """
    columns = {"question": str, "answer": str, "context": Mapping | Sequence | str}
    others = None if aliases is None else _other_names(source, aliases)
    parse = functools.partial(_2wiki_row, others=others)
    return parsed(source, columns, parse, more=["id", "_id", "type", "answer_id"])


def _2wiki_row(row: Row, place: str, *, others: Mapping[str, Sequence[str]] | None) -> Example:
    context = row["context"]
    if isinstance(context, str):
        try:
            context = json_value(context)
        except ValueError as error:
            raise ValueError(f"{place}: context is {error}; mend the file") from None
    name = label(row, "id", place) or label(row, "_id", place) or place
    if others is not None and "answer_id" not in row:
        raise ValueError(
            f'{place}: "answer_id" is missing, by which options.aliases knows the answer; read dev.json of '
            "the authors' data_ids_april7.zip, which has it, or set options.aliases=null"
        )
    more = [] if others is None else others.get(label(row, "answer_id", place), [])
    return _one_question(row, name, _paragraphs(context, place), [row["answer"], *more], place)


def _other_names(source: Source, path: str) -> dict[str, list[str]]:
    """Wikidata id of an entity -> how else it is called: a line of ``id_aliases.json`` has ``Q_id``, ``aliases``, ``demonyms``."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"options.aliases={path}: no such file; name the authors' id_aliases.json, or set it to null")
    config = replace(source.config, path=str(file), malformed="refuse")
    columns = {"Q_id": str, "aliases": Sequence, "demonyms": Sequence}
    return dict(parsed(replace(source, config=config), columns, _names_row))


def _names_row(row: Row, place: str) -> tuple[str, list[str]]:
    names = [*row["aliases"], *row["demonyms"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: aliases and demonyms must be lists of texts; mend the file")
    return row["Q_id"], [name for name in names if name.strip()]


def read_musique(source: Source) -> Iterator[Example]:
    """``dgslibisey/MuSiQue``: twenty paragraphs and a question of two to four hops; aliases of the answer count too.

    The questions that MuSiQue marks as unanswerable come without an answer.
    """
    return parsed(
        source,
        {"id": str, "paragraphs": Sequence, "question": str, "answer": str},
        _musique_row,
        more=["answer_aliases", "answerable"],
    )


def _musique_row(row: Row, place: str) -> Example:
    titled = []
    for paragraph in row["paragraphs"]:
        if not isinstance(paragraph, Mapping) or not isinstance(paragraph.get("paragraph_text"), str):
            raise ValueError(f'{place}: each of "paragraphs" needs a "paragraph_text"; mend the file')
        titled.append(f"{label(paragraph, 'title', place)}\n{paragraph['paragraph_text']}".strip())
    aliases, answerable = row.get("answer_aliases"), row.get("answerable")
    answers = [row["answer"], *([] if aliases is None else texts(aliases, "answer_aliases", place))]
    if not isinstance(answerable, bool | None):
        raise ValueError(f"{place}: answerable is {answerable!r:.60}, not true or false; mend the file")
    return _one_question(row, row["id"], "\n\n".join(titled), [] if answerable is False else answers, place)


def read_msmarco(source: Source, *, passages: Literal["all", "selected"] = "all") -> Iterator[Example]:
    """``microsoft/ms_marco``, folder ``v1.1`` or ``v2.1``: the passages that a search found, and what people answered.

    What has no answer comes without one. The kind of a turn is the query's type.

    Args:
        passages: ``all`` that were found, or only the ``selected`` ones, which the answer was written from.
    """
    if passages not in ("all", "selected"):
        raise ValueError(f"options.passages={passages}: choose all or selected")

    def parse(row: Row, place: str) -> Example:
        found = texts(row["passages"].get("passage_text"), "passages", place)
        chosen = row["passages"].get("is_selected")
        if not isinstance(chosen, list) or not all(isinstance(mark, int) for mark in chosen) or len(chosen) != len(found):
            raise ValueError(f"{place}: is_selected is {chosen!r:.60}, not 0 or 1 for each of {len(found)} passages; mend the file")
        kept = [text for text, mark in zip(found, chosen, strict=True) if mark or passages == "all"]
        if not all(isinstance(answer, str) for answer in row["answers"]):
            raise ValueError(f"{place}: answers is {row['answers']!r:.60}, not a list of texts; mend the file")
        answers = [answer for answer in row["answers"] if answer.strip() and answer != NO_ANSWER]
        turn = Turn(spoken(row, "query", place), tuple(dict.fromkeys(answers)), label(row, "query_type", place))
        return Example(str(row["query_id"]), "\n\n".join(kept), (turn,))

    columns = {"query": str, "query_id": int | str, "answers": Sequence, "passages": Mapping}
    return parsed(source, columns, parse, more=["query_type"])


def _one_question(row: Row, name: str, context: str, answers: Sequence[str], place: str) -> Example:
    golds = texts(answers, "answer", place)
    return Example(name, context, (Turn(spoken(row, "question", place), tuple(dict.fromkeys(golds)), label(row, "type", place)),))


def _paragraphs(context: Any, place: str) -> str:
    """Titles with their sentences: two lists side by side in a table, or a list of pairs."""
    pairs: list[tuple[Any, ...]] = []
    if isinstance(context, Mapping):
        titles, sentences = context.get("title"), context.get("sentences", context.get("content"))
        if isinstance(titles, list) and isinstance(sentences, list):
            if len(titles) != len(sentences):
                raise ValueError(f"{place}: context has {len(titles)} titles, {len(sentences)} lists of sentences; mend the file")
            pairs = list(zip(titles, sentences, strict=True))
    elif isinstance(context, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in context):
        pairs = [tuple(pair) for pair in context]
    if not pairs or not all(isinstance(t, str) and isinstance(s, list) and all(isinstance(x, str) for x in s) for t, s in pairs):
        raise ValueError(f"{place}: context is {context!r:.60}, not titles with their sentences; mend the file")
    return "\n\n".join(f"{title}\n{' '.join(sentence.strip() for sentence in found)}" for title, found in pairs)
