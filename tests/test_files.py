"""Folders and files that appear whole or not at all, whoever writes them at once and whenever a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shine.checkpoint import find_checkpoint
from shine.files import file_written_beside, restore, written_beside
from shine.lora import LoRA


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "run" / "step-1"
    with written_beside(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent  # so that renaming it is one operation of one file system
    assert [file.name for file in target.iterdir()] == ["one"]
    assert [child.name for child in target.parent.iterdir()] == ["step-1"]


def write_and_fail(target: Path, name: str, fault: type[BaseException]) -> None:
    with written_beside(target) as folder:
        (folder / name).write_text(name)
        raise fault


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_half_written_and_the_old_folder_whole(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "step-1"
    with pytest.raises(fault):
        write_and_fail(target, "one", fault)
    assert list(tmp_path.iterdir()) == []

    with written_beside(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(fault):
        write_and_fail(target, "new", fault)
    assert [child.name for child in tmp_path.iterdir()] == ["step-1"]
    assert [(file.name, file.read_text()) for file in target.iterdir()] == [("old", "old")]


def test_an_old_folder_is_replaced_not_mixed(tmp_path: Path) -> None:
    target = tmp_path / "final"
    for name in ("old", "new"):
        with written_beside(target) as folder:
            (folder / name).write_text(name)
    assert [file.name for file in target.iterdir()] == ["new"]


def test_what_a_link_points_at_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    for name in ("one", "two"):
        with written_beside(tmp_path / "link") as folder:
            (folder / name).touch()
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real"]
    assert os.listdir(tmp_path / "link") == ["two"]


def in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_that_write_one_folder_do_not_meet(tmp_path: Path) -> None:
    """Each writes two files slowly enough to overlap; what is there at any time is of one of them."""
    target, failures = tmp_path / "adapter", []

    def write(number: int) -> None:
        try:
            for _ in range(10):
                with written_beside(target) as folder:
                    (folder / "a").write_text(str(number))
                    time.sleep(0.001)
                    (folder / "b").write_text(str(number))
        except BaseException as error:
            failures.append(error)

    in_threads(write, 4)
    assert failures == []
    assert sorted(os.listdir(target)) == ["a", "b"]
    assert (target / "a").read_text() == (target / "b").read_text()
    assert os.listdir(tmp_path) == ["adapter"]


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    target, failures = tmp_path / "lines", []

    def write(number: int) -> None:
        try:
            for _ in range(10):
                with file_written_beside(target) as stream:
                    for _ in range(3):
                        stream.write(f"{number}\n".encode())
                        stream.flush()
                        time.sleep(0.0005)
        except BaseException as error:
            failures.append(error)

    in_threads(write, 4)
    assert failures == []
    assert len(set(target.read_text().split())) == 1
    assert len(target.read_text().split()) == 3
    assert os.listdir(tmp_path) == ["lines"]


# --- killed ----------------------------------------------------------------------------------------------------------------

# The new folder cannot take the place of the old, which is moved aside; the new one takes it; the old is removed.
MOMENTS = {"before the first rename": 1, "before the old is aside": 2, "before the new is in place": 3, "before the old is gone": 4}
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from shine.lora import LoRA

calls = 0
def counted(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

Path.rename, shutil.rmtree = counted(Path.rename), counted(shutil.rmtree)
LoRA({"q": (torch.full((1, 3, 1), 2.0), torch.ones(1, 1, 3))}).save(sys.argv[1])
"""


def filled(value: float) -> LoRA:
    return LoRA({"q": (torch.full((1, 3, 1), value), torch.ones(1, 1, 3))})


def value_of(adapter: Path) -> float:
    return float(LoRA.load(adapter)["q"][0][0, 0, 0])


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_adapter_is_never_lost_when_the_process_that_replaces_it_is_killed(moment: str, tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    filled(1).save(target)
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(MOMENTS[moment])], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert target.exists() == (moment != "before the new is in place")
    assert value_of(target) == (2 if moment == "before the old is gone" else 1)
    filled(3).save(target)
    assert value_of(target) == 3
    assert not list(tmp_path.glob(".*.replaced"))


def test_a_write_that_fails_gives_back_what_a_kill_left_aside(tmp_path: Path) -> None:
    target = tmp_path / "final"
    (tmp_path / ".final.77-0a1b.replaced").mkdir()
    (tmp_path / ".final.77-0a1b.replaced" / "old").touch()
    (tmp_path / ".final.2.77-0a1b.replaced").mkdir()  # of "final.2", which is nobody's here
    with pytest.raises(RuntimeError):
        write_and_fail(target, "new", RuntimeError)
    assert os.listdir(target) == ["old"]
    assert sorted(os.listdir(tmp_path)) == [".final.2.77-0a1b.replaced", "final"]


def test_the_end_of_a_run_that_was_being_replaced_is_found(tmp_path: Path) -> None:
    aside = tmp_path / "run" / ".final.77-0a1b.replaced"
    aside.mkdir(parents=True)
    (aside / "config.json").touch()
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "final"


def test_what_has_its_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / ".a.1-f.replaced").mkdir()
    restore(tmp_path / "a")
    restore(tmp_path / "none" / "b")
    assert sorted(os.listdir(tmp_path)) == [".a.1-f.replaced", "a"]


# --- asked to stop ---------------------------------------------------------------------------------------------------------

# A command of shine that says when it has written half of what it writes, and takes its time over the rest.
SLOW = """
import importlib, sys, time
from shine.cli.main import main

module = importlib.import_module(sys.argv[1])
real = module.save_file
def slow(*arguments, **options):
    real(*arguments, **options)
    print("half", flush=True)
    time.sleep(60)
module.save_file = slow
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kind", ["encode", "export"])
def test_a_command_that_is_asked_to_stop_leaves_what_was_there(kind: str, notes: Path, adapter: Path, tmp_path: Path) -> None:
    module, options = {
        "encode": ("shine.adapter_files", ["encode", notes, "--model", "cpu-world", "--device", "cpu", "-o", tmp_path / "adapter"]),
        "export": ("shine.export.peft", ["export", adapter, "-o", tmp_path / "peft"]),
    }[kind]
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    command = [sys.executable, "-c", SLOW, module, *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        assert list(tmp_path.glob(".*.partial"))
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "")
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before
    assert not list(tmp_path.glob(".*"))
