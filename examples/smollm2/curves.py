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
AGAIN_FILE = "again.json"
"""Beside a run's metrics: what was measured of its end later, and on what."""
WATCHED = (
    # Its title, its name in the metrics (empty: each loss), and in `AGAIN_FILE`.
    ("loss a label token (nats)", "", "loss"),
    ("gap: the label under another context's adapter", "validation/adapter_gap", "gap"),
    ("cosine between adapters of two contexts", "validation/adapter_cosine", "cosine"),
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


def samples_drawn(runs: Runs) -> int:
    """How many samples were drawn for all runs, each as often as it was: a context with its questions, in 1qa one question."""
    return sum(read_metrics(run, "loss")[0][-1] * read_recipe(run)["stage"]["batch_size"] for _, run in runs)


def steps_not_taken(runs: Runs) -> int:
    """Steps of all runs whose loss or gradient was no number."""
    return sum(int(read_metrics(run, "skipped_steps")[1][-1]) for _, run in runs)


def measured_again(run: Path) -> Mapping[str, Any] | None:
    """What was measured of a run's end later, by name, and what about."""
    file = run / AGAIN_FILE
    found: Mapping[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return found


def validation_losses(run: Path) -> list[str]:
    """The names of the losses that a run watched."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted({name for row in rows for name in row if name.startswith("validation/") and name.endswith("/loss")})


def curves(file: Path, runs: Runs, versions: Sequence[Version], scores: Sequence[Score]) -> None:
    """What each version scored, with its interval, over what it is held against; below, what the runs of the last one watched."""
    figure, (above, below) = plt.subplots(2, 3, figsize=(12.5, 7.4), constrained_layout=True)
    for axes, score in zip(above, scores, strict=True):
        _draw_scores(axes, versions, score)
    for axes, watched in zip(below, WATCHED, strict=True):
        _draw_watched(axes, runs, *watched)
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
    places = [version.samples / 1000 for version in versions]
    found = [version.scores[score.name] for version in versions]
    values = [each.value for each in found]
    below, above = [each.value - each.low for each in found], [each.high - each.value for each in found]
    axes.errorbar(places, values, yerr=[below, above], fmt="o", color=STAGE_COLORS[0], markersize=6, capsize=4)
    for number, (place, value, version) in enumerate(zip(places, values, versions, strict=True)):
        if number and versions[number - 1].rank == version.rank:
            axes.plot(places[number - 1 : number + 1], values[number - 1 : number + 1], color=STAGE_COLORS[0], linewidth=2)
        last = number == len(versions) - 1
        axes.annotate(
            f"{value:.1f}\nrank {version.rank}",
            (place, value),
            (8 if last else -8, 0),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            va="center",
            ha="left" if last else "right",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    width = 1.35 * places[-1]
    # What is wanted is named at the right, all else between the first version and the others, where no figure stands.
    lines = [(*score.wanted, STAGE_COLORS[2], width, "right")]
    lines += [(name, height, PALE, 0.3 * width, "center") for name, height in score.lines.items()]
    for name, height, color, place, side in lines:
        axes.axhline(height, color=color, linewidth=1, linestyle="--", zorder=0)
        axes.annotate(name, (place, height), (-3, 3), textcoords="offset points", fontsize=8, color=INK, ha=side)
    axes.set_xlabel("thousands of samples drawn for it", fontsize=8)
    axes.set(xlim=(-0.1 * width, width), ylim=(0, 1.12 * max(*(each.high for each in found), *(height for _, height, *_ in lines))))
    finish(axes, score.title)


def _draw_watched(axes: Axes, runs: Runs, title: str, name: str, kept: str) -> None:
    """Each run in a column of its own: steps of different runs are of different sizes, and what they watched differs too."""
    labels = []
    for column, (numbered, run) in enumerate(runs):
        stage, recipe = numbered.split()[0], read_recipe(run)["stage"]
        labels.append(str(recipe["context_length"]))
        last, again = read_metrics(run, "loss")[0][-1], measured_again(run)
        for metric in [name] if name else validation_losses(run):
            steps, values = read_metrics(run, metric)
            places = [column + 0.8 * step / last for step in steps]
            if again is not None:
                # What the run itself saw of its end was measured on too few contexts to stand beside the others.
                places, values = [column + 0.8], [again[kept]]
            style = "--" if "/complete/" in metric else "-"
            label = stage + (", completed" if style == "--" else "")
            axes.plot(places, values, style, marker="o", color=COLORS[stage], linewidth=2, markersize=4, label=label)
        if column % 2 == 0:
            axes.axvspan(column - 0.1, column + 0.9, color="#f2f2f2", zorder=0)
    axes.set_xticks([column + 0.4 for column in range(len(runs))], labels, fontsize=8)
    axes.set(xlim=(-0.1, len(runs) - 0.1))
    axes.set_xlabel("one column a run: tokens of a context, at most", fontsize=8)
    finish(axes, title)


def finish(axes: Axes, title: str) -> None:
    """How all these pictures look."""
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
