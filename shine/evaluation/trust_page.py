"""The trust report as one page: Markdown, a picture, and the same figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from shine.evaluation.plots import COLORS
from shine.evaluation.statistics import Estimate
from shine.evaluation.trust import TURNS

PAGE_FILE, PICTURE_FILE, FIGURES_FILE, ANSWERS_FILE = "trust.md", "trust.png", "trust.json", "answers.jsonl"
COLUMNS = {"on": "adapter on", "off": "off", "in_context": "In-Context"}


def write_page(output: Path, found: Sequence[dict[str, Any]], *, about: str, weights: str) -> Path:
    """Write the page and what belongs to it into ``output``, and return the page.

    Args:
        weights: of the hypernetwork, as `shine.evaluation.run.weights_digest` has them.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ANSWERS_FILE).open("w", encoding="utf-8") as lines:
        for result in found:
            for part, rows in result.pop("rows").items():
                for row in rows:
                    lines.write(json.dumps({"set": result["name"], "part": part, **row}, ensure_ascii=False) + "\n")
    _draw(output / PICTURE_FILE, found)
    (output / PAGE_FILE).write_text("\n".join(_page(found, about)) + "\n", encoding="utf-8")
    figures = json.dumps({"about": about, "weights": weights, "sets": list(found)}, indent=2, ensure_ascii=False)
    (output / FIGURES_FILE).write_text(figures + "\n", encoding="utf-8")
    return output / PAGE_FILE


def _page(found: Sequence[Mapping[str, Any]], about: str) -> Iterator[str]:
    yield from ["# What an adapter does beside answering", "", about, ""]
    yield "Percent with 95 % intervals over contexts. *Off* is the same model, asked in the same words, without an adapter."
    for result in found:
        yield from ["", f"## {result['name']} ({result['contexts']} contexts)", "", "| | adapter on | off | In-Context |"]
        yield "|---|---:|---:|---:|"
        part = result["interference"]
        yield _row("**Unrelated questions** (about another context)", {})
        yield _row("answer changed by the adapter", {"on": part["changed"]})
        yield _row("exactly right", {"on": part["right_on"], "off": part["right_off"]})
        yield _row("wrong, and taken from the context that is on", {"on": part["leak_on"], "off": part["leak_off"]})
        part = result["knowledge"]
        if part["questions"]:
            yield _row(f"**What the model knows by itself** ({part['questions']} questions right without adapter)", {})
            yield _row("still right", {"on": part["kept_on"]})
            yield _row("wrong now, and taken from the context that is on", {"on": part["leak_on"]})
        yield from _belief(result["belief"])
        part = result["unanswerable"]
        yield _row(f"**Questions that the context does not answer** ({part['questions']})", {})
        if part["questions"]:
            yield _row("says that it does not know", {name: part[f"declined_{name}"] for name in COLUMNS})
            yield _row("invents: words of the context that belong elsewhere", {name: part[f"invented_{name}"] for name in COLUMNS})
        yield _row(f"**Over {TURNS} turns**, questions about the context among others, EM", {})
        for name, label in (("first_five", "turns 1 to 5"), ("last_five", f"turns {TURNS - 4} to {TURNS}")):
            yield _row(label, {method: result["decay"][method].get(name) for method in ("on", "in_context")})
        geometry = result["geometry"]
        yield from ["", f"Effective rank of an update: {geometry['effective_rank']:.2f} of {geometry['rank']}."]
        if "cosine" in geometry:
            spread = geometry["cosine"]
            yield f"Cosine between the adapters of two contexts: {spread['mean']:.2f} on average, {spread['p10']:.2f} to"
            yield f"{spread['p90']:.2f} for the middle 80 % of pairs; near 1 means that every context gets the same adapter."
        if unreadable(result):
            yield from [
                "",
                "**This backbone cannot read these contexts**: it answers none of their questions with the context in its",
            ]
            yield "prompt either. What stands above says nothing about adapters; choose contexts in its language."
    yield from ["", f"![The same in pictures]({PICTURE_FILE})", "", f"Every answer: `{ANSWERS_FILE}`."]


