"""Whose a run's folder is: one process at a time writes into it, and says so in a file."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from shine.checkpoint import output_folder

OWNER_FILE = "owner.json"
SILENCE = 900.0
"""Seconds after which a process of another machine, which cannot be asked, counts as gone if it has not touched its file."""


@dataclass(frozen=True)
class Owner:
    """A process that writes into a folder.

    Attributes:
        host, pid: where it runs.
        started: when, as the system counts; a later process of the same number has another. Empty where it does not say.
        job: the scheduler's number of it, where it has one.
    """

    folder: str
    host: str
    pid: int
    started: str | None
    job: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")

    @property
    def file(self) -> Path:
        return Path(self.folder) / OWNER_FILE

    def beat(self) -> None:
        """Show that this process is alive.

        Raises:
            ValueError: another process has taken the folder over.
        """
        if _read(self.file) != self:
            raise ValueError(f"{self.folder} is another process's by now (see {OWNER_FILE}): this one ends without writing more")
        os.utime(self.file)


@contextmanager
def owned(output: Path, *, say: Callable[[str], None]) -> Iterator[Owner]:
    """Hold a run's folder, which is made where it is missing, and goes again if the block leaves nothing in it.

    Raises:
        ValueError: it cannot be written, or a process that is alive holds it.
    """
    output_folder(output).mkdir(parents=True, exist_ok=True)
    own = Owner(str(output), socket.gethostname(), os.getpid(), _started(os.getpid()), os.environ.get("SLURM_JOB_ID", ""))
    while not _claim(own):
        _remove_dead(own, say=say)
    try:
        yield own
    finally:
        if _read(own.file) == own:
            own.file.unlink(missing_ok=True)
        with suppress(OSError):
            output.rmdir()


def _claim(own: Owner) -> bool:
    """Write the file, whole, unless there is one."""
    draft = own.file.with_name(f".{OWNER_FILE}.{own.host}.{own.pid}")
    draft.write_text(json.dumps(asdict(own)) + "\n", encoding="utf-8")
    try:
        # Unlike a rename a link does not replace, on network file systems too.
        os.link(draft, own.file)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _remove_dead(own: Owner, *, say: Callable[[str], None]) -> None:
    other = _read(own.file)
    if other is not None and _alive(other, own):
        raise ValueError(
            f"output={own.folder} is being written by {other}: wait until it has ended, stop it, or choose another folder; if you "
            f"know that it is gone, delete {own.file}"
        )
    # Out of sight first: of several that found it dead, one succeeds, and it looks again at what it has taken.
    hidden = own.file.with_name(f".{OWNER_FILE}.{own.host}.{own.pid}.deleted")
    with suppress(FileNotFoundError):
        own.file.rename(hidden)
        if _read(hidden) == other:
            hidden.unlink()
            say(f"{own.folder} was {other or 'nobody'}'s, which is gone: taken over")
        else:
            hidden.rename(own.file)


def _read(file: Path) -> Owner | None:
    try:
        return Owner(**{**json.loads(file.read_text(encoding="utf-8")), "folder": str(file.parent)})
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _alive(other: Owner, own: Owner) -> bool:
    if other.host == own.host:
        return other.started == _started(other.pid)
    # By the clock of the file system, which need not be this machine's.
    probe = own.file.with_name(f".{OWNER_FILE}.{own.host}.{own.pid}.now")
    probe.touch()
    try:
        return probe.stat().st_mtime - other.file.stat().st_mtime < SILENCE
    except FileNotFoundError:
        return False
    finally:
        probe.unlink()


def _started(pid: int) -> str | None:
    """When a process started, as the system counts; ``None`` for one that is not there, or has ended and is only still listed."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        # After the name, which may hold anything: the state first, the start as the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]
