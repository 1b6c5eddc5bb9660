"""New conversations about given contexts, written by a model and checked in a second pass.

Three passes, each with a journal of its own beside the output, so that a stopped run goes on where it was: writing (a request a
context), then for each pair whether its answer follows from the context, and whether it is known without it. What fails after all
attempts is kept in ``<output>.failures.jsonl`` and asked again by the next run; what it cost stays in ``<output>.spent.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field, StringConstraints

from shine.data.collection import published_item
from shine.data.examples import Example, Turn
from shine.data.plans import WritingConfig
from shine.data.sources import read_named
from shine.files import file_written_beside
from shine.journal import Journal
from shine.metrics import f1
from shine.remote import Request, Usage, ask, json_reader

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_CHARACTERS_A_TOKEN = 4
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    question: Text
    answer: Text


@dataclass(frozen=True)
class Written:
    """What the first pass answers."""

    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Supported:
    """What the check against the context answers."""

    supported: bool


@dataclass(frozen=True)
class Recalled:
    """What the check without the context answers."""

    answer: str


@dataclass
class WritingReport:
    """What a run came to; ``usage`` covers the earlier runs that this one went on from."""

    contexts: int = 0
    pairs: int = 0
    unsupported: int = 0
    known: int = 0
    unchecked: int = 0
    kept: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def __str__(self) -> str:
        failed = ", ".join(f"{count:,} {name}" for name, count in self.failures.items() if count) or "none"
        return (
            f"{self.contexts:,} contexts, {self.pairs:,} pairs written: {self.kept:,} kept, {self.unsupported:,} not supported by "
            f"their context, {self.known:,} known without it, {self.unchecked:,} not checked\nfailed requests: {failed}"
        )


@dataclass(frozen=True)
class Estimate:
    """What a run has before it.

    Attributes:
        contexts: still to be written about.
        checks: of pairs that earlier runs wrote, still to be made.
        usage: tokens of both, and of the checks of what is still to be written, at four characters a token.
    """

    contexts: int
    checks: int
    usage: Usage


def estimate(config: WritingConfig, output: str | Path) -> Estimate:
    """What writing to ``output`` will take, after what its journals hold.

    Raises:
        ValueError: a source or a journal cannot be read, or a journal was kept under another configuration.
    """
    written, supported, recalled, _ = _journals(config, output)
    done = {row["id"] for row in written.rows()}
    contexts = {name: _token_count(context) for name, context in _contexts(config)}
    left = [count for name, count in contexts.items() if name not in done]
    read = sum(left) + len(left) * _token_count(config.write)
    said = len(left) * config.turns * config.turn_tokens
    # Of the context of each support check that is still to be made, and the number of such recall checks.
    supports = [count for count in left for _ in range(config.turns)]
    recalls = len(left) * config.turns
    earlier = 0
    holds, answered = ({row["id"] for row in journal.rows()} for journal in (supported, recalled))
    for name, context, _ in _pairs(written, contexts):
        if name not in holds:
            supports.append(_token_count(context))
            earlier += 1
        if name not in answered:
            recalls += 1
            earlier += 1
    read += sum(supports) + len(supports) * (_token_count(config.support) + config.turn_tokens)
    read += recalls * (_token_count(config.recall) + config.turn_tokens)
    # A verdict is a few tokens, an answer about a third of its pair.
    said += len(supports) * 10 + recalls * (config.turn_tokens // 3)
    return Estimate(len(left), earlier, Usage(read, said))


def write_conversations(config: WritingConfig, output: str | Path, *, tokens: Callable[[str], int]) -> WritingReport:
    """Write ``output`` (the schema of ``ift_pwc.json``) and ``<output>.jsonl`` (ours), with the pairs that passed both checks.

    Contexts that are no longer in the sources stay in the journals and are neither checked nor written.

    Raises:
        ValueError: no key, a source or a journal that cannot be read, a journal kept under another configuration, another process
            that writes there.
    """
    output = Path(output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{output}.lock", timeout=0):
            return _write_alone(config, output, tokens)
    except Timeout:
        raise ValueError(f"another process is writing {output}: wait until it has ended, or choose another --output") from None


def _write_alone(config: WritingConfig, output: Path, tokens: Callable[[str], int]) -> WritingReport:
    report = WritingReport()
    written, supported, recalled, spent = _journals(config, output)
    for row in spent.rows():
        report.usage += Usage(**row["usage"])
    current = {name for name, _ in _contexts(config)}
    with _failures(output) as failures, spent:
        shared: dict[str, Any] = {"failures": failures, "spent": spent, "config": config, "report": report}
        write = (
            (_request(name, config.write, context=context, turns=str(config.turns)), {"context": context})
            for name, context in _contexts(config)
        )
        _run("writing", requests=write, kind=Written, journal=written, **shared)
        support = (
            (_request(name, config.support, context=context, question=pair.question, answer=pair.answer), _NOTHING)
            for name, context, pair in _pairs(written, current)
        )
        _run("support", requests=support, kind=Supported, journal=supported, **shared)
        recall = ((_request(name, config.recall, question=pair.question), _NOTHING) for name, _, pair in _pairs(written, current))
        _run("recall", requests=recall, kind=Recalled, journal=recalled, **shared)
    _assemble(config, output, (written, supported, recalled), current, report, tokens)
    return report


def _failures(output: Path) -> Journal:
    """An empty journal for what fails in this run; what failed in earlier ones goes to ``<output>.failures.earlier.jsonl``."""
    failures, earlier = (output.with_name(f"{output.name}.failures{more}.jsonl") for more in ("", ".earlier"))
    with Journal(earlier) as kept:
        for row in Journal(failures).rows():
            kept.append(row)
    failures.unlink(missing_ok=True)
    return Journal(failures)


def _run(
    name: str,
    *,
    requests: Iterable[tuple[Request, Mapping[str, Any]]],
    kind: type[Any],
    journal: Journal,
    failures: Journal,
    spent: Journal,
    config: WritingConfig,
    report: WritingReport,
) -> None:
    """One pass: what its journal does not hold yet is asked, and what fails goes to the failures.

    Args:
        requests: each with what its row in the journal holds beside the answer.
        kind: of the answer, a dataclass.
    """
    done = set()
    for row in journal.rows():
        done.add(row["id"])
        report.usage += Usage(**row["usage"])
    beside: dict[str, Mapping[str, Any]] = {}

    def still_open() -> Iterator[Request]:
        for request, more in requests:
            if request.id not in done:
                beside[request.id] = more
                yield request

    report.failures[name] = 0
    mark = _configuration(config)
    with journal:
        for reply in ask(still_open(), json_reader(kind), config=config.remote):
            more = beside.pop(reply.id)
            report.usage += reply.usage
            if reply.value is not None:
                row = {"id": reply.id, **more, **asdict(reply.value), "usage": asdict(reply.usage)}
                journal.append({**row, "configuration": mark})
            else:
                report.failures[name] += 1
                failures.append({"id": reply.id, "pass": name, "reason": reply.failure, "attempts": reply.attempts})
                if reply.usage != Usage():
                    spent.append({"id": reply.id, "pass": name, "usage": asdict(reply.usage), "configuration": mark})


def _assemble(
    config: WritingConfig,
    output: Path,
    journals: tuple[Journal, Journal, Journal],
    current: Container[str],
    report: WritingReport,
    tokens: Callable[[str], int],
) -> None:
    written, supported, recalled = journals
    holds = {row["id"]: row["supported"] for row in supported.rows()}
    answers = {row["id"]: row["answer"] for row in recalled.rows()}

    def passes(name: str, pair: Pair) -> bool:
        if name not in holds or name not in answers:
            report.unchecked += 1
        elif not holds[name]:
            report.unsupported += 1
        elif f1(answers[name], [pair.answer]) >= config.known_f1:
            report.known += 1
        else:
            return True
        return False

    with file_written_beside(output) as published, file_written_beside(output.with_name(f"{output.name}.jsonl")) as own:
        published.write(b"[")
        separator = b"\n"
        for row in written.rows():
            if row["id"] not in current:
                continue
            pairs = [(f"{row['id']}#{index}", Pair(**pair)) for index, pair in enumerate(row["pairs"])]
            turns = tuple(Turn(pair.question, (pair.answer,)) for name, pair in pairs if passes(name, pair))
            report.contexts += 1
            report.pairs += len(pairs)
            report.kept += len(turns)
            if turns:
                item = published_item(Example(row["id"], row["context"], turns), tokens=tokens)
                published.write(separator + _line(item))
                given = [{"question": turn.question, "answers": list(turn.answers)} for turn in turns]
                own.write(_line({"id": row["id"], "context": row["context"], "turns": given}) + b"\n")
                separator = b",\n"
        published.write(b"\n]\n")


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def _contexts(config: WritingConfig) -> Iterator[tuple[str, str]]:
    """Contexts under names that stay theirs when sources are reordered; the same context twice is one."""
    seen = set()
    for example in read_named(config.sources, "sources"):
        name = hashlib.blake2b(example.context.encode("utf-8"), digest_size=10).hexdigest()
        if example.context.strip() and name not in seen:
            seen.add(name)
            yield name, example.context


def _pairs(written: Journal, current: Container[str]) -> Iterator[tuple[str, str, Pair]]:
    for row in written.rows():
        for index, pair in enumerate(row["pairs"] if row["id"] in current else ()):
            yield f"{row['id']}#{index}", row["context"], Pair(**pair)


def _request(name: str, prompt: str, **values: str) -> Request:
    # Cut at the marks first, so that braces within a value are no marks.
    for key in values:
        prompt = prompt.replace(f"{{{key}}}", f"\0{key}\0")
    filled = "".join(values[part] if index % 2 else part for index, part in enumerate(prompt.split("\0")))
    return Request(name, [{"role": "user", "content": filled}])


def _token_count(text: str) -> int:
    return math.ceil(len(text) / _CHARACTERS_A_TOKEN)


def _configuration(config: WritingConfig) -> str:
    """What makes two runs one: with another model, prompt or number of turns their rows do not belong together."""
    said = json.dumps([config.remote.model, config.write, config.support, config.recall, config.turns])
    return hashlib.blake2b(said.encode("utf-8"), digest_size=8).hexdigest()


def _journals(config: WritingConfig, output: str | Path) -> tuple[Journal, Journal, Journal, Journal]:
    """Of the three passes, and of what was spent on requests that failed; none of them from another configuration."""
    output = Path(output).expanduser()
    written, supported, recalled, spent = (
        Journal(output.with_name(f"{output.name}.{name}.jsonl")) for name in ("written", "supported", "recalled", "spent")
    )
    mark = _configuration(config)
    for journal in (written, supported, recalled, spent):
        if any(row.get("configuration") != mark for row in journal.rows()):
            raise ValueError(
                f"{journal.path} was kept with another model, other prompts or another number of turns: choose another --output, "
                f"set them back, or delete {output}.*.jsonl to start anew"
            )
    return written, supported, recalled, spent
