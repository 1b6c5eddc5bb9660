"""A run that is killed, asked to stop, or damaged goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import train_in_process, wait_for_a_directory_being_written, wait_for_progress
from runs import losses_of, stage_config, train_config
from transformers import AutoModelForCausalLM

from shine.checkpoint import WEIGHTS_FILE
from shine.cli.doors import run_door
from shine.config import DataConfig, SourceConfig, TrainConfig
from shine.manifest import damage, write_manifest
from shine.training import loop
from shine.training.guard import NOT_FINITE, SPIKE, Guard
from shine.training.monitor import METRICS_FILE, SAMPLES_FILE
from shine.training.optimizer import Optimizers
from shine.training.provenance import differences
from shine.training.stage import train
from shine.training.state import STATE_FILE, load_state, newest_whole, step_directories
from shine.training.stop import StoppedError, stop_requests
from shine.training.validation import Validation

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("kills", "length_window"), [(4, 0), pytest.param(20, 4, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_is_the_run_that_was_not(
    kills: int, length_window: int, tiny_backbone_folder: str, tmp_path: Path
) -> None:
    """SIGKILL at random moments of the process, from its start on, of its training, of a save, and twice of its end.

    Each process resumes by itself.
    """
    rng = random.Random(kills)
    stage = stage_config(steps=30 * kills, save_every=3, evaluate_every=10, evaluation_batches=1, length_window=length_window)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = train_in_process(tiny_backbone_folder, whole, stage=stage)
    began = time.monotonic()
    wait_for_progress(whole, process)
    until_first_step = time.monotonic() - began
    process.join()
    assert process.exitcode == 0

    while_saving = 0
    for number, moment in enumerate([*itertools.islice(itertools.cycle(("start", "save", "step", "save")), kills), "end", "end"]):
        process = train_in_process(tiny_backbone_folder, killed, stage=stage, resume="auto")
        if moment == "start":
            time.sleep(rng.uniform(0, until_first_step))
        elif moment == "end":
            wait_for_a_directory_being_written(killed, process, name="final.*")
        else:
            wait_for_progress(killed, process)
        if moment == "save":
            wait_for_a_directory_being_written(killed, process)
        elif moment == "step":
            time.sleep(rng.uniform(0, 0.5))
        assert process.is_alive() or number > kills, "the run was over before it could be killed: give it more steps"
        process.kill()
        process.join()
        while_saving += moment == "save" and bool(list(killed.glob(".step-*.partial")))
        assert [damage(directory) for directory in step_directories(killed)] == [None] * len(step_directories(killed))
    process = train_in_process(tiny_backbone_folder, killed, stage=stage, resume="auto")
    process.join()
    assert process.exitcode == 0
    assert while_saving >= max(kills // 4, 1), "the kills hardly hit a save"
    assert measured(killed) == measured(whole)
    assert (killed / "final" / WEIGHTS_FILE).read_bytes() == (whole / "final" / WEIGHTS_FILE).read_bytes()
    assert [best.name for best in killed.glob("best-*")] == [best.name for best in whole.glob("best-*")]


def measured(output: Path) -> list[dict[str, float]]:
    """Every scalar of a run but what depends on the machine's mood, and every answer it showed."""
    rows = [json.loads(line) for name in (METRICS_FILE, SAMPLES_FILE) for line in (output / name).read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("tokens_per_second", "mfu", "memory_gb")} for row in rows]