def unreadable(result: Mapping[str, Any]) -> bool:
    """Whether the backbone is never right about what it was told, not even in context."""
    return bool(result["belief"]["questions"]) and result["belief"]["told_in_context"]["value"] == 0.0


def _belief(part: Mapping[str, Any]) -> Iterator[str]:
    yield _row(f"**Told what it did not believe** ({part['questions']} questions)", {})
    if part["questions"]:
        for name, label in (
            ("told", "says what the context says"),
            ("believed", "stays with its belief"),
            ("other", "says neither"),
        ):
            yield _row(label, {method: part[f"{name}_{method}"] for method in ("on", "in_context")})


def _row(label: str, values: Mapping[str, Mapping[str, float] | None]) -> str:
    cells = [f"{Estimate(**found):.1f}" if (found := values.get(name)) else "" for name in COLUMNS]
    return f"| {label} | " + " | ".join(cells) + " |"


def _draw(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    figure, grid = plt.subplots(len(found), 3, figsize=(13, 3.7 * len(found)), constrained_layout=True, squeeze=False)
    for (bars, turns, cosines), result in zip(grid, found, strict=True):
        _draw_rates(bars, result)
        _draw_decay(turns, result["decay"])
        if "cosines" in result["geometry"]:
            cosines.hist(result["geometry"]["cosines"], bins=40, range=(-0.2, 1.0), color=COLORS["shine"])
        cosines.set(xlabel="cosine between the adapters of two contexts", ylabel="pairs", title="Do adapters differ?")
        bars.set_title(f"{result['name']}: side effects" + (" (cannot be read)" if unreadable(result) else ""))
        for axes in (bars, turns, cosines):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_rates(axes: Axes, result: Mapping[str, Any]) -> None:
    belief, unknown, other = result["belief"], result["unanswerable"], result["interference"]
    rows = [
        ("unrelated: answer changed", {"on": other["changed"]}),
        ("unrelated: leaks the context", {"on": other["leak_on"], "off": other["leak_off"]}),
        ("known facts: still right", {"on": result["knowledge"].get("kept_on")}),
        ("told otherwise: believes it", {n: belief.get(f"told_{n}") for n in ("on", "in_context")}),
        ("unanswerable: invents", {n: unknown.get(f"invented_{n}") for n in COLUMNS}),
        ("unanswerable: declines", {n: unknown.get(f"declined_{n}") for n in COLUMNS}),
    ]
    colors = {"on": COLORS["shine"], "off": COLORS["only_question"], "in_context": COLORS["in_context"]}
    # What was not asked has no bar.
    rows = [(label, values) for label, values in rows if any(values.values())]
    for place, (_, values) in enumerate(rows):
        for offset, name in enumerate(COLUMNS):
            if estimate := values.get(name):
                value, bounds = estimate["value"], (estimate["low"], estimate["high"])
                error = [[value - bounds[0]], [bounds[1] - value]]
                axes.barh(
                    place + (offset - 1) * 0.26, value, height=0.24, color=colors[name], xerr=error, ecolor="#555555", capsize=2
                )
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 105), xlabel="percent")
    handles = [Patch(color=colors[name]) for name in COLUMNS]
    axes.legend(handles, list(COLUMNS.values()), frameon=False, fontsize=8, loc="lower right")


def _draw_decay(axes: Axes, decay: Mapping[str, Any]) -> None:
    for name, color in (("on", COLORS["shine"]), ("in_context", COLORS["in_context"])):
        turns = decay[name]["turns"]
        places = [int(turn) for turn in turns]
        low, high = ([turn["em"][end] for turn in turns.values()] for end in ("low", "high"))
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(places, [turn["em"]["value"] for turn in turns.values()], "o-", color=color, label=COLUMNS[name])
    axes.set(xlabel="turn of the conversation", ylabel="EM, percent", ylim=(0, 105), title="Does it last?")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
