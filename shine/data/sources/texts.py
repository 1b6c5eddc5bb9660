"""Plain texts without questions, for pretraining and for giving texts back."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from shine.data.examples import Example
from shine.data.sources.files import Source, existing, parsed

_TITLE = re.compile(r"\s*= ([^=].*[^=]) =\s*")
_WORD = re.compile(r"\s*\S+\s*")
SUFFIXES = (".txt", ".md")


def read_text(source: Source, *, column: str = "text") -> Iterator[Example]:
    """Plain texts, such as ``fxmeng/transmla_pretrain_6B_tokens``: one example a row of the ``text`` column, without turns.

    An empty row is an empty context.
    """
    rows = parsed(source, {column: str | None}, lambda row, place: (row[column] or "").strip())
    return (Example(id=f"{source.config.split}-{index}", context=text) for index, text in enumerate(rows))


def read_wikitext(source: Source, *, lengths: Sequence[int] = (), of_each: int | None = None) -> Iterator[Example]:
    """WikiText (``Salesforce/wikitext``), whose rows are lines: one example an article, its title the id.

    Args:
        lengths: cut each article into pieces of at most so many tokens, taking these lengths in turn over all articles. The rest
            of an article that is shorter than its turn's length is left out, so that each length is really tested.
        of_each: at most so many pieces of each article, for pieces of one article are much alike.
    """
    if not all(isinstance(length, int) and length > 0 for length in lengths):
        raise ValueError(f"options.lengths={list(lengths)}: whole numbers of tokens, above zero")
    if of_each is not None and (of_each < 1 or not lengths):
        raise ValueError(f"options.of_each={of_each}: how many pieces of an article, at least one, and lengths to cut them to")
    rows = parsed(source, {"text": str}, lambda row, place: row["text"])
    wanted = itertools.cycle(lengths)
    for title, article in _articles(rows):
        if not lengths:
            yield Example(title, article)
            continue
        pieces = itertools.islice(_pieces(article, wanted, source), of_each)
        for number, piece in enumerate(pieces, start=1):
            yield Example(f"{title}#{number}", piece)


def _articles(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    title, body = "", list[str]()
    for line in lines:
        found = _TITLE.fullmatch(line)
        # A heading of the first level stands between blank lines; "= =" is one of a lower level.
        if found and not found[1].startswith("= "):
            if body:
                yield title, "\n".join(body)
            title, body = found[1], []
        if line.strip():
            body.append(line.strip())
    if body:
        yield title, "\n".join(body)


def _pieces(text: str, lengths: Iterator[int], source: Source) -> Iterator[str]:
    ends = [0, *(match.end() for match in _WORD.finditer(text))]
    begin = 0
    while begin < len(ends) - 1:
        length = next(lengths)
        # A word has at least one token, so at most ``length`` words fit.
        counts = range(1, min(len(ends) - 1 - begin, length) + 1)
        fitting = bisect_right(counts, length, key=lambda count: source.tokens(text[ends[begin] : ends[begin + count]].strip()))
        piece = text[ends[begin] : ends[begin + max(fitting, 1)]].strip()
        begin += max(fitting, 1)
        if begin == len(ends) - 1 and source.tokens(piece) < 0.9 * length:
            return
        yield piece


def read_folder(source: Source) -> Iterator[Example]:
    """A folder of your own text files (``.txt``, ``.md``), folders below included: one example a file, its path the id."""
    folder = existing(source.config)
    files = (
        sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if folder.is_dir()
        else [folder]
    )
    if not files:
        raise ValueError(f"{folder}: holds no {' or '.join(SUFFIXES)} file")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            if source.config.malformed == "refuse":
                raise ValueError(f"{file}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
            source.skip("malformed", f"{file}: not UTF-8")
            continue
        yield Example(str(file.relative_to(folder)) if file != folder else file.name, text.strip())