def test_sigterm_saves_and_stops_and_the_door_says_so(tiny_backbone_folder: str, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "experiment=cpu_world", "stage=mqa", "from_scratch=true", "stage.batch_size=2"]
    command += ["stage.micro_batch_size=2", "stage.log_every=1", "stage.steps=100000", "data.train.worlds.options.count=100"]
    command += [f"backbone.path={tiny_backbone_folder}", f"output={tmp_path}", "stage.evaluate_every=0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        while run.poll() is None and (not (tmp_path / METRICS_FILE).exists() or not (tmp_path / METRICS_FILE).stat().st_size):
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        errors = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + signal.SIGTERM, errors
    directory = newest_whole(tmp_path, say=print)
    assert directory is not None
    step = load_state(directory).step
    assert f"SIGTERM: saved after step {step:,} and stopped; resume=latest goes on" in errors
    assert len(losses_of(tmp_path)) == step


@contextmanager
def asked_to_stop(monkeypatch: pytest.MonkeyPatch, *, number: int, after: int) -> Iterator[None]:
    """This process gets the signal after so many optimizer steps."""
    from shine.training import loop

    real, calls = loop.training_step, [0]

    def training_step(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == after:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", training_step)
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_lets_the_step_finish(
    number: signal.Signals, tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_config(steps=8)
    train(train_config(tiny_backbone_folder, tmp_path / "whole", stage=stage))
    handler = signal.getsignal(number)
    with (
        asked_to_stop(monkeypatch, number=number, after=5),
        pytest.raises(StoppedError, match=f"{number.name}: saved after step 5"),
    ):
        train(train_config(tiny_backbone_folder, tmp_path / "stopped", stage=stage))
    assert signal.getsignal(number) == handler
    train(train_config(tiny_backbone_folder, tmp_path / "stopped", stage=stage, resume="latest"))
    assert losses_of(tmp_path / "stopped") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-6)


def test_a_signal_before_the_first_step_stops_at_once() -> None:
    with stop_requests(), pytest.raises(StoppedError, match="SIGTERM: stopped before the first step") as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.signal_number == signal.SIGTERM


@pytest.mark.parametrize("where", ["backbone", "state"])
def test_a_signal_while_loading_is_no_damaged_file(
    where: str, tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a library's work, where whatever is raised would mean that the file is bad."""
    config = train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=3, save_every=2))
    if where == "state":
        train(config)
        config = replace(config, resume="latest")
    place, name = (torch, "load") if where == "state" else (AutoModelForCausalLM, "from_pretrained")
    monkeypatch.setattr(place, name, lambda *_args, **_options: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        run_door(TrainConfig, asdict(config), train)
    assert left.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("SIGTERM: stopped before the first step, there was nothing to save\n")


def test_a_second_interrupt_does_not_wait(capfd: pytest.CaptureFixture[str]) -> None:
    with stop_requests() as request:
        request.patient = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_number == signal.SIGINT
        request._since -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "SIGINT: finishing this step and saving; Ctrl-C again stops at once" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("hypernetwork.safetensors", b"", "hypernetwork.safetensors is not as it was written"),
        ("training_state.pt", b"x" * 100, "training_state.pt is not as it was written"),
        ("config.json", None, "config.json is missing"),
        ("manifest.json", None, "manifest.json is missing"),
        ("manifest.json", b"{", "manifest.json cannot be read"),
        ("manifest.json", b"[]", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_step_directory_is_passed_over(
    name: str, content: bytes | None, reason: str, tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = stage_config(steps=7, save_every=3)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    broken = tmp_path / "step-000006" / name
    broken.unlink()
    if content is not None:
        broken.write_bytes(content)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="latest"))
    said = capsys.readouterr()
    assert f"passed over {tmp_path / 'step-000006'}: {reason}" in said.out
    assert "goes on after step 3" in said.out + said.err
    with pytest.raises(ValueError, match="not a whole step directory"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume=str(broken.parent.with_name("step-000009"))))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_training_state_is_refused_and_never_run(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """In a step directory whose manifest says that all is as it was written."""

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    stage = stage_config(steps=3, save_every=2)
    train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage))
    step = tmp_path / "run" / "step-000002"
    torch.save({"step": 2, "rng": Trap()}, step / STATE_FILE)
    write_manifest(step)
    assert damage(step) is None
    with pytest.raises(ValueError, match=r"training_state\.pt: damaged"):
        train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage, resume="latest"))
    assert not (tmp_path / "trapped").exists()
    torch.load(step / STATE_FILE, weights_only=False)
    assert (tmp_path / "trapped").exists(), "the trap is none"


def test_a_changed_configuration_is_named_and_refused_unless_told(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = stage_config(steps=4, save_every=2)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    (tmp_path / "final" / "config.json").unlink()
    other = {"stage": replace(stage, learning_rate=1e-3, log_every=2), "resume": "latest"}
    with pytest.raises(ValueError, match=r"stage\.learning_rate: 0\.005 -> 0\.001\n.*allow_changes=true"):
        train(train_config(tiny_backbone_folder, tmp_path, **other))
    train(train_config(tiny_backbone_folder, tmp_path, **other, allow_changes=True))
    said = capsys.readouterr()
    assert "changed: stage.learning_rate: 0.005 -> 0.001" in said.out + said.err
    assert "changed: stage.log_every: 1 -> 2" in said.out + said.err


def test_other_training_data_is_refused_wherever_it_lies(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """The same rows in another folder are the same data; other rows in the same folder are not."""
    row = {"context": "Abro lives in Arlow.", "turns": [{"question": "Where?", "answers": ["Arlow"]}]}

    def run(file: Path, **changes: Any) -> None:
        source = SourceConfig(kind="jsonl", path=str(file))
        data = DataConfig(train={"mine": source})
        train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage_config(steps=4, save_every=2), data=data, **changes))

    first, moved = tmp_path / "first.jsonl", tmp_path / "moved.jsonl"
    for file in (first, moved):
        file.write_text((json.dumps(row) + "\n") * 4)
    run(first)
    run(moved, resume="latest")
    moved.write_text((json.dumps(row).replace("Arlow", "Bexley") + "\n") * 4)
    with pytest.raises(ValueError, match=r"the training samples: 4 \(fingerprint .*\) -> 4 \(fingerprint"):
        run(moved, resume="latest")


