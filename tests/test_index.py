"""The index on disk: one for each tokenizer, budget and state of the data, made once however many processes ask."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tokenizer
from filelock import FileLock
from test_samples import stage

from shine.cli.main import main
from shine.config import SourceConfig, TaskTokens
from shine.data import index
from shine.data.build import build_samples, samples_of
from shine.data.samples import StageSamples
from shine.data.worlds import World

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = tiny_tokenizer()
MERGED = tiny_tokenizer(merges=[("a", "b")])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    file = tmp_path / "mine.jsonl"
    rows = [f'{{"context": "ab c{n}", "turns": [{{"question": "q{n}", "answers": ["a"]}}]}}\n' for n in range(5)]
    file.write_text("".join(rows))
    return SourceConfig("jsonl", str(file))


def build(
    source: SourceConfig, name: str = "mqa", *, tokenizer: Any = TOKENIZER, said: list[str] | None = None, **lengths: int
) -> StageSamples:
    say = (said if said is not None else []).append
    return build_samples(
        {"mine": source}, "data.train", tokenizer, stage(name, **lengths), task_tokens=TaskTokens(), seed=0, say=say
    )


def ids(samples: StageSamples) -> list[Any]:
    return [samples.sample(number, epoch=0) for number in range(len(samples))]


def indexes() -> list[Path]:
    return sorted(path for path in index.index_folder().iterdir() if path.is_dir())


@pytest.mark.parametrize("name", ["pretrain", "mqa", "1qa"])
def test_an_index_is_made_once_and_gives_the_same_samples_again(source: SourceConfig, name: str) -> None:
    said: list[str] = []
    first, second = (build(source, name, said=said) for _ in range(2))
    assert len(said) == 1
    assert str(index.index_folder()) in said[0]
    assert ids(first) == ids(second) != []
    assert first.fingerprint == second.fingerprint
    assert str(first.tally) == str(second.tally)
    assert first.lengths.tolist() == second.lengths.tolist()


def test_what_was_skipped_is_still_counted_when_the_index_is_opened_again(source: SourceConfig) -> None:
    assert source.path is not None
    path = Path(source.path)
    path.write_text(path.read_text() + '{"context": "no question"}\n{\n')
    first, second = (build(replace(source, malformed="skip")) for _ in range(2))
    assert first.tally.skipped == second.tally.skipped == {"no question": 1, "malformed": 1}
    assert str(first.tally) == str(second.tally)


def another_file(source: SourceConfig) -> SourceConfig:
    assert source.path is not None
    path = Path(source.path)
    path.write_text(path.read_text() + '{"context": "more", "turns": [{"question": "q", "answers": ["a"]}]}\n')
    return source


CHANGES: dict[str, Callable[[SourceConfig], dict[str, Any]]] = {
    "tokenizer": lambda source: {"source": source, "tokenizer": MERGED},
    "context_length": lambda source: {"source": source, "context": 99},
    "conversation_length": lambda source: {"source": source, "conversation": 199},
    "stage": lambda source: {"source": source, "name": "1qa"},
    "limit": lambda source: {"source": replace(source, limit=3)},
    "data": lambda source: {"source": another_file(source)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_tokenizer_budget_or_state_of_the_data_is_another_index(source: SourceConfig, what: str) -> None:
    said: list[str] = []
    build(source, said=said)
    build(**{**CHANGES[what](source), "said": said})
    assert len(said) == len(indexes()) == 2


def test_a_file_written_again_with_the_same_size_is_another_state(source: SourceConfig) -> None:
    assert source.path is not None
    path, said = Path(source.path), list[str]()
    before = build(source, said=said)
    stat = path.stat()
    path.write_text(path.read_text().replace("q4", "q9"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert path.stat().st_size == stat.st_size
    after = build(source, said=said)
    assert len(said) == 2
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_of_the_samples_is_of_the_texts_wherever_they_lie(source: SourceConfig, tmp_path: Path) -> None:
    assert source.path is not None
    elsewhere = tmp_path / "elsewhere.jsonl"
    shutil.copy(source.path, elsewhere)
    assert build(source).fingerprint == build(replace(source, path=str(elsewhere))).fingerprint


def test_other_code_makes_the_index_again(source: SourceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    build(source, said=said)
    monkeypatch.setattr("shine.data.build.code_fingerprint", lambda: "changed")
    build(source, said=said)
    assert len(said) == 2


def test_files_that_change_while_they_are_read_give_no_index(source: SourceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: Any, **options: Any) -> StageSamples:
        found = samples_of(*arguments, **options)
        with Path(str(source.path)).open("a") as file:
            file.write("\n")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("shine.data.build.samples_of", slowly)
        with pytest.raises(ValueError, match=r"data\.train\.\w+: its files changed while they were read"):
            build(source)
    assert indexes() == []
    assert len(build(source))


def test_the_code_that_counts_is_what_the_samples_import() -> None:
    """Followed from the two modules that `shine.data.build` asks, as far as it lies in the room of data."""
    room = Path(index.__file__).parent
    seen, ahead = set(), ["samples", "sources/__init__"]
    while ahead:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((room / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shine.data."):
                path = str(node.module).removeprefix("shine.data.").replace(".", "/")
                ahead.append(path if (room / f"{path}.py").exists() else f"{path}/__init__")
    assert {name for name in seen if not name.startswith("sources/")} == set(index.SAMPLE_CODE)
    assert {name.removeprefix("sources/") for name in seen if name.startswith("sources/")} == {
        file.stem for file in (room / "sources").glob("*.py")
    }


def test_a_tokenizers_fingerprint_does_not_change_with_its_use() -> None:
    tokenizer = tiny_tokenizer()
    before = index.tokenizer_fingerprint(tokenizer)
    tokenizer(["ab", "abc"], padding=True, truncation=True, max_length=2)
    assert index.tokenizer_fingerprint(tokenizer) == before != index.tokenizer_fingerprint(MERGED)


def test_a_builder_that_fails_leaves_nothing(source: SourceConfig) -> None:
    assert source.path is not None
    Path(source.path).write_text('{"context": "ab", "turns": [{"question": "q", "answers": ["a"]}]}\n{\n')
    for _ in range(2):
        with pytest.raises(ValueError, match=r"data.train.mine: .*mine.jsonl:2"):
            build(source)
    assert indexes() == []
    Path(source.path).write_text("")
    with pytest.raises(ValueError, match="no sample for stage mqa"):
        build(source)
    assert indexes() == []


def test_an_index_that_was_left_half_written_is_made_again(source: SourceConfig) -> None:
    build(source)
    (found,) = indexes()
    (found / index.META_FILE).unlink()
    said: list[str] = []
    assert len(build(source, said=said)) == 5
    assert len(said) == 1


def test_threads_that_ask_at_once_wait_for_one_builder() -> None:
    built: list[int] = []
    gate = threading.Barrier(4)

    def make(folder: Path) -> dict[str, int]:
        built.append(1)
        (folder / "file").write_text("x")
        return {"number": len(built)}

    found: list[Any] = []

    def ask() -> None:
        gate.wait()
        found.append(index.indexed({"key": 1}, make, say=lambda line: None))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert len(found) == 4
    assert all(noted == {"number": 1} and (folder / "file").exists() for folder, noted in found)


HOLDER = """
import sys
from conftest import tiny_tokenizer
from test_samples import stage
from shine.config import SourceConfig, TaskTokens
from shine.data.build import build_samples, samples_of
source = SourceConfig("jsonl", sys.argv[1])
samples = build_samples({"mine": source}, "data.train", tiny_tokenizer(), stage("mqa"), task_tokens=TaskTokens(), seed=0)
print("open", flush=True)
sys.stdin.readline()
print(samples.sample(4, epoch=0).id, flush=True)
"""


def in_another_process(program: str, source: SourceConfig) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", program, str(source.path)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_indexes_are_listed_and_what_a_process_has_open_is_not_removed(
    source: SourceConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    running = in_another_process(HOLDER, source)
    assert running.stdout is not None
    while running.stdout.readline() != "open\n":
        assert running.poll() is None
    (found,) = index.list_indexes()
    assert found.whole
    assert found.sources == (f"jsonl:{source.path}",)
    assert found.size == sum(file.stat().st_size for file in found.folder.iterdir())
    assert main(["data", "indexes"]) == 0
    out = capsys.readouterr().out
    assert found.folder.name in out
    assert f"jsonl:{source.path}" in out.replace("\n", "")
    assert main(["data", "indexes", "--prune", "0"]) == 0
    assert f"0 indexes removed, 0 B\nleft: {found.folder.name}" in capsys.readouterr().out
    # It can still be read there, and is gone once the process is.
    assert running.communicate("go on\n", timeout=60)[0].strip().endswith("mine.jsonl:5")
    assert main(["data", "indexes", "--prune", "0", "--json"]) == 0
    assert [row["folder"] for row in json.loads(capsys.readouterr().out)["removed"]] == [str(found.folder)]
    assert index.list_indexes() == []
    assert [path.suffix for path in index.index_folder().iterdir()] == [".lock"]
    said: list[str] = []
    assert len(build(source, said=said)) == 5
    assert len(said) == 1


def test_only_what_was_not_used_for_long_is_removed(tmp_path: Path) -> None:
    now, day = time.time(), 86_400
    for name, days in (("aa", 40), ("bb", 20), (".cc.7.partial", 40), (".dd.7.partial", 20)):
        folder = index.index_folder() / name
        folder.mkdir(parents=True)
        (folder / index.META_FILE).write_text(json.dumps({"key": {"stage": ["mqa", 9, 9], "sources": []}, "noted": {}}))
        os.utime(folder / index.META_FILE, (now - days * day,) * 2)
    # Somebody still writes this old one.
    with FileLock(index.index_folder() / "cc.lock"):
        removed, left = index.prune(30 * day, now=now)
    assert [[found.folder.name for found in part] for part in (removed, left)] == [["aa"], [".cc.7.partial"]]
    assert [found.folder.name for found in index.prune(30 * day, now=now)[0]] == [".cc.7.partial"]
    assert [found.folder.name for found in index.list_indexes()] == ["bb", ".dd.7.partial"]


def test_an_index_that_is_removed_while_it_is_opened_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and holding, many times over."""
    made: list[int] = []

    def make(folder: Path) -> dict[str, int]:
        made.append(1)
        (folder / "file").write_text("x")
        return {}

    name = "import sys; from shine.data import index; index.prune(0, now=float('inf'))"
    real, calls = os.open, []

    def slow(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        descriptor = real(path, flags, *arguments, **options)
        if Path(str(path)).parent == index.index_folder() and Path(path).is_dir() and not calls:
            calls.append(1)
            subprocess.run([sys.executable, "-c", name], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        return descriptor

    index.indexed({"key": 2}, make, say=lambda line: None)
    for held in list(index._held.values()):
        os.close(held)
    index._held.clear()
    monkeypatch.setattr("shine.data.index.os.open", slow)
    folder, _ = index.indexed({"key": 2}, make, say=lambda line: None)
    assert len(made) == 2
    assert (folder / "file").exists()
    assert calls == [1]


PROCESS = """
import sys
from conftest import tiny_tokenizer
from test_samples import stage
from shine.config import SourceConfig, TaskTokens
from shine.data.build import build_samples, samples_of
source = SourceConfig("jsonl", sys.argv[1])
samples = build_samples({"mine": source}, "data.train", tiny_tokenizer(), stage("mqa"), task_tokens=TaskTokens(), seed=0)
print(len(samples), samples.fingerprint)
"""


def test_processes_that_start_at_once_build_it_once(source: SourceConfig) -> None:
    assert source.path is not None
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", PROCESS, source.path]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert all(process.returncode == 0 for process in running)
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum("read and tokenised" in line for lines in outputs for line in lines) == 1
    assert len(indexes()) == 1


MEASURE = """
import json, resource, sys, time
from shine.config import SourceConfig, StageConfig, TaskTokens
from shine.data.build import build_samples, samples_of
from shine.pretrained import load_tokenizer
from shine.zoo import resolve

tokenizer = load_tokenizer(resolve("cpu-world"))
stage = StageConfig("pretrain", 1141, 1150, learning_rate=1e-4, warmup_steps=0)
tasks = TaskTokens(reconstruct="<|im_start|>", complete="<|im_end|>", nothing="<|endoftext|>")
started = time.process_time()
source = SourceConfig("text", sys.argv[1], limit=int(sys.argv[2]))
samples = build_samples({"texts": source}, "texts", tokenizer, stage, task_tokens=tasks, seed=0, say=lambda line: None)
seconds = time.process_time() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(json.dumps({"texts": len(samples.texts), "tokens": int(samples.lengths.sum()) // 2, "seconds": seconds, "peak": peak}))
"""


@pytest.mark.slow
def test_a_hundred_thousand_texts_go_through_in_bounded_time_and_memory(tmp_path: Path) -> None:
    """Read, tokenised and grouped, each time in a process of its own: ten times the texts take hardly more memory."""
    file = tmp_path / "train.jsonl"
    stories = [example.context for example in World(facts=(16, 20), people=(4, 6), seed=1).examples(500)]
    with file.open("w", encoding="utf-8") as lines:
        for number in range(100_000):
            text = " ".join(stories[(number * 31 + 7 * part) % 500] for part in range(1 + number % 5))
            lines.write(json.dumps({"text": text[: 100 + number * 48271 % 1800]}) + "\n")
    few, many = (
        json.loads(subprocess.run([sys.executable, "-c", MEASURE, file, str(count)], capture_output=True, check=True).stdout)
        for count in (10_000, 100_000)
    )
    print(few, many)
    assert (few["texts"], many["texts"]) == (10_000, 100_000)
    assert many["tokens"] > 10_000_000
    assert many["tokens"] / many["seconds"] > 100_000
    # Of each text two numbers and its place are held, in a few copies.
    assert many["peak"] - few["peak"] < 100
    assert many["peak"] < 1500
