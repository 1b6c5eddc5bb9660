"""The runs behind what ships as ``smollm2-135m``, as ``examples/ship.py`` kept them, and the picture of them and each version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from results import Score, Version

from shine.evaluation.plots import STAGE_COLORS, read_metrics

Runs = Sequence[tuple[str, Path]]
"""What was kept of each training run, oldest first: its stage, numbered where one comes twice, and its folder."""
COLORS = dict(zip(("pretrain", "mqa", "1qa"), STAGE_COLORS, strict=True))
INK, PALE = "#333333", "#8a8a8a"
WATCHED = (
    ("loss a label token (nats)", ""),
    ("gap: the label under another context's adapter", "validation/adapter_gap"),
    ("cosine between adapters of two contexts", "validation/adapter_cosine"),
)


def read_recipe(run: Path) -> Mapping[str, Any]:
    """The recipe that `examples/ship.py` kept of a run."""
    found: Mapping[str, Any] = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    return found


def read_runs(training: Path) -> Runs:
    """The runs in a folder that `examples/ship.py` wrote."""
    found, runs = sorted(training.iterdir()), list[tuple[str, Path]]()
    stages = [read_recipe(run)["stage"]["name"] for run in found]
    for number, (stage, run) in enumerate(zip(stages, found, strict=True)):
        before = stages[:number].count(stage)
        runs.append((f"{stage} {before + 1}" if before else stage, run))
    return runs


def contexts_read(runs: Runs) -> int:
    """How many contexts all runs learned from, each as often as it was read."""
    return sum(read_metrics(run, "loss")[0][-1] * read_recipe(run)["stage"]["batch_size"] for _, run in runs)


def validation_losses(run: Path) -> list[str]:
    """The names of the losses that a run watched."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted({name for row in rows for name in row if name.startswith("validation/") and name.endswith("/loss")})


def curves(file: Path, runs: Runs, versions: Sequence[Version], scores: Sequence[Score]) -> None:
    """What each version scored, with its interval, over what it is held against; below, what the runs of the last one watched."""
    figure, (above, below) = plt.subplots(2, 3, figsize=(12.5, 7.4), constrained_layout=True)
    for axes, score in zip(above, scores, strict=True):
        _draw_scores(axes, versions, score)
    for axes, (title, name) in zip(below, WATCHED, strict=True):
        _draw_watched(axes, runs, title, name)
    handles = {label: handle for handle, label in zip(*below[0].get_legend_handles_labels(), strict=True)}
    labels = sorted(handles)
    figure.legend(
        [handles[label] for label in labels],
        labels,
        frameon=False,
        loc="outside lower center",
        ncols=len(handles),
    )
    above[0].set_ylabel("what shipped", fontsize=11, color=INK, labelpad=10)
    below[0].set_ylabel("what its runs watched", fontsize=11, color=INK, labelpad=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_scores(axes: Axes, versions: Sequence[Version], score: Score) -> None:
    places = range(len(versions))
    found = [version.scores[score.name] for version in versions]
    values = [each.value for each in found]
    below, above = [each.value - each.low for each in found], [each.high - each.value for each in found]
    axes.errorbar(places, values, yerr=[below, above], fmt="o-", color=STAGE_COLORS[0], linewidth=2, markersize=6, capsize=4)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.1f}", (place, value), (7, 5), textcoords="offset points", fontsize=9, color=INK)
    end = len(versions) - 0.5
    lines = [(*score.wanted, STAGE_COLORS[2]), *((name, height, PALE) for name, height in score.lines.items())]
    for name, height, color in lines:
        axes.axhline(height, color=color, linewidth=1, linestyle="--", zorder=0)
        axes.annotate(name, (-0.5, height), (3, 3), textcoords="offset points", fontsize=8, color=INK)
    labels = [f"rank {version.rank}\n{version.contexts:,}\ncontexts" for version in versions]
    axes.set_xticks(list(places), labels, fontsize=8)
    axes.set(xlim=(-0.5, end), ylim=(0, 1.12 * max(*(each.high for each in found), *(height for _, height, _ in lines))))
    _finish(axes, score.title)


def _draw_watched(axes: Axes, runs: Runs, title: str, name: str) -> None:
    """Each run in a column of its own: steps of different runs are of different sizes, and what they watched differs too."""
    labels = []
    for column, (numbered, run) in enumerate(runs):
        stage, recipe = numbered.split()[0], read_recipe(run)["stage"]
        labels.append(str(recipe["context_length"]))
        last = read_metrics(run, "loss")[0][-1]
        for metric in [name] if name else validation_losses(run):
            steps, values = read_metrics(run, metric)
            places = [column + 0.8 * step / last for step in steps]
            style = "--" if "/complete/" in metric else "-"
            label = stage + (", completed" if style == "--" else "")
            axes.plot(places, values, style, marker="o", color=COLORS[stage], linewidth=2, markersize=4, label=label)
        if column % 2 == 0:
            axes.axvspan(column - 0.1, column + 0.9, color="#f2f2f2", zorder=0)
    axes.set_xticks([column + 0.4 for column in range(len(runs))], labels, fontsize=8)
    axes.set(xlim=(-0.1, len(runs) - 0.1))
    axes.set_xlabel("one column a run: tokens of a context, at most", fontsize=8)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
