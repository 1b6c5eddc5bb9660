"""What holds for every command of ``shine``: its help, its exit codes, and how it ends when nobody reads or wants it any more."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from shine.cli.main import _parser, main

ROOT = Path(__file__).resolve().parent.parent
SHINE = [sys.executable, "-m", "shine.cli.main"]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


ALL = {parser.prog: parser for parser in parsers(_parser())}


def test_the_commands_are_all_here() -> None:
    assert {"shine", "shine fetch", "shine store compose", "shine serve-adapter unregister", "shine data check"} <= set(ALL)
    assert len(ALL) > 30


@pytest.mark.parametrize("prog", ALL)
def test_every_help_has_examples_that_are_understood_and_the_exit_codes_in_a_line(
    prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*prog.split()[1:], "--help"])
    told = capsys.readouterr().out
    examples = told.partition("\nexamples:\n")[2].partition("\n\n")[0].splitlines()
    assert any(re.search(rf"(^|\| ){prog} ", line.strip()) for line in examples)
    for line in examples:
        words = shlex.split(line)
        # Before it there may be a variable, or another program and its pipe; or it is a door's line.
        if "shine" in words:
            _parser().parse_args(words[words.index("shine") + 1 :])
    codes = [line for line in told.splitlines() if line.startswith("exit codes: 0 done;")]
    assert len(codes) == 1
    assert ("; 1 " in codes[0]) == (prog in ("shine check", "shine data check"))
    assert all(f"; {code} " in codes[0] for code in (2, 130, 143))


@pytest.mark.parametrize("arguments", [["info", "cpu-world"], ["--help"], ["store", "--help"]], ids=" ".join)
def test_a_reader_who_has_gone_is_not_complained_about(arguments: list[str]) -> None:
    """As in ``shine info … | head -1``, but surely gone before anything is written."""
    with subprocess.Popen([*SHINE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert said == ""
    # Where nothing is buffered, argparse itself keeps silent about a help that nobody reads.
    assert process.returncode == 128 + signal.SIGPIPE or (process.returncode == 0 and "--help" in arguments)


def test_a_shell_sees_the_first_line_alone() -> None:
    line = f"{shlex.join(SHINE)} info cpu-world | head -1"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("checkpoint ")
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_waits_for_a_text_ends_when_it_is_told(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [*SHINE, "encode", "-", "--model", "cpu-world", "-o", str(tmp_path / "out")]
    # It begins to read once it is up, and says nothing of that: what it has taken of a pipe is seen instead.
    # Shells let what they start in the background ignore SIGINT, the tests among it.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, preexec_fn=heard) as process:
        assert process.stdin is not None
        # More than a pipe holds, so that this returns only when the command reads.
        process.stdin.write(b"a" * 100_000)
        process.stdin.flush()
        # Again where the first came just between two reads, of which Python learns when the second one ends.
        for _ in range(20):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
                break
        assert process.stderr is not None
        assert (process.poll(), process.stderr.read()) == (code, b"")
        process.stdin.close()
    assert not (tmp_path / "out").exists()


def test_what_was_set_for_signals_before_is_set_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["info", "cpu-world"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
