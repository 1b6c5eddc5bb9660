"""Pictures of how long contexts and conversations are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_BARS = 40
_COLORS = ("#30638e", "#d1495b")


@dataclass(frozen=True)
class Lengths:
    """Tokens of every item's context and of its conversation, ``[N]`` each."""

    context: np.ndarray
    conversation: np.ndarray


def draw_lengths(
    parts: Mapping[str, Lengths], file: str | Path, *, title: str = "", limits: tuple[int, int] | None = None, what: str = "items"
) -> None:
    """Write a PNG with a row for each part: histograms of both lengths in tokens, with means and longest.

    The rows share their scales; the last bar holds the longest hundredth of all, which would squeeze the others together.

    Args:
        parts: by name; those without an item are left out.
        limits: most tokens of a context and of a conversation, marked where they are in sight.
        what: the items are called.
    """
    # Without pyplot, which would choose a window system.
    from matplotlib.figure import Figure

    filled = {name: part for name, part in parts.items() if len(part.context)}
    figure = Figure(figsize=(10, 0.9 + (2.6 if len(filled) == 1 else 1.9 * len(filled))), layout="constrained")
    axes = figure.subplots(len(filled), 2, squeeze=False, sharex="col")
    for column, name in enumerate(("context", "conversation")):
        kept = [getattr(part, name) for part in filled.values()]
        edge = max(max(float(np.percentile(values, 99)) for values in kept), 1.0)
        # Of a whole number of tokens each, so that none is empty by rounding.
        start = min(int(values.min()) for values in kept)
        width = max(round((edge - start) / _BARS), 1)
        bins = np.arange(start, edge + 2 * width, width)
        for axis, part, values in zip(axes[:, column], filled, kept, strict=True):
            axis.hist(np.minimum(values, edge), bins=bins, color=_COLORS[column], alpha=0.85)
            mean = f"mean {values.mean():,.0f}, longest {values.max():,}"
            axis.axvline(values.mean(), color="black", linewidth=1.2, label=mean)
            if limits is not None and limits[column] <= edge:
                axis.axvline(limits[column], color="black", linewidth=1.2, linestyle=":", label=f"limit {limits[column]:,}")
            axis.legend(frameon=False, fontsize=8, title=f"{part}: {len(values):,} {what}" if part else None, title_fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.02)
            axis.set_ylabel(what)
        axes[-1, column].set_xlabel(f"{name}, tokens (the last bar holds all that are longer)")
    if title:
        figure.suptitle(title, fontsize=11)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
