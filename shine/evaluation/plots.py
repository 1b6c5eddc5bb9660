"""Pictures: how the loss of a run fell, what the methods scored, by length, by turn, and for how much time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from shine.evaluation.tables import TITLES, title_of
from shine.training.monitor import METRICS_FILE

if TYPE_CHECKING:
    from shine.evaluation.report import Run

COLORS = {
    "shine": "#d1495b",
    "in_context": "#30638e",
    "in_context_tuned": "#66a182",
    "shine_other": "#e9a6b0",
    "only_question": "#9aa5b1",
}
TUNED = "#edae49"
DASHES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^")
STAGE_COLORS = ("#30638e", "#edae49", "#d1495b")
GROUPINGS = (
    ("F1 by length of the context, tokens up to", "lengths", "by_length.png"),
    ("F1 by turn", "turns", "by_turn.png"),
)
"""How answers are grouped: a title, the key of a summary, and the file of the picture."""
TIME, RECALL = "Time against quality", "Texts given back, by length"


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
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)


def draw_runs(runs: Sequence[Run], output: Path) -> dict[str, Path]:
    """Every picture that the results of some runs have something for: title and file."""
    answering = [run for run in runs if not run.recalls]
    pictures = {}
    for title, key, name in GROUPINGS:
        if panels := grouped_by(key, answering):
            pictures[title] = _draw_grouped(panels, key, output / name)
    if timed := [(run, source) for run in answering for source in run.summary["sources"]]:
        pictures[TIME] = _draw_time(timed, output / "time_quality.png")
    recalled = [(run, source) for run in runs if run.recalls for source in run.summary["sources"]]
    if recalled:
        pictures[RECALL] = _draw_recall(recalled, output / "perplexity_by_length.png")
    return pictures


def grouped_by(key: str, runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Runs and sources whose answers lie in more than one group of ``lengths`` or, where they are conversations, ``turns``."""
    chosen = runs if key == "lengths" else [run for run in runs if run.summary["stage"] == "mqa"]
    places = [(run, source) for run in chosen for source in run.summary["sources"]]
    return [
        (run, source) for run, source in places if any(len(m[key]) > 1 for m in run.summary["sources"][source]["methods"].values())
    ]


def _draw_grouped(panels: Sequence[tuple[Run, str]], key: str, path: Path) -> Path:
    (figure, grid), styles = _grid(len(panels)), _styles(panels)
    for axes, (run, source) in zip(grid, panels, strict=True):
        for method, scores in run.summary["sources"][source]["methods"].items():
            groups = {int(bound): found for bound, found in scores[key].items()}
            bounds = sorted(groups)
            low, high = zip(*(groups[bound]["f1_interval"] for bound in bounds), strict=True)
            axes.fill_between(bounds, low, high, color=_color(method), alpha=0.15, linewidth=0)
            axes.plot(bounds, [groups[b]["f1"] for b in bounds], styles[method], color=_color(method), label=title_of(method))
            if key == "lengths":
                axes.set_xticks(bounds)
        label = "tokens of the context, up to" if key == "lengths" else "turn of the conversation"
        axes.set(xlabel=label, ylabel="F1, percent", title=f"{run.name}: {source}", ylim=(0, 103))
        if key == "turns":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legends(grid)
    return _save(figure, path)


def _draw_recall(panels: Sequence[tuple[Run, str]], path: Path) -> Path:
    (figure, grid), styles = _grid(2 * len(panels)), _styles(panels)
    tasks = [(*panel, task) for panel in panels for task in ("reconstruct", "complete")]
    for axes, (run, source, task) in zip(grid, tasks, strict=True):
        for method, scores in run.summary["sources"][source]["methods"].items():
            groups = {int(bound): found for bound, found in scores[task]["lengths"].items()}
            bounds = sorted(groups)
            low, high = ([groups[b][f"perplexity_{end}"] for b in bounds] for end in ("p10", "p90"))
            if len(bounds) > 1:
                axes.fill_between(bounds, low, high, color=_color(method), alpha=0.15, linewidth=0)
            else:
                axes.vlines(bounds, low, high, color=_color(method), alpha=0.3, linewidth=6)
            line = [groups[b]["perplexity"] for b in bounds]
            axes.plot(bounds, line, styles[method], color=_color(method), label=title_of(method))
            axes.set_xticks(bounds)
        axes.set(xlabel="tokens of the text, up to", ylabel="perplexity (band: p10 to p90)", title=f"{run.name}: {source}, {task}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
    _legends(grid)
    return _save(figure, path)


def _draw_time(panels: Sequence[tuple[Run, str]], path: Path) -> Path:
    """F1 against the time that a context with all its questions takes; the sweep of fine-tuning is one line a count."""
    figure, grid = _grid(len(panels))
    for axes, (run, source) in zip(grid, panels, strict=True):
        sweep: dict[str, list[tuple[float, float]]] = {}
        for method, scores in run.summary["sources"][source]["methods"].items():
            place = (scores["seconds"]["total"] / scores["contexts"], scores["f1"])
            low, high = scores["intervals"]["f1"]
            bars = [[place[1] - low], [high - place[1]]]
            label = None if method.startswith("fine_tuning") else title_of(method)
            axes.errorbar(*place, yerr=bars, fmt="o", color=_color(method), capsize=3, label=label)
            if label is None:
                sweep.setdefault(method.partition("x")[0].partition(":")[2], []).append(place)
        for dash, (count, places) in zip(DASHES * len(sweep), sweep.items(), strict=False):
            axes.plot(*zip(*sorted(places), strict=True), dash, color=TUNED, label=f"fine-tuned on {_learned(count)}, by epochs")
        axes.set(
            xlabel="seconds a context, with all its questions", ylabel="F1, percent", title=f"{run.name}: {source}", ylim=(0, 103)
        )
        axes.set_xscale("log")
        times = [scores["seconds"]["total"] / scores["contexts"] for scores in run.summary["sources"][source]["methods"].values()]
        axes.set_xlim(min(times) / 3, max(times) * 3)
        # Between neighbouring powers of ten there would be one label, or none.
        near = max(times) < 10 * min(times)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _learned(count: str) -> str:
    return "the text alone" if count == "0" else f"the text and {count} conversations"


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = plt.figure(figsize=(5.2 * columns, 3.6 * rows), constrained_layout=True)
    return figure, [figure.add_subplot(rows, columns, n + 1) for n in range(count)]


def _color(method: str) -> str:
    return COLORS.get(method, TUNED)


def _styles(panels: Sequence[tuple[Run, str]]) -> dict[str, str]:
    """A line style for each method of some panels: fine-tuning has several lines of one color, told apart by marks and dashes."""
    found = dict.fromkeys(method for run, source in panels for method in run.summary["sources"][source]["methods"])
    tuned = [method for method in found if method not in COLORS]
    looks = {method: MARKS[n // len(DASHES) % len(MARKS)] + DASHES[n % len(DASHES)] for n, method in enumerate(tuned)}
    return {method: looks.get(method, "o-") for method in found}


def _legends(grid: Sequence[Axes]) -> None:
    """A legend in each panel that has a method which none before it has named."""
    named: set[str] = set()
    for axes in grid:
        labels = set(axes.get_legend_handles_labels()[1])
        if labels - named:
            # Long enough to tell dashes apart.
            axes.legend(frameon=False, fontsize=8, handlelength=3.5)
        named |= labels


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
