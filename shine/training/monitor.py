"""Seeing a run: TensorBoard, a line of JSON for each log step, a progress bar or console lines, a log file for each rank."""

from __future__ import annotations

import json
import logging
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS_FILE, SAMPLES_FILE, BAD_STEPS_FILE, LOG_FOLDER = "metrics.jsonl", "samples.jsonl", "bad_steps.jsonl", "logs"


class Monitor:
    """A rank's view of a run. Rank 0 shows it: a bar with steps, loss, tokens a second and time left, or lines without a terminal.

    Args:
        output: folder of the run; TensorBoard's files go to ``tensorboard/`` in it, every scalar also to ``metrics.jsonl``, what
            is said, with what a rank dies of, to ``logs/rank-N.log``.
        start: steps already done.
        total: steps of the whole run.
        title: what the bar calls itself.
        rank: the first shows and writes what all have in common.
    """

    def __init__(self, output: Path, *, start: int, total: int, title: str, rank: int) -> None:
        self.quiet = rank > 0
        self.total, self.title = total, title
        self.done = self.start = start
        self.tokens = 0
        self.log = _rank_log(output / LOG_FOLDER, rank)
        self.log.info("rank %d on %s, from step %d of %d: %s", rank, socket.gethostname(), start, total, title)
        self.started = time.perf_counter()
        self.idle = 0.0
        self.idle_since: float | None = None
        if self.quiet:
            return
        # TensorBoard forgets this step too, and the last one done is not done again.
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)
        self.lines = _continued(output / METRICS_FILE, start).open("a", encoding="utf-8")
        self.samples = _continued(output / SAMPLES_FILE, start).open("a", encoding="utf-8")
        self.bad_steps = _continued(output / BAD_STEPS_FILE, start)
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.log.error("ended after step %d", self.done, exc_info=error)
        for handler in list(self.log.handlers):
            self.log.removeHandler(handler)
            handler.close()
        if not self.quiet:
            self.bar.close()
            self.writer.close()
            self.lines.close()
            self.samples.close()

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens a second of training since the run began (or was resumed): see `paused`."""
        until = time.perf_counter() if self.idle_since is None else self.idle_since
        return self.tokens / max(until - self.started - self.idle, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block (an evaluation, a save) is not training, and its time does not count as such."""
        self.idle_since = time.perf_counter()
        try:
            yield
        finally:
            self.idle += time.perf_counter() - self.idle_since
            self.idle_since = None

    def advance(self, *, tokens: int, loss: float) -> None:
        """A step is done."""
        self.done += 1
        self.tokens += tokens
        if not self.quiet:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {self.tokens_per_second:,.0f} tokens/s", refresh=False)
            self.bar.update()

    def record(self, scalars: Mapping[str, float]) -> None:
        """Write scalars under the current step, and say them in one line, above the bar where there is one."""
        if self.quiet:
            return
        scalars = {**scalars, "tokens_per_second": self.tokens_per_second, "memory_gb": memory_gb()}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.done)
        self.lines.write(json.dumps({"step": self.done, **scalars}) + "\n")
        self.lines.flush()
        left = (time.perf_counter() - self.started) / max(self.done - self.start, 1) * (self.total - self.done)
        text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        line = f"{self.title} {self.done}/{self.total}  {text}  {left:.0f} s left"
        self.bar.write(line)
        sys.stdout.flush()

    def record_bad(self, row: Mapping[str, object]) -> None:
        """Write down a step that was not taken."""
        if not self.quiet:
            with self.bad_steps.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": self.done, **row}) + "\n")

    def show_answers(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Write what the model says at this step, beside what it should have said, as text."""
        if self.quiet:
            return
        for row in rows:
            self.samples.write(json.dumps({"step": self.done, **row}, ensure_ascii=False) + "\n")
        self.samples.flush()
        body = "\n".join("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows)
        names = list(rows[0]) if rows else []
        self.writer.add_text("answers", f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n{body}", self.done)

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        self.log.info("%s", text)
        if not self.quiet:
            self.bar.write(text)


def memory_gb() -> float:
    """The most memory this process has held so far: of its GPU where it has one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _rank_log(folder: Path, rank: int) -> logging.Logger:
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger(f"shine.training.rank{rank}")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler(folder / f"rank-{rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(message)s"))
    log.addHandler(handler)
    return log


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _continued(file: Path, start: int) -> Path:
    """The file without the lines of steps that are about to be done (again), and without one that a kill cut short."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        shorter = file.with_name(f".{file.name}.partial")
        kept = [line for n, line in enumerate(lines, start=1) if line.endswith("\n") and _step_of(line, f"{file}:{n}") <= start]
        shorter.write_text("".join(kept), encoding="utf-8")
        shorter.replace(file)
    return file


def _step_of(line: str, place: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{place}: not a line that a run wrote; delete it to go on") from None
