"""Where examples come from: one small reader per kind of source, all giving the same `Example`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from shine.config import SourceConfig
from shine.data.examples import Example
from shine.data.sources.conversations import read_conversations, read_jsonl, read_msmarco_mqa
from shine.data.sources.files import Source
from shine.data.sources.gaps import read_gaps, read_recitations
from shine.data.sources.invented import read_worlds
from shine.data.sources.questions import read_2wiki, read_hotpotqa, read_msmarco, read_musique, read_race, read_squad
from shine.data.sources.reading_comprehension import (
    read_coqa,
    read_drop,
    read_duorc,
    read_narrativeqa,
    read_newsqa,
    read_pwc,
    read_quac,
    read_quail,
)
from shine.data.sources.stories import read_stories
from shine.data.sources.texts import read_folder, read_text, read_wikitext
from shine.data.splits import one_side
from shine.data.tally import Tally

READERS: dict[str, Callable[..., Iterator[Example]]] = {
    "text": read_text,
    "wikitext": read_wikitext,
    "folder": read_folder,
    "squad": read_squad,
    "race": read_race,
    "hotpotqa": read_hotpotqa,
    "musique": read_musique,
    "2wiki": read_2wiki,
    "msmarco": read_msmarco,
    "msmarco-mqa": read_msmarco_mqa,
    "quac": read_quac,
    "coqa": read_coqa,
    "drop": read_drop,
    "narrativeqa": read_narrativeqa,
    "quail": read_quail,
    "pwc": read_pwc,
    "newsqa": read_newsqa,
    "duorc": read_duorc,
    "conversations": read_conversations,
    "jsonl": read_jsonl,
    "worlds": read_worlds,
    "stories": read_stories,
    "gaps": read_gaps,
    "recitations": read_recitations,
}
"""Kinds of sources. What a reader takes by keyword are the source's ``options``."""


def words(text: str) -> int:
    """A length for looks at data before there is a tokenizer."""
    return len(text.split())


def read_source(config: SourceConfig, *, tokens: Callable[[str], int] = words, tally: Tally | None = None) -> Iterator[Example]:
    """Examples of a source, one after the other.

    Args:
        tokens: how long a text is, for readers that cut or fill contexts to a length.
        tally: where rows that are left out are counted.

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

    if config.part != "all" and (reshaped := [name for name in ("pad_to", "lengths") if config.options.get(name)]):
        raise ValueError(
            f"options.{reshaped[0]}: contexts that are joined or cut cannot be split by context, since one would stand on both "
            "sides; set part=all"
        )

    def read(tally: Tally) -> Iterator[Example]:
        return READERS[config.kind](Source(config, tally.skip, tokens), **config.options)

    examples = read(tally or Tally())
    if config.part != "all":
        examples = one_side(examples, (example.context for example in read(Tally())), config)
    return itertools.islice(examples, config.skip, None if config.limit is None else config.skip + config.limit)


def read_named(
    sources: Mapping[str, SourceConfig], place: str, *, tokens: Callable[[str], int] = words, tally: Tally | None = None
) -> Iterator[Example]:
    """The examples of several named sources, one source after the other; an error says which one of ``place`` it was."""
    for name, source in sources.items():
        try:
            yield from read_source(source, tokens=tokens, tally=tally)
        except ValueError as error:
            raise ValueError(f"{place}.{name}: {error}") from None


def look_into(sources: Mapping[str, SourceConfig], place: str) -> None:
    """Read the first example of each source, so that what is wrong with one is said before a large model is loaded."""
    for name, source in sources.items():
        # Not through a split by context, which would read all of it.
        next(read_named({name: replace(source, part="all")}, place), None)
