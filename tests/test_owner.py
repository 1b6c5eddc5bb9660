"""One process at a time writes into the folder of a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from processes import train_in_process, wait_for_progress
from runs import stage_config, train_config

from shine.training import loop
from shine.training.owner import OWNER_FILE, SILENCE, Owner, owned
from shine.training.stage import train
from shine.training.state import step_directories


def write(owner: Owner, *, ago: float = 0.0) -> None:
    owner.file.write_text(json.dumps(asdict(owner)))
    os.utime(owner.file, (time.time() - ago,) * 2)


def test_a_folder_that_a_run_writes_into_is_not_another_ones(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Refused, and what the first is writing stays, as long as it lives; then taken over, which is said."""
    output, config = tmp_path / "run", {"stage": stage_config(steps=100_000), "resume": "auto"}
    process = train_in_process(tiny_backbone_folder, output, **config)
    try:
        wait_for_progress(output, process)
        being_written = output / f".step-000001.{process.pid}.partial"
        being_written.mkdir()
        with pytest.raises(ValueError, match=rf"is being written by process {process.pid} on {socket.gethostname()}: wait"):
            train(train_config(tiny_backbone_folder, output, **config))
        assert being_written.exists()
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    said: list[str] = []
    with owned(output, say=said.append) as own:
        assert (own.pid, own.file.exists()) == (os.getpid(), True)
    assert said == [f"{output} was process {process.pid} on {socket.gethostname()}'s, which is gone: taken over"]
    assert not (output / OWNER_FILE).exists()


def test_a_process_of_another_machine_is_alive_as_long_as_it_shows_itself(tmp_path: Path) -> None:
    other = Owner(str(tmp_path), "elsewhere", 7, "123", "41")
    write(other, ago=SILENCE - 100)
    with (
        pytest.raises(ValueError, match=r"is being written by process 7 on elsewhere \(job 41\).*delete .*owner\.json"),
        owned(tmp_path, say=print),
    ):
        pass
    other.beat()
    assert time.time() - other.file.stat().st_mtime < 60
    write(other, ago=SILENCE + 100)
    said: list[str] = []
    with owned(tmp_path, say=said.append):
        pass
    assert said == [f"{tmp_path} was process 7 on elsewhere (job 41)'s, which is gone: taken over"]
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize("what", ["another process of the number", "ended and not yet waited for", "cut short"])
def test_what_is_no_owner_any_more_holds_nothing(what: str, tmp_path: Path) -> None:
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    own = Owner(str(tmp_path), socket.gethostname(), os.getppid(), "1")
    if what == "cut short":
        own.file.write_text('{"host": ')
    elif what == "another process of the number":
        write(own)
    else:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ended:
            started = Path(f"/proc/{ended.pid}/stat").read_text().split()[21]
            write(replace(own, pid=ended.pid, started=started))
            with pytest.raises(ValueError, match="is being written by"), owned(tmp_path, say=print):
                pass
            ended.kill()
            os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
            said: list[str] = []
            with owned(tmp_path, say=said.append):
                pass
            assert len(said) == 1
        return
    with owned(tmp_path, say=print) as held:
        assert held.pid == os.getpid()
    assert not tmp_path.exists(), "a folder without anything in it goes again"


def test_a_run_whose_folder_was_taken_saves_nothing_more(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that hung for long does when it comes back."""
    calls, real = [0], loop.training_step

    def training_step(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            write(Owner(str(tmp_path), "elsewhere", 7, "123"))
        return real(*args, **options)

    monkeypatch.setattr(loop, "training_step", training_step)
    with pytest.raises(ValueError, match="is another process's by now"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=8, save_every=2, log_every=0)))
    assert [path.name for path in step_directories(tmp_path)] == ["step-000002"]
    assert json.loads((tmp_path / OWNER_FILE).read_text())["host"] == "elsewhere"
