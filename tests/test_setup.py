"""Set-up chooses torch before it downloads it, fails without a .venv that looks done, and pytest leaves the programs alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([^#=\s]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

TORCH = f"torch=={PINS['torch']}"
PLAIN = [("torch", PINS["torch"]), ("sympy", "1.14.0")]
CUDA = [*PLAIN, ("nvidia-cublas", "13.1"), ("cuda-bindings", "13.5"), ("triton", "3.7")]

# Stands where .venv/bin/python is expected: notes each pip command, with what the user had read by then, and answers it.
FAKE_PYTHON = """\
#!{interpreter}
import json, pathlib, sys
here = pathlib.Path({here!r})
fake = json.loads((here / "fake.json").read_text())
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "playwright"] and fake["fail_on"] == "playwright":
    sys.exit("no network")
if arguments[:2] == ["-m", "pip"]:
    with (here / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([arguments, (here / "said").read_text()]) + "\\n")
    if fake["fail_on"] in arguments:
        sys.exit("no such wheel")
    if "--report" in arguments:
        packages = [{{"metadata": {{"name": name, "version": version}}}} for name, version in fake["resolved"]]
        print(json.dumps({{"install": packages}}))
    if "list" in arguments and "-qq" not in arguments:
        print(json.dumps(fake["installed"]))
