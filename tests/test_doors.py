"""The doors as a user runs them: exit codes and one-message errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import run_program

from shine.cli.doors import run_door
from shine.config import PromptConfig
from shine.training.distributed import Ranks, join_ranks

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["hypernetwork.rank=2", "hypernetwork.meta_rank=4", "hypernetwork.m2p.heads=2", "experiment=cpu_world"]


def run(door: str, *overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / door), *overrides], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_train_then_test_through_the_doors(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, in three short stages, and each stage's test on the result."""
    monkeypatch.chdir(tmp_path)
    checkpoint = "null"
    world = ["data.train.worlds.options.count=40", "data.validation.worlds.options.count=4", "data.test.worlds.options.count=3"]
    common = [*SMALL, f"backbone.path={tiny_backbone_folder}", *world]
    for stage, door in (("pretrain", "test_pretrain.py"), ("mqa", "test_pwc.py"), ("1qa", "test.py")):
        length = ["stage.context_length=400", "stage.conversation_length=600"]
        size = ["stage.batch_size=4", "stage.micro_batch_size=4", "stage.steps=2", "stage.evaluate_every=2"]
        place = [f"checkpoint={checkpoint}", f"output={tmp_path / stage}"]
        assert run_program("train.py", f"stage={stage}", *common, *length, *size, *place) == 0
        checkpoint = str(tmp_path / stage)
        place = [f"checkpoint={checkpoint}", f"output={tmp_path / door}"]
        assert run_program(door, *common, length[0], *place, "max_new_tokens=4") == 0
        summary = json.loads((tmp_path / door / "summary.json").read_text())
        assert summary["stage"] == stage
        assert set(summary["sources"]["worlds"]["methods"]) == {"shine", "in_context", "only_question"}
    assert not list(tmp_path.glob(".hydra"))
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize(
    ("door", "overrides", "message"),
    [
        ("train.py", ["+stage.lerning_rate=1"], "stage.lerning_rate: unknown key; did you mean learning_rate?"),
        ("train.py", ["stage.lerning_rate=1"], "error: stage.lerning_rate: unknown key; did you mean learning_rate?"),
        ("train.py", ["stag.steps=1"], "error: stag: unknown key; did you mean stage?"),
        (
            "train.py",
            ["data.train.mine.path=x"],
            "data.train.mine: there is no such entry; a new one is added with +data.train.mine=",
        ),
        ("train.py", ["+data.train.mine.kin=x"], "data.train.mine.kin: unknown key; did you mean kind?"),
        ("train.py", ["stage=mq"], "Available options in 'stage':\n\t1qa\n\tmqa"),
        ("train.py", ["stage.steps=[1"], "error: stage.steps=[1: not understood; quote it for the shell"),
        ("train.py", ["backbone=models/none"], "there is no folder models/none: download it with"),
        ("train.py", ["hypernetwork.meta_rank=128"], "hypernetwork.meta_rank: rank 128 does not fit"),
        ("train.py", ["hypernetwork.m2p.heads=7"], "hypernetwork.m2p.heads=7 does not divide the hidden size"),
        ("train.py", ["output=/dev/null"], "output=/dev/null: /dev/null is a file; choose another folder"),
        ("test.py", ["checkpoint=cpu", "output=/dev/null/x"], "output=/dev/null/x: /dev/null is a file"),
        ("train.py", ["~stage.foo"], "'stage.foo' does not exist"),
        ("train.py", ["hypernetwork.layout=xy"], "hypernetwork.layout: should be 'rl', 'lr', 'rr' or 'll'"),
        ("train.py", ["backbone.path=models/Qwen3-8B"], "models/Qwen3-8B"),
        ("train.py", ["checkpoint=checkpoints/none"], "checkpoints/none: no such checkpoint directory"),
        ("test.py", [], "checkpoint: missing"),
    ],
)
def test_what_a_user_can_mend_is_one_message(
    door: str,
    overrides: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_program(door, "experiment=cpu_world", f"output={tmp_path / 'out'}", *overrides) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("error: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_process_of_its_own_says_no_more(tmp_path: Path) -> None:
    """Neither what Hydra refuses nor what SHINE does ends in a traceback."""
    refused = "error: the configuration does not hold:"
    for override, message in (
        ("stage.steps=[1", "error: stage.steps=[1: not understood; quote it for the shell, as in 'a.b=[1, 2]'\n"),
        ("hypernetwork.layout=xy", f"{refused}\n  hypernetwork.layout: should be 'rl', 'lr', 'rr' or 'll' (it is 'xy')\n"),
    ):
        result = run("train.py", "experiment=cpu_world", f"output={tmp_path / 'out'}", override, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (2, message)
        assert not list(tmp_path.iterdir())


def test_a_folder_stands_where_the_name_of_a_backbone_does(tiny_backbone_folder: str, tmp_path: Path) -> None:
    overrides = ["experiment=cpu_world", "backbone.device=cpu", "backbone.dtype=float32", *SMALL[:3], "stage.steps=1"]
    overrides += ["stage.context_length=400", "stage.conversation_length=600", "stage.evaluate_every=0", "stage.batch_size=2"]
    overrides += ["stage.micro_batch_size=2", "data.train.worlds.options.count=4", f"output={tmp_path / 'out'}"]
    assert run_program("train.py", *overrides, f"backbone={tiny_backbone_folder}") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["backbone"]["path"] == tiny_backbone_folder


def test_a_fault_of_our_own_keeps_its_traceback() -> None:
    """Only what SHINE raises on purpose is a user's to mend; what a library raises below us is not."""

    def broken(_config: PromptConfig) -> None:
        json.loads("{")

    with pytest.raises(json.JSONDecodeError):
        run_door(PromptConfig, {"system": "x"}, broken)


def test_a_file_the_system_refuses_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_door(PromptConfig, {"system": "x"}, lambda _config: (tmp_path / "none" / "x").write_text(""))
    assert ended.value.code == 2
    assert f"error: {tmp_path / 'none' / 'x'}: No such file or directory; choose another place" in capsys.readouterr().err


def test_what_all_ranks_refuse_one_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And what a rank meets alone, it says itself."""

    def together(_config: PromptConfig) -> None:
        with Ranks(1, 2).together():
            raise ValueError("no data")

    def alone(_config: PromptConfig) -> None:
        join_ranks("cpu").__enter__()

    monkeypatch.setattr(Ranks, "gather", lambda _self, refusal: ["no backbone", refusal])
    for rank, said in (("0", "error: no backbone\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            run_door(PromptConfig, {}, together)
        assert capsys.readouterr().err == said
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        run_door(PromptConfig, {}, alone)
    assert "start several ranks with torchrun" in capsys.readouterr().err
