"""Both collections from the development data, by the commands that the documentation gives, and a short training on each."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from runs import losses_of, run_program, stage_config, train_config
from test_sources import shared

from shine.cli.doors import composed
from shine.config import DataConfig, SourceConfig, TrainConfig
from shine.training.stage import train

ROOT = Path(__file__).resolve().parent.parent
FILES = {"mqa": "ift_pwc.json", "1qa": "ift_c1qa.json"}
LIMIT = 40


def documented(start: str) -> list[str]:
    """The arguments of the one command in docs/results.md that starts so."""
    (line,) = re.findall(rf"^ *{re.escape(start)} (.*)$", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE)
    return shlex.split(line)


def build(stage: str, output: Path, *more: str | Path) -> list[dict[str, Any]]:
    arguments = documented(f"python generate_data/build_{stage}.py")
    assert arguments[:2] == ["--tokenizer", "smollm2-135m"]
    # The shipped tokenizer, which needs no network.
    assert (
        run_program(f"generate_data/build_{stage}.py", "--tokenizer", "cpu-world", *arguments[2:], "--output", output, *more) == 0
    )
    items: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
    return items


def limited(stage: str, file: Path) -> Path:
    config = yaml.safe_load((ROOT / "configs" / f"collection_{stage}.yaml").read_text())
    for part in config["parts"].values():
        part["source"]["limit"] = LIMIT
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def passages(folder: Path, context: str) -> Iterator[list[dict[str, Any]]]:
    """Rows in a row with one passage."""
    rows = itertools.chain.from_iterable(pq.read_table(file).to_pylist() for file in sorted(folder.glob("train-*.parquet")))
    return (list(group) for _, group in itertools.groupby(rows, key=lambda row: row[context]))


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = shared("race/all").parent.parent
    monkeypatch.setenv("SHINE_DATA", str(folder))
    return folder


@pytest.mark.parametrize("stage", FILES)
def test_a_collection_is_built_from_the_development_data_and_trained_on(
    stage: str, data: Path, tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / FILES[stage]
    items = build(stage, file, "--config", limited(stage, tmp_path / "parts.yaml"))
    asked = [
        [(group[0][context], row["question"].strip()) for row in group]
        for folder, context in (("squad/plain_text", "context"), ("race/all", "article"))
        for group in itertools.islice(passages(data / folder, context), LIMIT)
    ]
    told = [[(item["context"], message["content"]) for message in item["conversations"][::2]] for item in items]
    assert told == (asked if stage == "mqa" else [[question] for group in asked for question in group])
    assert file.with_name(f"{file.name}.lengths.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setenv("SHINE_CACHE", str(tmp_path / "cache"))
    sources = {"collection": SourceConfig("conversations", str(file))}
    train(
        train_config(
            tiny_backbone_folder,
            tmp_path / "run",
            data=DataConfig(train=sources),
            stage=stage_config(stage, steps=3, context_length=64, conversation_length=128),
        )
    )
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 3
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


@pytest.mark.parametrize("stage", FILES)
def test_the_documented_training_is_the_one_that_is_described(stage: str) -> None:
    words = [word.replace("$stage", stage) for word in documented("python train.py experiment=smollm2 stage=$stage")]
    config = composed(TrainConfig, "train", ["experiment=smollm2", f"stage={stage}", *words])
    assert (config.stage.name, config.stage.steps, config.stage.batch_size) == (stage, 100, 2)
    assert (config.stage.context_length, config.stage.conversation_length) == (160, 80)
    assert (config.hypernetwork.rank, config.hypernetwork.meta_rank, config.hypernetwork.m2p.layers) == (3, 16, 2)
    assert [Path(str(source.path)).name for source in config.data.train.values()] == [FILES[stage]]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "count"), [("mqa", 26_355), ("1qa", 94_515)])
def test_the_documented_collections_have_the_documented_sizes(stage: str, count: int, data: Path, tmp_path: Path) -> None:
    items = build(stage, tmp_path / FILES[stage])
    assert len(items) == count
    questions = [(item["context"], message["content"]) for item in items for message in item["conversations"][::2]]
    whole = [
        (row[context], row["question"].strip())
        for folder, context in (("squad/plain_text", "context"), ("race/all", "article"))
        for group in passages(data / folder, context)
        for row in group
    ]
    # Twenty exact duplicates are dropped where each question is an item.
    assert len(questions) == (94_535 if stage == "mqa" else 94_515)
    assert len(whole) == 94_535
    assert set(questions) == set(whole)
