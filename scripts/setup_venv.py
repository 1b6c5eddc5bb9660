"""Set up .venv from requirements.lock, deciding which torch before anything large is downloaded. Standard library only.

    python3 scripts/setup_venv.py           what make does when .venv is missing or older than the lock
    python3.11 scripts/setup_venv.py lock   write requirements.lock again: the newest releases pyproject.toml allows
    python3 scripts/setup_venv.py engines   what only `make test-all` needs: llama.cpp, built from source, and Gradio

On Linux, PyPI's torch brings gigabytes of CUDA libraries. So pip is first asked what it would install (it reads package
metadata only). Without CUDA packages, or with them and an nvidia-smi on the PATH, that is installed; with them and no
nvidia-smi, torch comes from PyTorch's CPU index instead. TORCH_INDEX=<url> overrides all this: torch comes from there.

    TORCH_INDEX=https://download.pytorch.org/whl/cpu     CPU
    TORCH_INDEX=https://download.pytorch.org/whl/cu130   CUDA 13.0

A .venv that exists is brought up to date and keeps the torch build it has; `make clean` first to change the build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
READY = VENV / ".ready"
"""Written last: a set-up that was interrupted or failed has none, and make runs it again."""
LOCK = ROOT / "requirements.lock"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ENGINES_READY = VENV / ".engines"
LLAMA_CPP = " ".join(
    f"-D{part}=OFF"
    for part in ("LLAVA_BUILD", *(f"LLAMA_BUILD_{what}" for what in ("TOOLS", "TESTS", "EXAMPLES", "SERVER", "APP")))
)
"""Leaves out of llama.cpp's build what the tests do not use."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SUPPORTED = ((3, 11), (3, 13))
CUDA_PACKAGE = re.compile(r"(nvidia|cuda)[-_]")
GPU_PACKAGE = re.compile(r"(nvidia|cuda)[-_]|triton$")
PROJECT = "shine-hypernetwork"

LOCK_HEADER = """\
# Every package of .venv, pinned. Written by `make lock` under Python 3.11, the oldest supported, because a release that runs
# there also runs on 3.12 and 3.13. torch stands without its build (+cpu, +cu130): scripts/setup_venv.py chooses that, and
# the GPU libraries a CUDA build needs are pinned by torch itself.
"""


class SetupError(Exception):
    """What went wrong and what to do about it."""


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say what begins, and how long it took once it is done."""
    print(f"set-up: {what} ...", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - start:.0f} s", flush=True)


def run(*command: str | Path) -> str:
    """The output of a command that succeeds; its error output is shown only if it does not."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def pip_install(python: Path, *arguments: str | Path) -> str:
    return run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", *arguments)


def pin(name: str) -> str:
    """The line of the lock that pins a package."""
    for line in LOCK.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line
    raise SetupError(f"{LOCK} pins no {name}; write it again with `make lock`")


def resolve(python: Path, *requirements: str) -> list[dict[str, Any]]:
    """The name and version of all that pip would install, from metadata alone.

    Two things keep pip from downloading whole wheels here: a pip of 25.3 or newer (older ones download in a dry run, hence the
    pinned pip), and fast-deps, which reads the metadata out of a remote wheel where the index does not serve it separately.
    """
    report = pip_install(python, "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", "-", *requirements)
    return [package["metadata"] for package in json.loads(report)["install"]]


def torch_index(python: Path, torch: str) -> str | None:
    """The index to take torch from, None for what pip is configured with. Says what will be installed, and why."""
    if index := os.environ.get("TORCH_INDEX"):
        say(f"{torch} comes from TORCH_INDEX={index}")
        return index
    with phase(f"asking pip what {torch} would bring"):
        packages = resolve(python, torch)
    version = next(package["version"] for package in packages if package["name"] == "torch")
    cuda = sum(bool(CUDA_PACKAGE.match(package["name"].lower())) for package in packages)
    if not cuda:
        say(f"torch {version} brings no CUDA packages: installing it as it is")
        return None
    if shutil.which("nvidia-smi"):
        say(f"torch {version} brings {cuda} CUDA packages (gigabytes), and nvidia-smi is here: installing the CUDA build")
        return None
    say(f"torch {version} would bring {cuda} CUDA packages (gigabytes), and there is no nvidia-smi: installing the CPU build from")
    say(f"{CPU_INDEX} (for another one: TORCH_INDEX=<url>)")
    return CPU_INDEX