def test_differences_are_sorted_into_free_and_binding() -> None:
    before = {"output": "a", "stage": {"steps": 3, "keep": 2}, "data": {"train": {"x": {"path": "a", "limit": None}}}, "gone": 1}
    now = {"output": "b", "stage": {"steps": 4, "keep": 9}, "data": {"train": {"x": {"path": "b", "limit": 5}}}}
    free, binding = differences(before, now)
    assert free == ["data.train.x.path: 'a' -> 'b'", "output: 'a' -> 'b'", "stage.keep: 2 -> 9"]
    assert binding == ["data.train.x.limit: None -> 5", "gone: 1 -> None", "stage.steps: 3 -> 4"]


def test_auto_starts_where_there_is_nothing_to_resume(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config(steps=2)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="auto"))
    first = losses_of(tmp_path)
    (tmp_path / "final" / "config.json").unlink()
    with (tmp_path / METRICS_FILE).open("a") as lines:
        lines.write('{"step": 9, "lo')
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="auto"))
    assert losses_of(tmp_path) == pytest.approx(first)


def test_auto_leaves_a_run_alone_that_has_ended(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=3, save_every=1), resume="auto")
    final = train(config)
    before = (tmp_path / METRICS_FILE).read_bytes()
    assert train(config) == final
    assert f"{final} is there: this run has ended already" in capsys.readouterr().out
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_run_at_a_constant_rate_goes_on_where_it_ended(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """A run of three steps, gone on with to six, is the one of six."""
    short, whole = tmp_path / "short", tmp_path / "whole"
    stage = stage_config(steps=3, save_every=3, schedule="constant")
    train(train_config(tiny_backbone_folder, short, stage=stage))
    longer = replace(stage, steps=6)
    train(train_config(tiny_backbone_folder, short, stage=longer, resume="latest", allow_changes=True))
    train(train_config(tiny_backbone_folder, whole, stage=longer))
    assert losses_of(short) == pytest.approx(losses_of(whole))


def test_the_best_checkpoint_stays(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config(steps=8, evaluate_every=2, save_every=2, keep=1, learning_rate=1e-2, warmup_steps=0)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    losses = {row["step"]: row["validation/answers/loss"] for row in measured(tmp_path) if "validation/answers/loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert [path.name for path in tmp_path.glob("best-*")] == [f"best-{best:06d}"]
    assert [path.name for path in step_directories(tmp_path)] == ["step-000006"]
    assert load_state(tmp_path / "step-000006").best == min(loss for step, loss in losses.items() if step <= 6)


def test_the_best_before_stays_until_a_save(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies between a better checkpoint and the next save goes on from one whose best is still there."""
    losses = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(Validation, "measure", lambda *_: {"validation/answers/loss": next(losses)})
    seen: list[list[str]] = []
    real = loop.Run._advance

    def advance(run: Any, *args: Any) -> None:
        real(run, *args)
        seen.append([path.name for path in step_directories(run.output, kind="best")])

    monkeypatch.setattr(loop.Run, "_advance", advance)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=3, evaluate_every=1, save_every=2)))
    assert seen == [["best-000001"], ["best-000002"], ["best-000002", "best-000003"]]
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-000003"]


def test_a_loss_that_is_no_number_is_never_the_best(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the first one, nor one after it; a run that goes on compares with the last number."""
    stage = stage_config(steps=6, evaluate_every=1, save_every=2, keep=5)
    losses = iter([math.nan, 2.0, -math.inf, 1.0, math.nan, 3.0])
    monkeypatch.setattr(Validation, "measure", lambda *_: {"validation/answers/loss": next(losses)})
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-000004"]
    assert [load_state(path).best for path in step_directories(tmp_path)] == [2.0, 1.0]
    losses = iter([math.nan, 1.5])
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume=str(tmp_path / "step-000004")))
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-000004"]


def test_a_resumed_run_still_counts_the_bad_steps_before_it(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after three of at most four bad steps in a row, it ends at its next."""
    from shine.training import step

    real = step.label_losses
    monkeypatch.setattr(step, "label_losses", lambda *args: (real(*args)[0] * float("inf"), torch.zeros(())))
    stage = stage_config(most_skipped=4)
    with asked_to_stop(monkeypatch, number=signal.SIGTERM, after=3), pytest.raises(StoppedError, match="saved after step 3"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    with pytest.raises(ValueError, match="4 steps in a row"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="latest"))
    assert len(losses_of(tmp_path)) == 4


def test_a_guard_skips_what_is_not_finite_and_what_is_a_spike() -> None:
    guard = Guard(stage_config(spike_factor=3.0, spike_window=4, most_skipped=3))
    assert [guard.verdict(1.0, norm) for norm in (1.0, 50.0, 1.2, 0.8)] == [None] * 4, "no spike before the window is full"
    assert guard.verdict(1.0, 3.4) == SPIKE
    assert guard.verdict(float("nan"), 1.0) == NOT_FINITE
    guard.check(learning_rate=1e-3)
    assert guard.verdict(1.0, float("inf")) == NOT_FINITE
    with pytest.raises(ValueError, match=r"3 steps in a row .*learning rate 0\.001, warm-up 3 steps.*larger stage\.warmup_steps"):
        guard.check(learning_rate=1e-3)
    again = Guard(guard.stage, **guard.state())
    assert (again.skipped, again.in_a_row) == (3, 3)
    assert again.verdict(1.0, 1.0) is None
    assert list(again.norms) == [50.0, 1.2, 0.8, 1.0]


def test_a_run_of_bad_numbers_ends_with_advice(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shine.training import step

    real = step.label_losses
    monkeypatch.setattr(step, "label_losses", lambda *args: (real(*args)[0] * float("inf"), torch.zeros(())))
    with pytest.raises(ValueError, match="4 steps in a row"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(most_skipped=4)))
    rows = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [(path.name, damage(path)) for path in step_directories(tmp_path)] == [("step-000004", None)], "what was good is saved"
    assert all(len(row["samples"]) == 4 and row["reason"] == NOT_FINITE for row in rows)


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is saved then is the newest, whatever the abandoned run had saved, and its end is no end of this one."""
    stage = stage_config(steps=12, save_every=2, keep=5, evaluate_every=4, evaluation_batches=1)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    earlier = str(tmp_path / "step-000004")
    with asked_to_stop(monkeypatch, number=signal.SIGTERM, after=3), pytest.raises(StoppedError, match="saved after step 7"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume=earlier))
    assert [path.name for path in step_directories(tmp_path)] == ["step-000002", "step-000004", "step-000006", "step-000007"]
    assert not (tmp_path / "final").exists()
    assert {"final", "step-000008", "step-000010"} <= {path.name for path in (tmp_path / "abandoned").iterdir()}
    said = capsys.readouterr()
    assert f"what lay after that step is in {tmp_path / 'abandoned'}" in said.out + said.err
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="auto"))
    assert (tmp_path / "final").exists()


