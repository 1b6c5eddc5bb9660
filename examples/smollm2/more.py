"""What more training of ``smollm2-135m`` does: from the folder of ``examples/smollm2/more.sh`` to the model card::

    python examples/smollm2/more.py outputs/smollm2-more

What it finds there, each checkpoint's scores and how far they are from those of the shipped file on the same questions, is kept
beside the weights, with its picture; ``card.py`` tells of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from curves import INK, PALE, finish
from lineage import paragraph
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from results import digest_of

from shine.evaluation.plots import STAGE_COLORS, read_metrics
from shine.evaluation.results import PLAN_FILE, PREDICTIONS_FILE
from shine.evaluation.run import weights_digest
from shine.evaluation.scores import totals
from shine.evaluation.statistics import Estimate, difference, interval
from shine.zoo import ASSETS

PLACE = ASSETS / "smollm2-135m"
MORE, PICTURE = "more.json", "more.png"
START = "start"
SCORED = {"squad": ("f1", "SQuAD's F1"), "worlds": ("em", "worlds, exact")}
"""What is asked of each set, and what it is called."""
WATCHED = {"loss": "validation/answers/loss", "gap": "validation/adapter_gap"}
"""What a run watches, as its metrics have it."""
ARMS = {"labels": "the labels", "distilled": "the tuned reader's distribution too"}
"""What a run learned from."""


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run.

    Attributes:
        step: of its run.
        scores: by set, `SCORED`; of the start, how it stands by itself.
        apart: how much higher than the shipped file, on the same questions.
        cosine: between its adapters of SQuAD's passages.
        watched: `WATCHED` as its run saw them, on unseen questions of its own; nothing of the start.
    """

    step: int
    scores: Mapping[str, Estimate]
    apart: Mapping[str, Estimate]
    cosine: float
    watched: Mapping[str, float]


@dataclass(frozen=True)
class More:
    """What ``more.json`` keeps.

    Attributes:
        weights: of the shipped file that the runs began with.
        batch_size, learning_rate: of the runs.
        questions: by set, how many were asked.
        start: the shipped file itself.
        runs: by `ARMS`.
    """

    weights: str
    batch_size: int
    learning_rate: float
    questions: Mapping[str, int]
    start: Point
    runs: Mapping[str, Sequence[Point]]

    @staticmethod
    def read(place: Path) -> More | None:
        """What is kept in the model's folder, where it is of the weights that lie there."""
        if not (place / MORE).exists():
            return None
        kept = json.loads((place / MORE).read_text(encoding="utf-8"))
        runs = {name: [_point(point) for point in points] for name, points in kept["runs"].items()}
        found = More(**{**kept, "start": _point(kept["start"]), "runs": runs})
        return found if found.weights == digest_of(place) else None


def _point(kept: Mapping[str, Any]) -> Point:
    scores, apart = ({name: Estimate(**found) for name, found in kept[which].items()} for which in ("scores", "apart"))
    return Point(kept["step"], scores, apart, kept["cosine"], kept["watched"])


def collect(folder: Path, place: Path) -> More:
    """Read the folder of ``more.sh``.

    Raises:
        ValueError: its runs did not begin with the weights in ``place``.
    """
    scored = folder / "scores"
    plan = json.loads((scored / START / PLAN_FILE).read_text(encoding="utf-8"))
    if plan["weights"] != weights_digest(place / "hypernetwork", []):
        at_fault = f"{scored / START}: scored other weights than {place / 'hypernetwork'}"
        raise ValueError(f"{at_fault}; run more.sh on that, into another folder")
    first = _rows(scored / START)
    runs, stage = dict[str, list[Point]](), dict[str, Any]()
    for arm in ARMS:
        # What is being scored has no summary yet.
        if found := sorted(file.parent for file in scored.glob(f"{arm}-*/summary.json")):
            stage = json.loads((folder / arm / "run.json").read_text(encoding="utf-8"))["config"]["stage"]
            runs[arm] = [_read(each, int(each.name.rpartition("-")[2]), first, folder / arm) for each in found]
    asked = {name: len(rows) for name, rows in first.items()}
    start = _read(scored / START, 0, first, None)
    return More(digest_of(place), stage["batch_size"], stage["learning_rate"], asked, start, runs)