def install_torch(python: Path) -> None:
    torch = pin("torch")
    installed = json.loads(run(python, "-m", "pip", "list", "--disable-pip-version-check", "--format", "json"))
    for package in installed:
        if package["name"] == "torch" and f"torch=={package['version'].split('+')[0]}" == torch:
            say(f"torch {package['version']} is already installed (`make clean` first to change the build)")
            return
    try:
        index = torch_index(python, torch)
        with phase(f"installing {torch}"):
            pip_install(python, "--no-deps", *(["--index-url", index] if index else []), torch)
    except SetupError as error:
        raise SetupError(
            f"{error}\n\n{torch} could not be installed. Name an index that has it with TORCH_INDEX=<url> before make:\n"
            f"{CPU_INDEX} or a mirror of it (CPU), https://download.pytorch.org/whl/cu130 (CUDA 13.0),\n"
            "https://pypi.org/simple (on Linux with gigabytes of CUDA)."
        ) from None


def usable(python: Path) -> bool:
    """Whether the .venv that is there has pip and a supported Python."""
    check = f"import pip, sys; sys.exit(not {SUPPORTED[0]} <= sys.version_info[:2] <= {SUPPORTED[1]})"
    return python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0


def set_up() -> None:
    """Bring .venv to what the lock says, and mark it ready."""
    python = VENV / "bin" / "python"
    READY.unlink(missing_ok=True)
    if not usable(python):
        with phase(f"making .venv with Python {sys.version.split()[0]}"):
            run(sys.executable, "-m", "venv", "--clear", VENV)
    with phase(f"installing {pin('pip')}"):
        pip_install(python, pin("pip"))
    install_torch(python)
    # A torch from TORCH_INDEX may need packages that only that index has.
    index = os.environ.get("TORCH_INDEX")
    with phase("installing the other pinned packages"):
        pip_install(python, *(["--extra-index-url", index] if index else []), "-r", LOCK)
    with phase("installing SHINE itself"):
        # Built with the pinned setuptools, which is installed by now, rather than with a newer one downloaded for it.
        pip_install(python, "--no-deps", "--no-build-isolation", "-e", ROOT)
    READY.touch()


def engines() -> None:
    """Add the extra ``test-all`` to a .venv that is ready."""
    python = VENV / "bin" / "python"
    ENGINES_READY.unlink(missing_ok=True)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test-all"]
    with tempfile.TemporaryDirectory() as folder:
        # Gradio lags behind in what it allows of pillow; everything else stays as the lock says.
        pins = Path(folder, "constraints.txt")
        pins.write_text("".join(f"{line}\n" for line in LOCK.read_text().splitlines() if not line.startswith("pillow==")))
        os.environ["CMAKE_ARGS"] = os.environ.get("CMAKE_ARGS") or LLAMA_CPP
        try:
            with phase(f"installing {', '.join(wanted)} (llama.cpp is built from source, minutes)"):
                pip_install(python, "-c", pins, *wanted)
        except SetupError as error:
            raise SetupError(
                f"{error}\n\nllama.cpp needs a C++ compiler (Debian, Ubuntu: apt install g++). Without all this: `make test`, or "
                "`.venv/bin/python -m pytest`, which skips the tests of llama.cpp and the page and says so."
            ) from None
    if not any(map(shutil.which, BROWSERS)) and not os.environ.get("NO_CHROMIUM"):
        try:
            with phase("asking Playwright for a Chromium, since there is none here"):
                run(python, "-m", "playwright", "install", "chromium")
        except SetupError as error:
            raise SetupError(
                f"{error}\n\nThe test of the page drives a Chromium, and there is none. Debian, Ubuntu: apt install chromium. With "
                "NO_CHROMIUM=1 before make that test is skipped instead."
            ) from None
    ENGINES_READY.touch()


def lock() -> None:
    """Write the lock: the newest releases that pyproject.toml allows, without downloading them."""
    if sys.version_info[:2] != SUPPORTED[0]:
        raise SetupError("the lock must hold on every supported Python: make it with the oldest, `make lock PYTHON=python3.11`")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder, "bin", "python")
        with phase("resolving pyproject.toml"):
            pip_install(python, "--upgrade", "pip")
            packages = resolve(python, f"{ROOT}[dev]", "pip", "setuptools")
    pins = {package["name"]: package["version"].split("+")[0] for package in packages}
    kept = [name for name in sorted(pins, key=str.lower) if name != PROJECT and not GPU_PACKAGE.match(name.lower())]
    LOCK.write_text(LOCK_HEADER + "".join(f"{name}=={pins[name]}\n" for name in kept))
    say(f"{LOCK.name} pins {len(kept)} packages")


def main() -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        sys.exit(f"SHINE runs on Python 3.11 to 3.13, this is {version}. Name another one: make PYTHON=python3.12 …")
    commands = {(): set_up, ("lock",): lock, ("engines",): engines}
    arguments = tuple(sys.argv[1:])
    if arguments not in commands:
        sys.exit(__doc__)
    try:
        commands[arguments]()
    except SetupError as error:
        sys.exit(f"{error}\n\nset-up failed; .venv is not ready.")


if __name__ == "__main__":
    main()
