"""Collections built from parts: what is written, what is dropped, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer

from shine.cli import commands
from shine.cli.collect import load
from shine.config import SourceConfig
from shine.data.collection import build_collection, check_parts, without_parts
from shine.data.histograms import draw_lengths
from shine.data.plans import CollectionConfig, PartConfig
from shine.data.sources import READERS, read_source
from shine.parsing import parse

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = ["Abro lives in Arlow.", "Ilka keeps an owl.", 'Leif said "no"\nand left, Zoë.']


def squad(folder: Path, *, contexts: list[str], answers: list[list[str]] | None = None) -> SourceConfig:
    """Two questions a context."""
    folder.mkdir(parents=True)
    names = [context for context in contexts for _ in range(2)]
    golds = answers or [["Arlow", "in Arlow"] if index % 2 else ["Abro"] for index in range(len(names))]
    columns: dict[str, list[Any]] = {
        "id": [f"q{index}" for index in range(len(names))],
        "context": names,
        "question": ["Who?" if index % 2 == 0 else "Where?" for index in range(len(names))],
        "answers": [{"text": gold, "answer_start": [0] * len(gold)} for gold in golds],
    }
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet")
    return SourceConfig("squad", str(folder))


def collection(form: str, share: float = 1.0, seed: int = 42, **sources: SourceConfig) -> CollectionConfig:
    parts = {name: PartConfig(source, hub=f"owner/{name}", licence="MIT", share=share) for name, source in sources.items()}
    return CollectionConfig(form, parts, seed)  # type: ignore[arg-type]


def words(text: str) -> int:
    return len(text.split())


def build(config: CollectionConfig, output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    build_collection(config, output, tokens=words)
    manifest = json.loads(output.with_name(f"{output.name}.manifest.json").read_text(encoding="utf-8"))
    return json.loads(output.read_text(encoding="utf-8")), manifest


def test_all_questions_of_a_context_are_one_conversation(tmp_path: Path) -> None:
    items, manifest = build(collection("conversations", a=squad(tmp_path / "a", contexts=CONTEXTS)), tmp_path / "new" / "mqa.json")
    conversation = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Abro"},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Arlow"},
    ]
    assert items == [
        {"context": context, "conversations": conversation, "contextlen": len(context.split()), "conversationlen": 4}
        for context in CONTEXTS
    ]
    content = (tmp_path / "new" / "mqa.json").read_bytes()
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["bytes"] == len(content)
    part = manifest["parts"]["a"]
    assert (part["items"], part["questions"], part["duplicates"], part["left_out"]) == (3, 6, 0, {})
    assert (part["hub"], part["licence"]) == ("owner/a", "MIT")
    assert part["context_tokens"] == {"mean": 4.7, "median": 4.0, "p95": pytest.approx(5.8), "max": 6}


def test_each_question_is_an_item_of_its_own(tmp_path: Path) -> None:
    items, manifest = build(collection("questions", a=squad(tmp_path / "a", contexts=CONTEXTS)), tmp_path / "1qa.json")
    assert [len(item["conversations"]) for item in items] == [2] * 6
    assert [item["context"] for item in items] == [context for context in CONTEXTS for _ in range(2)]
    assert manifest["items"] == manifest["parts"]["a"]["questions"] == 6


def test_what_is_written_is_read_again_as_the_published_files_are(tmp_path: Path) -> None:
    source = squad(tmp_path / "a", contexts=CONTEXTS)
    build(collection("conversations", a=source), tmp_path / "mqa.json")
    again = list(read_source(SourceConfig("conversations", str(tmp_path / "mqa.json"))))
    first = list(read_source(source))
    assert [(e.context, [(t.question, t.answer) for t in e.turns]) for e in again] == [
        (e.context, [(t.question, t.answer) for t in e.turns]) for e in first
    ]


def test_exact_duplicates_are_dropped_within_a_part_and_across_parts(tmp_path: Path) -> None:
    one = squad(tmp_path / "a", contexts=[CONTEXTS[0], CONTEXTS[1], CONTEXTS[0]])
    # The same context with another conversation is no duplicate.
    other = squad(tmp_path / "b", contexts=[CONTEXTS[1], CONTEXTS[0]], answers=[["Abro"], ["Arlow"], ["Abro"], ["Dornal"]])
    items, manifest = build(collection("conversations", a=one, b=other), tmp_path / "mqa.json")
    assert [item["context"] for item in items] == [CONTEXTS[0], CONTEXTS[1], CONTEXTS[0]]
    assert [manifest["parts"][name]["duplicates"] for name in "ab"] == [1, 1]
    assert [manifest["parts"][name]["items"] for name in "ab"] == [2, 1]
    assert manifest["parts"]["b"]["context_tokens"]["max"] == 4


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    source = squad(tmp_path / "a", contexts=CONTEXTS[:2], answers=[["Abro"], [], [], []])
    items, manifest = build(collection("conversations", a=source), tmp_path / "mqa.json")
    assert [len(item["conversations"]) for item in items] == [2]
    assert manifest["parts"]["a"]["left_out"] == {"question without an answer": 3}


def test_a_share_keeps_contexts_whole_and_is_the_same_every_time(tmp_path: Path) -> None:
    source = squad(tmp_path / "a", contexts=[f"context {number}" for number in range(300)])
    first, _ = build(collection("questions", share=0.3, a=source), tmp_path / "one.json")
    again, _ = build(collection("questions", share=0.3, a=source), tmp_path / "two.json")
    other, _ = build(collection("questions", share=0.3, seed=7, a=source), tmp_path / "three.json")
    assert first == again != other
    assert 60 < len(first) / 2 < 120
    assert all(one["context"] == two["context"] for one, two in zip(first[::2], first[1::2], strict=True))


def test_missing_parts_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    gone = SourceConfig("quac", str(tmp_path / "quac"))
    config = collection("conversations", a=squad(tmp_path / "a", contexts=CONTEXTS), quac=gone, coqa=SourceConfig("coqa", None))
    with pytest.raises(ValueError, match="2 of 3 parts are missing") as error:
        build_collection(config, tmp_path / "mqa.json", tokens=words)
    assert "owner/quac" in str(error.value)
    assert "--leave-out quac --leave-out coqa" in str(error.value)
    assert not (tmp_path / "mqa.json").exists()
    items, _ = build(without_parts(config, ["quac", "coqa"]), tmp_path / "mqa.json")
    assert len(items) == 3
    with pytest.raises(ValueError, match="no part 'quad' to leave out; there are a, quac, coqa"):
        without_parts(config, ["quad"])
    with pytest.raises(ValueError, match="every part is left out"):
        without_parts(config, ["a", "quac", "coqa"])


def test_a_part_that_turns_out_damaged_leaves_the_earlier_file_as_it_was(tmp_path: Path) -> None:
    good = squad(tmp_path / "a", contexts=CONTEXTS)
    build(collection("conversations", a=good), tmp_path / "mqa.json")
    before = (tmp_path / "mqa.json").read_bytes()
    bad = squad(tmp_path / "b", contexts=CONTEXTS, answers=[["x"]] * 5 + [["  "]])
    with pytest.raises(ValueError, match="answers"):
        build_collection(collection("conversations", a=good, b=bad), tmp_path / "mqa.json", tokens=words)
    assert (tmp_path / "mqa.json").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))


def test_a_file_that_was_not_built_here_is_never_replaced(tmp_path: Path) -> None:
    config, output = collection("conversations", a=squad(tmp_path / "a", contexts=CONTEXTS)), tmp_path / "ift_pwc.json"
    output.write_text("[]")
    with pytest.raises(ValueError, match=r"no ift_pwc.json.manifest.json beside it.*choose another --output, or delete it"):
        build_collection(config, output, tokens=words)
    assert output.read_text() == "[]"
    output.unlink()
    items, _ = build(config, output)
    # What was built here may be built again.
    assert build(config, output)[0] == items


def test_a_collection_without_an_item_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    empty = squad(tmp_path / "a", contexts=CONTEXTS[:1], answers=[[], []])
    with pytest.raises(ValueError, match=r"no item in any part \(a, b\)"):
        build_collection(collection("questions", a=empty, b=empty), tmp_path / "x.json", tokens=words)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_lengths_are_drawn(tmp_path: Path) -> None:
    reports = build_collection(
        collection("questions", a=squad(tmp_path / "a", contexts=CONTEXTS)), tmp_path / "x.json", tokens=words
    )
    draw_lengths({name: report.lengths for name, report in reports.items()}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mqa", "msmarco-mqa quac coqa drop narrativeqa quail pwc squad race newsqa duorc"),
        ("1qa", "msmarco squad race duorc hotpotqa musique 2wiki"),
    ],
)
def test_the_shipped_collections_name_the_published_parts(name: str, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHINE_DATA", "elsewhere")
    config = parse(CollectionConfig, load(ROOT / "configs" / f"collection_{name}.yaml"))
    assert list(config.parts) == parts.split()
    assert {part.source.kind for part in config.parts.values()} <= set(READERS)
    assert all(str(part.source.path).startswith("elsewhere/") and part.licence for part in config.parts.values())
    with pytest.raises(ValueError, match=f"{len(parts.split())} of {len(parts.split())} parts are missing"):
        check_parts(config)


@pytest.mark.slow
def test_the_script_builds_and_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "qwen3"}')
    squad(tmp_path / "data" / "squad" / "plain_text", contexts=CONTEXTS)
    environment = {**os.environ, "SHINE_DATA": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    output = tmp_path / "1qa.json"
    command = [sys.executable, ROOT / "generate_data" / "build_1qa.py", "--output", output, "--tokenizer", tmp_path / "tokenizer"]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (failed.returncode, output.exists()) == (2, False)
    assert failed.stderr.startswith("error: 6 of 7 parts are missing")
    left_out = [f"--leave-out={name}" for name in ("msmarco", "race", "duorc", "hotpotqa", "musique", "2wiki")]
    done = subprocess.run([*command, *left_out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # One token a byte.
    assert [item["contextlen"] for item in json.loads(output.read_text())][::2] == [len(text.encode()) for text in CONTEXTS]
    assert output.with_name("1qa.json.lengths.png").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which SHINE is what `pip install .` leaves: the package, without the clone around it."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "shine", site / "shine", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    return {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "SHINE_DATA": str(site / "none")}


def test_the_scripts_find_their_configuration_beside_an_installed_shine(tmp_path: Path, installed: dict[str, str]) -> None:
    command = [sys.executable, ROOT / "generate_data" / "build_mqa.py"]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 11 of 11 parts are missing")


def test_a_command_that_needs_the_clone_says_so(tmp_path: Path, installed: dict[str, str]) -> None:
    command = [sys.executable, "-m", "shine.cli.main", "download", "data", "--list"]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: there is no \S+/configs: run this in a clone of SHINE, which holds the configurations\n", done.stderr
    )


def test_a_file_of_the_users_own_is_never_taken_for_the_clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "CONFIGS", tmp_path / "configs")
    with pytest.raises(ValueError, match="run this in a clone of SHINE"):
        load(tmp_path / "configs" / "downloads.yaml")
    with pytest.raises(ValueError, match=r"mine.yaml: cannot be read"):
        load(tmp_path / "mine.yaml")
