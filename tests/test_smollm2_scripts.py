"""``examples/smollm2/*.sh``: which commands they give, that each composes, and that a stage which is done is not done again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_sources import shared

from shine.checkpoint import read_info
from shine.cli.doors import composed
from shine.config import EvaluationConfig, TrainConfig
from shine.evaluation.plots import read_metrics

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "smollm2"
PARTS = {"squad/plain_text": "squad/plain_text", "race/all": "race/all", "pretrain_text": "transmla_pretrain_6B_tokens"}
"""Of the development data, and what the configurations call them."""


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A stand-in for the interpreter that writes down what it is given, and makes ``final`` as a stage that ends does."""
    program = tmp_path / "python"
    code = (
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"with open({str(tmp_path / 'log')!r}, 'a') as log: log.write('\\t'.join(sys.argv[1:]) + '\\n')\n"
        "for word in sys.argv[1:]:\n"
        "    if word.startswith('output=') and sys.argv[1] == 'train.py':\n"
        "        (pathlib.Path(word.removeprefix('output=')) / 'final').mkdir(parents=True, exist_ok=True)\n"
    )
    program.write_text(code)
    program.chmod(0o755)
    return program


def commands(script: str, *arguments: str | Path, recorder: Path, **variables: str) -> list[list[str]]:
    """What a script ran."""
    log = recorder.parent / "log"
    log.unlink(missing_ok=True)
    for folder in ("squad", "race", "transmla_pretrain_6B_tokens", "wikitext/wikitext-2-v1"):
        (recorder.parent / "data" / folder).mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHON": str(recorder), "SHINE_DATA": str(recorder.parent / "data"), **variables}
    subprocess.run(["sh", FOLDER / script, *arguments], check=True, env=environment, capture_output=True)
    return [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []


def test_training_goes_on_from_what_is_shipped(tmp_path: Path, recorder: Path) -> None:
    """The longest texts, then questions, each from what was before; given again, nothing is left to do."""
    out = tmp_path / "out"
    found = commands("train.sh", out, "smollm2-135m", "stage.steps=7", recorder=recorder)
    assert [command[0] for command in found] == ["train.py"] * 3
    assert [command[2:5] for command in found] == [
        ["stage=pretrain", "checkpoint=smollm2-135m", f"output={out}/pretrain-168"],
        ["stage=mqa", f"checkpoint={out}/pretrain-168", f"output={out}/mqa"],
        ["stage=1qa", f"checkpoint={out}/mqa", f"output={out}/1qa"],
    ]
    for command in found:
        assert "resume=auto" in command
        assert command[-1] == "stage.steps=7"
        assert composed(TrainConfig, "train", command[1:]).stage.steps == 7
    assert commands("train.sh", out, "smollm2-135m", recorder=recorder) == []


def test_training_from_nothing_makes_the_reader_too(tmp_path: Path, recorder: Path) -> None:
    out = tmp_path / "out"
    *stages, reader = commands("train.sh", out, "nothing", recorder=recorder)
    assert [command[2] for command in stages] == ["stage=pretrain"] * 3 + ["stage=mqa", "stage=1qa"]
    assert stages[0][3] == "checkpoint=null"
    assert [command[3] for command in stages[1:]] == [command[4].replace("output=", "checkpoint=") for command in stages[:-1]]
    assert reader[:4] == ["-m", "shine.cli.main", "tune-reader", f"{out}/reader"]
    configs = [composed(TrainConfig, "train", command[1:]) for command in stages]
    assert {config.backbone.path for config in configs} == {"smollm2-135m"}
    lengths = [(config.stage.context_length, config.stage.conversation_length) for config in configs[:3]]
    assert lengths == [(48, 72), (96, 120), (168, 192)]
    assert [(config.stage.steps, config.stage.learning_rate) for config in configs[:3]] == [(250, 3e-3), (80, 2.5e-3), (80, 2e-3)]
    assert composed(TrainConfig, "train", [f"output={out}/reader", *reader[4:]]).stage.name == "mqa"


def test_the_recipe_for_a_gpu_is_chosen_by_name(tmp_path: Path, recorder: Path) -> None:
    found = commands("train.sh", tmp_path / "out", "nothing", recorder=recorder, EXPERIMENT="smollm2_gpu")
    configs = [composed(TrainConfig, "train", command[1:]) for command in found[:-1]]
    assert {config.hypernetwork.rank for config in configs} == {8}
    assert [(config.stage.context_length, config.stage.batch_size) for config in configs] == [
        (64, 64),
        (256, 64),
        (256, 128),
        (256, 128),
    ]
    # What a recitation asks is what pretraining asks; of RACE's passages the column that holds them is read.
    train = configs[2].data.train
    assert train["recitations"].options["ask"] == configs[2].backbone.task_tokens.reconstruct
    assert (train["gaps_race"].path, train["gaps_race"].options["column"]) == (train["race"].path, "article")
    assert "experiment=smollm2_gpu" in found[-1]


def test_scoring_asks_all_methods_and_the_control_and_looks_for_side_effects(tmp_path: Path, recorder: Path) -> None:
    found = commands("score.sh", tmp_path / "out", "smollm2-135m", "here/reader", "batch_size=3", recorder=recorder)
    programs = [command[2] if command[0] == "-m" else command[0] for command in found]
    assert programs == ["test.py", "test.py", "test_pretrain.py", "trust", "report"]
    config = composed(EvaluationConfig, "test", found[0][1:])
    assert config.methods == ("shine", "shine_other", "in_context", "in_context_tuned", "only_question")
    assert (config.reader, config.batch_size, set(config.data.test)) == ("here/reader", 3, {"squad", "worlds"})
    others = composed(EvaluationConfig, "test", found[1][1:])
    assert (others.reader, others.methods) == ("here/reader", tuple(name for name in config.methods if name != "shine_other"))
    # The ones and the others are about other passages and other worlds.
    parts = [(each.data.test["squad"].part, each.data.test["worlds"].options["seed"]) for each in (config, others)]
    assert parts == [("held_out", 3000), ("train", 7100)]
    texts = composed(EvaluationConfig, "test_pretrain", found[2][1:])
    assert texts.stage.context_length >= 300
    assert texts.data.test["wikitext"].options["lengths"] == [100, 200, 300]


def test_more_training_scores_each_checkpoint(tmp_path: Path, recorder: Path) -> None:
    """At a constant rate, on what no run before drew; and what is scored is not scored again."""
    out = tmp_path / "out"
    for name in ("step-000010", "best-000020"):
        (out / "distilled" / name).mkdir(parents=True)
    found = commands("more.sh", out, "distilled", "20", "backbone.device=cpu", recorder=recorder)
    config = composed(TrainConfig, "train", found[0][1:])
    assert (config.stage.name, config.stage.schedule, config.stage.steps, config.stage.save_every) == ("1qa", "constant", 20, 10)
    assert config.stage.distillation is not None
    assert config.stage.distillation.reader == "shine/assets/smollm2-135m/reader"
    assert config.output == f"{out}/distilled"
    drawn = config.data.train["worlds"].options["seed"]
    scored = [composed(EvaluationConfig, "test", command[1:]) for command in found[1:]]
    assert [each.checkpoint for each in scored] == [
        "smollm2-135m",
        f"{out}/distilled/best-000020",
        f"{out}/distilled/step-000010",
    ]
    assert [Path(each.output).name for each in scored] == ["start", "distilled-000020", "distilled-000010"]
    assert {each.data.test["worlds"].options["seed"] for each in scored}.isdisjoint({drawn})
    assert {each.methods for each in scored} == {("shine",)}
    for name in ("start", "distilled-000010"):
        (out / "scores" / name).mkdir(parents=True)
        (out / "scores" / name / "summary.json").touch()
    again = commands("more.sh", out, "labels", recorder=recorder)
    assert [command[0] for command in again] == ["train.py"]
    first = composed(TrainConfig, "train", again[0][1:])
    assert (first.stage.distillation, first.resume) == (None, "auto")
    # A run that has ended goes on.
    longer = composed(TrainConfig, "train", commands("more.sh", out, "labels", "60", recorder=recorder)[0][1:])
    assert (longer.stage.steps, longer.resume) == (60, "latest")


@pytest.mark.parametrize(("script", "missing"), [("train.sh", "race"), ("more.sh", "race"), ("score.sh", "wikitext/wikitext-2-v1")])
def test_data_that_is_missing_is_said_first(script: str, missing: str, tmp_path: Path, recorder: Path) -> None:
    """Before anything runs for an hour."""
    (tmp_path / "data" / "squad").mkdir(parents=True)
    environment = {**os.environ, "PYTHON": str(recorder), "SHINE_DATA": str(tmp_path / "data")}
    done = subprocess.run(["sh", FOLDER / script, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    command = f"sh scripts/download_data.sh {missing.partition('/')[0]}"
    assert done.stderr == f"error: there is no {tmp_path}/data/{missing}: {command}, or set SHINE_DATA\n"
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_what_is_shipped_is_trained_on(tmp_path: Path) -> None:
    """Really, by the documented command, through all three stages, on a few rows of the development data; fetches the backbone."""
    data = tmp_path / "data"
    for folder, name in PARTS.items():
        for split in ("train", "validation"):
            rows = pq.read_table(shared(folder) / f"{split}-00000-of-00001.parquet")
            # All ten articles that are watched must be there.
            few = rows if (folder, split) == ("squad/plain_text", "validation") else rows.slice(0, 300)
            (data / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(few, data / name / f"{split}-00000-of-00001.parquet")
    small = ["stage.batch_size=4", "stage.micro_batch_size=4", "stage.steps=2", "stage.evaluation_batches=1"]
    environment = {**os.environ, "PYTHON": sys.executable, "SHINE_DATA": str(data)}
    command = ["sh", FOLDER / "train.sh", tmp_path / "out", "smollm2-135m", *small]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"trained: {tmp_path}/out/1qa; score it with: sh examples/smollm2/score.sh" in done.stdout
    before = read_info("smollm2-135m")
    after = read_info(tmp_path / "out" / "1qa")
    assert before is not None
    assert after is not None
    assert after.stages == (*before.stages, "pretrain", "mqa", "1qa")
    for stage in ("pretrain-168", "mqa", "1qa"):
        losses, values = read_metrics(tmp_path / "out" / stage, "loss")
        # Two steps from trained weights: neither broken nor anew, where random ones begin at the logarithm of 49,152 words.
        assert losses[-1] == 2
        assert all(0 < value < 4 for value in values)