"""


@dataclass
class Outcome:
    """What a set-up with a fake pip did.

    Attributes:
        ready: whether .venv is marked as ready; for ``engines``, as ready for all tests.
    """

    returncode: int
    said: str
    error: str
    calls: list[tuple[list[str], str]]
    ready: bool

    def install(self, what: str) -> tuple[list[str], str]:
        """The one command that installed ``what``, and what had been said before it."""
        (found,) = [call for call in self.calls if what in call[0] and "install" in call[0] and "--report" not in call[0]]
        return found


@pytest.fixture
def set_up(tmp_path):
    """Run scripts/setup_venv.py in a folder of its own, with a fake pip and, if asked for, an nvidia-smi."""

    def run(*, resolved=PLAIN, gpu=False, torch_index=None, installed=(), fail_on=None, command=(), programs_here=()) -> Outcome:
        for file in ("scripts/setup_venv.py", "requirements.lock", "pyproject.toml"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
        programs, venv = tmp_path / "programs", tmp_path / ".venv" / "bin"
        programs.mkdir()
        venv.mkdir(parents=True)
        fake = {"resolved": resolved, "installed": installed, "fail_on": fail_on}
        (tmp_path / "fake.json").write_text(json.dumps(fake))
        (tmp_path / ".venv" / ".ready").touch()
        executables = {venv / "python": FAKE_PYTHON.format(interpreter=sys.executable, here=str(tmp_path))}
        if gpu:
            executables[programs / "nvidia-smi"] = "#!/bin/sh\n"
        executables |= {programs / name: "#!/bin/sh\n" for name in programs_here}
        for path, text in executables.items():
            path.write_text(text)
            path.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if key != "TORCH_INDEX"} | {"PATH": str(programs)}
        if torch_index:
            environment["TORCH_INDEX"] = torch_index
        with (tmp_path / "said").open("w") as said:
            done = subprocess.run(
                [sys.executable, tmp_path / "scripts" / "setup_venv.py", *command],
                stdout=said,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        return Outcome(
            returncode=done.returncode,
            said=(tmp_path / "said").read_text(),
            error=done.stderr,
            calls=[tuple(json.loads(line)) for line in (tmp_path / "calls.jsonl").read_text().splitlines()],
            ready=(tmp_path / ".venv" / (".engines" if command else ".ready")).exists(),
        )

    return run


def test_what_only_test_all_needs_comes_within_the_lock(set_up):
    outcome = set_up(command=["engines"], programs_here=["chromium"])
    assert outcome.returncode == 0, outcome.error
    assert outcome.ready
    ((command, said_before),) = outcome.calls
    wanted = PYPROJECT["project"]["optional-dependencies"]["test-all"]
    assert command[command.index("-c") + 2 :] == wanted
    assert "built from source" in said_before
    assert {Requirement(each).name for each in wanted} >= {"gradio", "llama-cpp-python", "playwright"}


def test_without_a_chromium_test_all_says_what_to_do_and_tries_again(set_up, monkeypatch):
    outcome = set_up(command=["engines"], fail_on="playwright")
    assert outcome.returncode == 1
    assert not outcome.ready
    assert "no network" in outcome.error
    assert "apt install chromium" in outcome.error
    assert "NO_CHROMIUM=1" in outcome.error


def test_who_wants_no_chromium_needs_none(set_up, monkeypatch):
    monkeypatch.setenv("NO_CHROMIUM", "1")
    outcome = set_up(command=["engines"], fail_on="playwright")
    assert outcome.returncode == 0, outcome.error
    assert outcome.ready


def test_without_a_compiler_test_all_says_what_to_do(set_up):
    outcome = set_up(command=["engines"], fail_on="llama-cpp-python>=0.3.36")
    assert outcome.returncode == 1
    assert not outcome.ready
    assert "apt install g++" in outcome.error


@pytest.mark.parametrize(
    ("resolved", "gpu", "torch_index", "index", "message"),
    [
        pytest.param(CUDA, False, None, CPU_INDEX, "no nvidia-smi: installing the CPU build", id="CUDA without a GPU"),
        pytest.param(CUDA, True, None, None, "2 CUDA packages (gigabytes), and nvidia-smi is here", id="CUDA with a GPU"),
        pytest.param(PLAIN, False, None, None, "brings no CUDA packages", id="no CUDA"),
        pytest.param(PLAIN, True, None, None, "brings no CUDA packages", id="no CUDA, with a GPU"),
        pytest.param(CUDA, False, "https://a.b/cu130", "https://a.b/cu130", "TORCH_INDEX=https://a.b/cu130", id="TORCH_INDEX"),
    ],
)
def test_which_torch(set_up, resolved, gpu, torch_index, index, message):
    outcome = set_up(resolved=resolved, gpu=gpu, torch_index=torch_index)
    assert outcome.returncode == 0, outcome.error
    assert outcome.ready

    command, said_before = outcome.install(TORCH)
    assert message in said_before
    assert command[command.index("--no-deps") + 1 :] == [*(["--index-url", index] if index else []), TORCH]

    asked = [command for command, _ in outcome.calls if "--report" in command]
    assert len(asked) == (0 if torch_index else 1)
    assert all("--dry-run" in command and "--use-feature=fast-deps" in command for command in asked)
    # Only torch comes from another index, except for the packages that a TORCH_INDEX has and others do not.
    rest, _ = outcome.install("-r")
    assert ("--extra-index-url" in rest) == (torch_index is not None)
    assert "--index-url" not in rest


def test_pip_is_pinned_before_it_is_asked(set_up):
    """An older pip downloads whole wheels in a dry run."""
    commands = [command for command, _ in set_up(resolved=CUDA).calls]
    asked = next(i for i, command in enumerate(commands) if "--report" in command)
    assert any(f"pip=={PINS['pip']}" in command for command in commands[:asked])


def test_an_installed_torch_stays(set_up):
    outcome = set_up(resolved=CUDA, installed=[{"name": "torch", "version": f"{PINS['torch']}+cu130"}])
    assert outcome.ready
    assert "already installed" in outcome.said
    assert not any(TORCH in command for command, _ in outcome.calls)


def test_another_installed_torch_is_replaced(set_up):
    outcome = set_up(resolved=PLAIN, installed=[{"name": "torch", "version": "2.8.0"}])
    assert outcome.install(TORCH)


@pytest.mark.parametrize(("fail_on", "torch_failed"), [("--report", True), ("--index-url", True), ("-r", False), ("-e", False)])
def test_a_failure_is_not_ready(set_up, fail_on, torch_failed):
    outcome = set_up(resolved=CUDA, fail_on=fail_on)
    assert outcome.returncode != 0
    assert not outcome.ready
    assert "no such wheel" in outcome.error
    assert ("TORCH_INDEX=<url>" in outcome.error) == torch_failed


def test_pytest_leaves_the_programs_alone(tmp_path):
    """Whether it starts from the root without arguments or is pointed at the whole clone."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for program in ("test.py", "test_pretrain.py", "test_pwc.py"):
        (tmp_path / program).write_text("raise SystemExit('this is a program')\n")
    (tmp_path / "tests" / "deeper").mkdir(parents=True)
    for name in ("test_a.py", "deeper/test_b.py"):
        (tmp_path / "tests" / name).write_text("def test_it(): pass\n")
    for arguments in ([], ["."]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.findall(r"^(\S+)::test_it$", done.stdout, flags=re.MULTILINE) == ["tests/deeper/test_b.py", "tests/test_a.py"]


def test_the_lock_fits_pyproject():
    project = PYPROJECT["project"]
    requirements = [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *PYPROJECT["build-system"]["requires"],
    ]
    for requirement in map(Requirement, requirements):
        pinned = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} but the lock has {pinned}"
    assert "+" not in PINS["torch"]
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in PINS)
    assert project["name"] not in PINS


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_help_names_every_target():
    printed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    assert re.findall(r"^make (\S+) ", printed, flags=re.MULTILINE) == targets
    assert "TORCH_INDEX" in printed
