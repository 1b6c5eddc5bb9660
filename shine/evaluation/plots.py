"""Pictures of a run: how the loss fell, what the methods scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from shine.evaluation.tables import TITLES
from shine.training.monitor import METRICS_FILE

COLORS = {"shine": "#d1495b", "in_context": "#30638e", "only_question": "#9aa5b1"}
STAGE_COLORS = ("#30638e", "#edae49", "#d1495b")


def read_metrics(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one scalar of a training run."""
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and its neighbours, up to ``reach`` on either side."""
    means = []
    for place in range(len(values)):
        near = values[max(place - reach, 0) : place + reach + 1]
        means.append(sum(near) / len(near))
    return means


def draw_losses(axes: Axes, runs: Mapping[str, Path]) -> None:
    """The training loss of the stages, one after the other: as logged, faint, and smoothed."""
    done = 0
    for (stage, run), color in zip(runs.items(), STAGE_COLORS, strict=False):
        steps, losses = read_metrics(run, "loss")
        places = [done + step for step in steps]
        axes.plot(places, losses, color=color, linewidth=1, alpha=0.35)
        axes.plot(places, smooth(losses, max(len(losses) // 12, 1)), color=color, linewidth=2.2, label=stage)
        done = places[-1]
    axes.set(xlabel="optimizer step", ylabel="loss a label token (nats)", title="Training, from nothing")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=len(runs))


def draw_scores(axes: Axes, methods: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """EM and F1 of each method as bars with their figures."""
    names = list(methods)
    for offset, (metric, shade) in enumerate((("em", 1.0), ("f1", 0.55))):
        places = [index + (offset - 0.5) * 0.38 for index in range(len(names))]
        values = [methods[name][metric] for name in names]
        bars = axes.bar(places, values, width=0.36, color=[COLORS[name] for name in names], alpha=shade)
        axes.bar_label(bars, labels=[f"{metric.upper()}\n{value:.1f}" for value in values], fontsize=8, padding=2)
    axes.set(ylabel="percent", title=title, ylim=(0, 118))
    axes.set_yticks(range(0, 101, 20))
    axes.set_xticks(range(len(names)), [TITLES[name] for name in names])


def draw_report(path: Path, *, runs: Mapping[str, Path], scores: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """One picture: the losses above, below a panel of bars for each (title, methods)."""
    figure = plt.figure(figsize=(10, 7.2), constrained_layout=True)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.4))[:, 0]
    draw_losses(above.subplots(), runs)
    bars = below.subplots(1, len(scores), squeeze=False)[0]
    for axes, (title, methods) in zip(bars, scores, strict=True):
        draw_scores(axes, methods, title=title)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