def _rows(scored: Path) -> dict[str, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (scored / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()]
    return {name: [row for row in rows if row["source"] == name] for name in SCORED}


def _read(scored: Path, step: int, first: Mapping[str, Sequence[Mapping[str, Any]]], run: Path | None) -> Point:
    summary = json.loads((scored / "summary.json").read_text(encoding="utf-8"))["sources"]
    rows = _rows(scored)
    ours = {name: totals(rows[name], score) for name, (score, _) in SCORED.items()}
    apart = {name: difference(ours[name], totals(first[name], score)) for name, (score, _) in SCORED.items()}
    cosine = summary["squad"]["methods"]["shine"]["adapters"]["cosine"]
    watched = (
        {} if run is None else {name: dict(zip(*read_metrics(run, metric), strict=True))[step] for name, metric in WATCHED.items()}
    )
    return Point(step, {name: interval(found) for name, found in ours.items()}, apart, cosine, watched)


def told(more: More, *, samples: int) -> Iterator[str]:
    """The lines of the card.

    Args:
        samples: that were drawn for the shipped file.
    """
    drawn = more.batch_size * max(points[-1].step for points in more.runs.values())
    yield ""
    yield from paragraph(
        f"And on from the shipped file: its last stage, {more.batch_size} questions a step at a constant {more.learning_rate:g} "
        f"(`sh examples/smollm2/more.sh`), scored on {more.questions['squad']} questions about passages of the unseen articles and "
        f"{more.questions['worlds']} about unseen worlds, none of which chose a version that shipped. What is against the start is "
        "of the same questions, context by context, and its bars are what the picture shows. Loss and gap are of other questions "
        "than those under *Training*, spread over the first passages of the unseen articles, these among them, and were not "
        f"measured at the start. The longest of these runs draws {drawn:,} samples more, {100 * drawn / samples:.0f} % of those "
        "behind the shipped file."
    )
    yield from ["", f"![Scores of checkpoints of more training]({PICTURE})", ""]
    columns = " | ".join(f"{title} | against the start" for _, title in SCORED.values())
    yield f"| learned from | steps | {columns} | cosine | loss | gap |"
    yield "|---|---:|" + "---:|---:|" * len(SCORED) + "---:|---:|---:|"
    start = " | ".join(f"{more.start.scores[name]:.1f} | " for name in SCORED)
    yield f"| the shipped file | 0 | {start} | {more.start.cosine:.3f} | | |"
    for arm, points in more.runs.items():
        for point in points:
            cells = [f"{point.scores[name]:.1f} | {point.apart[name]:+.1f}" for name in SCORED]
            watched = " | ".join(f"{point.watched[name]:.2f}" for name in WATCHED)
            yield f"| {ARMS[arm]} | {point.step} | {' | '.join(cells)} | {point.cosine:.3f} | {watched} |"
    yield ""
    apart = [point.apart[name] for points in more.runs.values() for point in points for name in SCORED]
    shown = sum(found.low > 0 or found.high < 0 for found in apart)
    yield from paragraph(
        " ".join(_verdict(more, name, title) for name, (_, title) in SCORED.items())
        + f" Intervals without zero: {shown} of {len(apart)}."
    )


def _verdict(more: More, name: str, title: str) -> str:
    """What the last checkpoint of each run shows of a score."""
    ends = []
    for arm, points in more.runs.items():
        apart = points[-1].apart[name]
        shown = "better" if apart.low > 0 else "worse" if apart.high < 0 else "no different beyond chance"
        ends.append(f"{shown} after {points[-1].step} steps from {ARMS[arm]}")
    return f"{title[0].upper()}{title[1:]}: {' and '.join(ends)}."


def picture(file: Path, more: More) -> None:
    """Scores by step, a bar being the interval of the difference from the start on the same questions; and the loss watched."""
    figure, places = plt.subplots(1, len(SCORED) + 1, figsize=(12.5, 3.6), constrained_layout=True)
    for axes, (name, (_, title)) in zip(places, SCORED.items(), strict=False):
        axes.axhline(more.start.scores[name].value, color=PALE, linewidth=1, linestyle="--", zorder=0, label="the shipped file")
        _draw(axes, more, f"{title}, percent", [more.start], partial(_score, name))
        _draw_bars(axes, more, name)
    _draw(places[-1], more, "loss of unseen labels (nats)", [], lambda point: point.watched["loss"])
    places[-1].set_xlim(places[0].get_xlim())
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(handles))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _score(name: str, point: Point) -> float:
    return point.scores[name].value


def _draw(axes: Axes, more: More, title: str, start: Sequence[Point], value: Callable[[Point], float]) -> None:
    for color, (arm, points) in zip(STAGE_COLORS, more.runs.items(), strict=False):
        steps, values = zip(*((point.step, value(point)) for point in (*start, *points)), strict=True)
        axes.plot(steps, values, marker="o", color=color, linewidth=2, markersize=4, label=f"learned from {ARMS[arm]}")
    axes.set_xlabel(f"steps of {more.batch_size} questions", fontsize=8, color=INK)
    finish(axes, title)


def _draw_bars(axes: Axes, more: More, name: str) -> None:
    """How sure each difference from the start is; the runs side by side, so that their bars can be told apart."""
    for number, (color, points) in enumerate(zip(STAGE_COLORS, more.runs.values(), strict=False)):
        places = [point.step + 0.6 * (number - 0.5) for point in points]
        values = [point.scores[name].value for point in points]
        apart = [point.apart[name] for point in points]
        bounds = [[each.value - each.low for each in apart], [each.high - each.value for each in apart]]
        axes.errorbar(places, values, yerr=bounds, fmt="none", color=color, capsize=3, linewidth=1)


def write_more(folder: Path, place: Path) -> Path:
    """Keep what was measured beside the weights, with its picture."""
    found = collect(folder, place)
    picture(place / PICTURE, found)
    (place / MORE).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return place / MORE


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of more.sh")
    print(write_more(parser.parse_args().folder, PLACE))
    print("now: python examples/smollm2/card.py")


if __name__ == "__main__":
    main()
