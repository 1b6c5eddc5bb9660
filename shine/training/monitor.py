"""Seeing a run: TensorBoard, a line of JSON for each log step, a progress bar or console lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


class Monitor:
    """Rank 0's view of a run. On a terminal a bar shows steps, loss, tokens a second and time left; elsewhere lines do.

    Args:
        output: folder of the run; TensorBoard's files go to ``tensorboard/`` in it, every scalar also to ``metrics.jsonl``.
        start: steps already done.
        total: steps of the whole run.
        title: what the bar calls itself.
        quiet: another rank than the first writes and shows nothing.
    """

    def __init__(self, output: Path, *, start: int, total: int, title: str, quiet: bool) -> None:
        self.quiet = quiet
        self.total, self.title = total, title
        self.done = self.start = start
        self.tokens = 0
        self.started = time.perf_counter()
        if quiet:
            return
        output.mkdir(parents=True, exist_ok=True)
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=start)
        self.lines = _continued(output / METRICS_FILE, start).open("a", encoding="utf-8")
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.quiet:
            self.bar.close()
            self.writer.close()
            self.lines.close()

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens a second since the run began (or was resumed)."""
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)

    def advance(self, *, tokens: int, loss: float) -> None:
        """A step is done."""
        self.done += 1
        self.tokens += tokens
        if not self.quiet:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {self.tokens_per_second:,.0f} tokens/s", refresh=False)
            self.bar.update()

    def record(self, scalars: Mapping[str, float]) -> None:
        """Write scalars under the current step, and say them in one line where there is no bar."""
        if self.quiet:
            return
        scalars = {**scalars, "tokens_per_second": self.tokens_per_second}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.done)
        self.lines.write(json.dumps({"step": self.done, **scalars}) + "\n")
        self.lines.flush()
        left = (time.perf_counter() - self.started) / max(self.done - self.start, 1) * (self.total - self.done)
        text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        line = f"{self.title} {self.done}/{self.total}  {text}  {left:.0f} s left"
        if self.bar.disable:
            print(line, flush=True)
        elif any("/" in name and name.startswith("validation") for name in scalars):
            self.bar.write(line)

    def say(self, text: str) -> None:
        """A line for the reader, above the bar."""
        if not self.quiet:
            self.bar.write(text)


def _continued(file: Path, start: int) -> Path:
    """The file without the lines of steps that are about to be done (again), and without one that a kill cut short."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        shorter = file.with_name(f".{file.name}.partial")
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        shorter.write_text("".join(kept), encoding="utf-8")
        shorter.replace(file)
    return file
