"""Stopping on request: a signal lets the step finish, and the run saves before it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""A scheduler's end, the keyboard, and what SLURM sends ahead of pre-emption (``--signal=USR1@120``)."""


class StoppedError(BaseException):
    """A run that was asked to stop, and has saved what it needs to go on where there was anything to save.

    No ``Exception``, as ``KeyboardInterrupt`` is none: it may come in the middle of what takes any exception for a damaged file.

    Attributes:
        signal_number: what asked.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Whether this process was asked to stop, and by which signal.

    Until ``patient`` is set there is nothing to save, and a signal stops the process where it stands.

    Args:
        quiet: say nothing of a signal, which reaches all ranks: one of them speaks.
    """

    signal_number: int = 0
    patient: bool = False
    _since: float = 0.0

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        # Without torchrun a parent may go: a run under nohup outlives its terminal.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def look(self) -> int:
        """The signal that asked to stop, zero for none. A launcher that is gone has asked too: nobody would end its ranks."""
        if not self.signal_number and self._launcher not in (None, os.getppid()):
            self.signal_number = signal.SIGHUP
            self._say("the launcher is gone: finishing this step and saving")
        return self.signal_number

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal. A second Ctrl-C interrupts at once, for whoever does not want to wait.

        Other signals do not: a scheduler and the launcher below it often send the same one each.
        """
        name = signal.Signals(number).name
        if not self.patient:
            raise StoppedError(f"{name}: stopped before the first step, there was nothing to save", signal_number=number)
        if number == signal.SIGINT and self.signal_number and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        self.signal_number = number
        self._since = time.monotonic()
        self._say(f"{name}: finishing this step and saving; Ctrl-C again stops at once")

    def _say(self, text: str) -> None:
        if not self.quiet:
            # Not print: a signal may come in the middle of one. Whoever read this may be gone.
            with suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


@contextmanager
def stop_requests(*, quiet: bool = False) -> Iterator[StopRequest]:
    """Catch the signals inside the block; outside the main thread, where Python cannot, no request ever comes."""
    request = StopRequest(quiet=quiet)
    try:
        before = {number: signal.signal(number, request) for number in SIGNALS}
    except ValueError:
        before = {}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
