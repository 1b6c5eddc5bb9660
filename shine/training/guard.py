"""Bad numbers: which optimizer steps are not taken, and when a run should rather stop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from shine.config import StageConfig

NOT_FINITE, SPIKE = "the loss or the gradient is not finite", "the gradient is a spike"


class Guard:
    """Looks at each step's loss and gradient norm before the optimizer uses the gradient.

    Both are global values, rank 0's on every rank, and so is the window of earlier norms: all ranks come to the same verdict.

    Args:
        stage: ``spike_factor`` times the median norm of the last ``spike_window`` steps taken is a spike; ``most_skipped`` steps
            in a row are the end of the run.
        norms: the window of a run that is resumed.
        skipped: how many steps it had skipped in all.
        in_a_row: how many of them were its last ones.
    """

    def __init__(self, stage: StageConfig, *, norms: Iterable[float] = (), skipped: int = 0, in_a_row: int = 0) -> None:
        self.stage = stage
        self.norms = deque(norms, maxlen=stage.spike_window)
        self.skipped = skipped
        self.in_a_row = in_a_row

    def verdict(self, loss: float, norm: float) -> str | None:
        """Why this step must not be taken; ``None`` when it may."""
        reason = self._reason(loss, norm)
        if reason is None:
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        return reason

    def check(self, *, learning_rate: float) -> None:
        """End a run that only skips.

        Raises:
            ValueError: ``most_skipped`` steps in a row were not taken; with the published advice.
        """
        if self.in_a_row >= self.stage.most_skipped:
            raise ValueError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite, or a spike (learning rate "
                f"{learning_rate:.3g}, warm-up {self.stage.warmup_steps} steps): start again with a larger stage.warmup_steps or a "
                "lower stage.learning_rate, or go on so from an earlier step directory: resume=<directory> allow_changes=true"
            )

    def state(self) -> dict[str, object]:
        """What a resumed run needs to go on judging alike: the arguments of a new guard."""
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return NOT_FINITE
        full = len(self.norms) == self.stage.spike_window
        if full and self.stage.spike_factor is not None and norm > self.stage.spike_factor * median(self.norms):
            return SPIKE
        return None
