"""The two QA collections, rebuilt from public parts and written in the published schema.

A collection is one JSON list of ``{"context", "conversations": [{"role", "content"}, …], "contextlen", "conversationlen"}``,
written as a stream: what is held of a part is two numbers and a hash an item.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shine.data.examples import Example
from shine.data.histograms import Lengths
from shine.data.plans import CollectionConfig, PartConfig
from shine.data.sources import read_source
from shine.data.tally import Tally, answerable
from shine.files import file_written_beside


@dataclass
class PartReport:
    """What a part came to: counts, and lengths in tokens (of context and of conversation) of each item."""

    items: int = 0
    questions: int = 0
    duplicates: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    sha256: str = ""
    contexts: array[int] = field(default_factory=lambda: array("I"))
    conversations: array[int] = field(default_factory=lambda: array("I"))

    @property
    def lengths(self) -> Lengths:
        """For pictures."""
        return Lengths(np.asarray(self.contexts), np.asarray(self.conversations))

    def summary(self) -> dict[str, Any]:
        """Counts and length statistics, as plain values."""
        counts = {"items": self.items, "questions": self.questions, "duplicates": self.duplicates, "left_out": self.left_out}
        lengths = {"context_tokens": length_statistics(self.contexts), "conversation_tokens": length_statistics(self.conversations)}
        return {**counts, **lengths, "sha256": self.sha256}


def build_collection(
    config: CollectionConfig,
    output: str | Path,
    *,
    tokens: Callable[[str], int],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, PartReport]:
    """Read the parts one after the other and write ``output`` and ``<output>.manifest.json``, beside first and then renamed.

    Exact duplicates (the same context with the same conversation, in whichever part) are written once; questions without an answer
    are left out; both are counted.

    Args:
        tokens: how long a text is.
        say: told of each part when it is done.

    Raises:
        ValueError: a part is not on this machine, or is damaged; no part has an item; ``output`` is there and not written by us.
    """
    check_parts(config)
    check_output(output)
    # The questions of a context may come one by one.
    tokens = lru_cache(maxsize=8)(tokens)
    output = Path(output).expanduser()
    with file_written_beside(output) as stream:
        whole = _Hashing(stream)
        reports = _write_parts(config, whole, tokens, say)
        if not any(report.items for report in reports.values()):
            raise ValueError(
                f"no item in any part ({', '.join(reports)}), so {output} was not written: look at their splits, limits and shares"
            )
    manifest = {
        "file": output.name,
        "sha256": whole.sha256.hexdigest(),
        "bytes": whole.size,
        "form": config.form,
        "seed": config.seed,
        "items": sum(report.items for report in reports.values()),
        "parts": {name: {**_described(config.parts[name]), **report.summary()} for name, report in reports.items()},
    }
    with file_written_beside(_manifest(output)) as stream:
        stream.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    return reports


def _write_parts(
    config: CollectionConfig, whole: _Hashing, tokens: Callable[[str], int], say: Callable[[str], None]
) -> dict[str, PartReport]:
    seen: set[int] = set()
    reports = {}
    separator = b"[\n"
    for name, part in config.parts.items():
        report, digest = PartReport(), hashlib.sha256()
        for item in _items(part, config, report):
            line = json.dumps(_published(item, tokens, report), ensure_ascii=False).encode("utf-8")
            key = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big")
            if key in seen:
                report.duplicates += 1
                report.contexts.pop()
                report.conversations.pop()
                continue
            seen.add(key)
            report.items += 1
            report.questions += len(item.turns)
            digest.update(line)
            whole.write(separator + line)
            separator = b",\n"
        report.sha256 = digest.hexdigest()
        reports[name] = report
        say(f"{name}: {report.items:,} items, {report.questions:,} questions, {report.duplicates:,} duplicates dropped")
    whole.write(b"\n]\n")
    return reports


def check_output(output: str | Path) -> None:
    """Make sure that what will be replaced was built here, and not fetched: that is known by the manifest beside it.

    Raises:
        ValueError: it was not.
    """
    output = Path(output).expanduser()
    if output.exists() and not _manifest(output).exists():
        raise ValueError(
            f"{output} is there and has no {_manifest(output).name} beside it, so it was not built here (a download?): "
            "choose another --output, or delete it"
        )


def check_parts(config: CollectionConfig) -> None:
    """Make sure that every part is on this machine.

    Raises:
        ValueError: some are not; the message names them all, with the commands that fetch them.
    """
    parts = config.parts.items()
    missing = {name: part for name, part in parts if part.source.path is None or not Path(part.source.path).expanduser().exists()}
    if missing:
        lines = [f"  {name}: no {part.source.path}; {_fetch_command(part)}" for name, part in missing.items()]
        options = " ".join(f"--leave-out {name}" for name in missing)
        raise ValueError(
            f"{len(missing)} of {len(config.parts)} parts are missing:\n" + "\n".join(lines) + f"\nor build without: {options}"
        )


def without_parts(config: CollectionConfig, names: Iterable[str]) -> CollectionConfig:
    """The collection without some of its parts.

    Raises:
        ValueError: there is no such part, or none is left.
    """
    left_out = set(names)
    if unknown := sorted(left_out - set(config.parts)):
        raise ValueError(f"there is no part {unknown[0]!r} to leave out; there are {', '.join(config.parts)}")
    if left_out == set(config.parts):
        raise ValueError("every part is left out: keep at least one")
    return replace(config, parts={name: part for name, part in config.parts.items() if name not in left_out})


def length_statistics(lengths: array[int]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum; empty where there is nothing."""
    if not lengths:
        return {}
    values = np.frombuffer(lengths, dtype=np.uint32)
    median, high = np.percentile(values, [50, 95])
    return {"mean": round(float(values.mean()), 1), "median": float(median), "p95": float(high), "max": int(values.max())}


def published_item(example: Example, *, tokens: Callable[[str], int]) -> dict[str, Any]:
    """An example in the schema of ``ift_pwc.json``; each question is answered by its first answer."""
    messages = [
        {"role": role, "content": content}
        for turn in example.turns
        for role, content in (("user", turn.question), ("assistant", turn.answer))
    ]
    spoken = sum(tokens(message["content"]) for message in messages)
    return {"context": example.context, "conversations": messages, "contextlen": tokens(example.context), "conversationlen": spoken}


def _items(part: PartConfig, config: CollectionConfig, report: PartReport) -> Iterator[Example]:
    tally = Tally()
    for example in answerable(read_source(part.source, tally=tally), tally):
        # By the context alone, so that its questions stay together and no order matters.
        if part.share < 1 and random.Random(f"{config.seed} {example.context}").random() >= part.share:
            continue
        if config.form == "conversations":
            yield example
        else:
            yield from (replace(example, turns=(turn,)) for turn in example.turns)
    report.left_out = dict(tally.skipped)


def _published(example: Example, tokens: Callable[[str], int], report: PartReport) -> dict[str, Any]:
    item = published_item(example, tokens=tokens)
    report.contexts.append(item["contextlen"])
    report.conversations.append(item["conversationlen"])
    return item


def _described(part: PartConfig) -> Mapping[str, Any]:
    source = part.source
    where = {"path": source.path, "split": source.split, "kind": source.kind, "options": dict(source.options)}
    return {"hub": part.hub, "licence": part.licence, "share": part.share, **where}


def _manifest(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


def _fetch_command(part: PartConfig) -> str:
    return f"fetch {part.hub} there, as `sh scripts/download_data.sh` does"


class _Hashing:
    """A stream that is hashed and measured as it is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self.stream.write(content)
        self.sha256.update(content)
        self.size += len(content)
