"""Pictures of how long contexts and conversations are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from shine.data.collection import PartReport


def plot_lengths(parts: Mapping[str, PartReport], path: str | Path) -> None:
    """A row for each part that has items: its context and conversation lengths in tokens, with their means, as a PNG."""
    from matplotlib.figure import Figure

    filled = {name: part for name, part in parts.items() if part.items}
    figure = Figure(figsize=(9, 0.7 + 1.7 * len(filled)), layout="constrained")
    axes = figure.subplots(len(filled), 2, squeeze=False, sharex="col")
    for column, title in enumerate(("context", "conversation")):
        kept = [np.asarray(part.contexts if column == 0 else part.conversations) for part in filled.values()]
        # The longest per cent would squeeze all the rest into one bar; it is counted in the last one.
        most = max(float(np.percentile(values, 99)) for values in kept)
        for axis, name, values in zip(axes[:, column], filled, kept, strict=True):
            axis.hist(np.minimum(values, most), bins=np.linspace(0, most, 51), color="tab:blue")
            axis.axvline(values.mean(), color="tab:orange", linewidth=1.5)
            label = f"{name}: {len(values):,} items\nmean {values.mean():,.0f}, longest {values.max():,}"
            axis.text(0.98, 0.93, label, transform=axis.transAxes, ha="right", va="top", fontsize=8)
            axis.set_yticks([])
            axis.spines[["top", "left", "right"]].set_visible(False)
        axes[-1, column].set_xlabel(f"{title}, tokens (the last bar holds all that are longer)")
    figure.savefig(path, dpi=120)