def test_a_changed_weight_decay_takes_effect(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shine.training import loop

    stage = stage_config(steps=4, save_every=2)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    seen: list[list[float]] = []
    real = loop.training_step

    def spy(*args: Any, optimizer: Optimizers, **options: Any) -> Any:
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
        return real(*args, optimizer=optimizer, **options)

    monkeypatch.setattr(loop, "training_step", spy)
    changed = {"stage": replace(stage, weight_decay=0.5), "resume": "latest", "allow_changes": True}
    train(train_config(tiny_backbone_folder, tmp_path, **changed))
    assert seen == [[0.5, 0.0]] * 2


def test_a_run_that_died_before_its_first_save_says_how_to_go_on(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each remedy that is named works."""
    from shine.training import loop

    def die(*_args: Any, **_options: Any) -> Any:
        raise MemoryError

    stage = stage_config(steps=3)
    real = loop.training_step
    monkeypatch.setattr(loop, "training_step", lambda *a, **o: die() if (tmp_path / METRICS_FILE).stat().st_size else real(*a, **o))
    with pytest.raises(MemoryError):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    monkeypatch.setattr(loop, "training_step", real)
    with pytest.raises(ValueError, match=r"holds another run: .*start afresh in it with resume=auto"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    with pytest.raises(ValueError, match=r"holds no whole step directory; .*resume=auto"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="latest"))
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="auto"))
    assert len(losses_of(tmp_path)) == 3


def test_a_stage_does_not_start_from_one_that_has_not_ended(tiny_backbone_folder: str, tmp_path: Path) -> None:
    first = stage_config(steps=4, save_every=2, evaluate_every=2, evaluation_batches=1)
    train(train_config(tiny_backbone_folder, tmp_path / "first", stage=first))
    (tmp_path / "first" / "final" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"that run has not ended; finish it, or name a step of it, checkpoint=.*first/"):
        train(train_config(tiny_backbone_folder, tmp_path / "next", checkpoint=str(tmp_path / "first")))
    step = str(tmp_path / "first" / "step-000002")
    train(train_config(tiny_backbone_folder, tmp_path / "next", stage=stage_config(steps=1), checkpoint=step))


def test_a_step_of_another_run_does_not_write_over_this_one(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config(steps=3, save_every=2)
    for name in ("one", "two"):
        train(train_config(tiny_backbone_folder, tmp_path / name, stage=stage))
    before = (tmp_path / "two" / METRICS_FILE).read_bytes()
    with pytest.raises(ValueError, match=r"is not a step of the run in output=.*two: choose another output folder"):
        train(train_config(tiny_backbone_folder, tmp_path / "two", stage=stage, resume=str(tmp_path / "one" / "step-000002")))
    assert (tmp_path / "two" / METRICS_FILE).read_bytes() == before


def test_a_line_that_no_run_wrote_is_named(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config(steps=3, save_every=2)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    (tmp_path / METRICS_FILE).write_text("garbage\n" + (tmp_path / METRICS_FILE).read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a line that a run wrote; delete it"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage, resume="latest"))


def test_a_resumed_run_remembers_where_it_came_from(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(train_config(tiny_backbone_folder, tmp_path / "first", stage=stage_config("pretrain", steps=1)))
    values = {"stage": stage_config(steps=4, save_every=2), "checkpoint": str(tmp_path / "first")}
    train(train_config(tiny_backbone_folder, tmp_path / "next", **values))
    capsys.readouterr()
    train(train_config(tiny_backbone_folder, tmp_path / "next", resume="latest", **values))
    said = capsys.readouterr()
    assert "changed:" not in (said.out + said.err).replace("changed: what lay after", "")
    recorded = json.loads((tmp_path / "next" / "step-000002" / "run.json").read_text())["config"]["checkpoint"]
    assert recorded == str(first)


def test_training_goes_on_past_a_spike(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shine.training import step

    calls, real = [0], step.label_losses

    def label_losses(*args: Any) -> Any:
        calls[0] += 1
        losses, right = real(*args)
        return losses * (1000 if calls[0] == 13 else 1), right

    monkeypatch.setattr(step, "label_losses", label_losses)
    stage = stage_config(steps=10, spike_window=4, spike_factor=20.0, micro_batch_size=2)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage))
    rows = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reason"]) for row in rows] == [(7, SPIKE)]
    assert [row["skipped_steps"] for row in measured(tmp_path) if "skipped_steps" in row] == [0] * 6 + [1] * 4


def test_a_run_can_go_on_in_a_new_folder(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """From a step of another run, which stays as it is."""
    stage = stage_config(steps=4, save_every=2)
    train(train_config(tiny_backbone_folder, tmp_path / "one", stage=stage))
    train(train_config(tiny_backbone_folder, tmp_path / "new", stage=stage, resume=str(tmp_path / "one" / "step-000002")))
    assert losses_of(tmp_path / "new") == pytest.approx(losses_of(tmp_path / "one")[2:])
    assert (tmp_path / "one" / "final").exists()


def test_a_full_disk_ends_the_run_and_spoils_nothing(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save meets a device without room; the first stays, and the run goes on from it once there is some."""
    stage = stage_config(steps=6, save_every=2)
    train(train_config(tiny_backbone_folder, tmp_path / "whole", stage=stage))
    saves, real = itertools.count(1), torch.save

    def save(value: Any, stream: Any) -> None:
        if next(saves) == 1:
            real(value, stream)
        else:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left on device"):
        train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage))
    monkeypatch.setattr(torch, "save", real)
    assert [(path.name, damage(path)) for path in step_directories(tmp_path / "run")] == [("step-000002", None)]
    assert not list((tmp_path / "run").glob(".*"))
    train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage, resume="latest"))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "whole"))


def test_a_folder_that_cannot_be_written_is_refused_first(read_only: Path) -> None:
    """Before a backbone is looked for."""
    with pytest.raises(ValueError, match=r"locked cannot be written; choose another folder"):
        train(train_config("nowhere", read_only / "run"))
