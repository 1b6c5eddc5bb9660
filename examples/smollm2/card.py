"""Write the model card of what ships as ``smollm2-135m``, with its curves, from measured results alone::

    python examples/smollm2/card.py outputs/smollm2-scores

The folder is that of ``examples/smollm2/score.sh``; the curves are those of the runs that ``examples/ship.py`` kept.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from shine.checkpoint import CheckpointInfo, read_info, read_weights
from shine.evaluation.plots import STAGE_COLORS, read_metrics, smooth
from shine.evaluation.statistics import Estimate
from shine.evaluation.tables import title_of
from shine.zoo import ASSETS

PLACE = ASSETS / "smollm2-135m"
CURVES, CARD, SCORES = "curves.png", "README.md", "scores.json"
SET_TITLES = {"squad": "SQuAD, unseen articles", "worlds": "invented worlds, unseen"}
PANELS = (
    ("loss", "training loss a label token (nats)", "loss"),
    ("validation", "the same, unseen contexts", "/loss"),
    ("gap", "gap: the label under another context's adapter", "validation/adapter_gap"),
    ("cosine", "cosine between adapters of two contexts", "validation/adapter_cosine"),
)


@dataclass(frozen=True)
class Target:
    """What was wanted of a score, and what came."""

    wanted: str
    measured: str
    reached: bool


@dataclass(frozen=True)
class Results:
    """The summaries of ``test.py``, ``test_pretrain.py`` and the figures of ``shine trust``."""

    answers: Mapping[str, Any]
    texts: Mapping[str, Any]
    trust: Mapping[str, Any]

    @staticmethod
    def read(folder: Path) -> Results:
        """From the folder of ``score.sh``."""
        files = ("test/summary.json", "test_pretrain/summary.json", "trust/trust.json")
        return Results(*(json.loads((folder / file).read_text(encoding="utf-8")) for file in files))

    def score(self, source: str, method: str, name: str) -> Estimate:
        """A score in percent."""
        found = self.answers["sources"][source]["methods"][method]
        return Estimate(found[name], *found["intervals"][name])

    def ahead(self, source: str, ours: str, theirs: str, name: str) -> Estimate:
        """How much one method is ahead of another."""
        return Estimate(**self.answers["sources"][source]["differences"][f"{ours} - {theirs}"][name])

    def gone(self, source: str, name: str) -> Estimate | None:
        """SHINE's way from Only Question to In-Context, tuned."""
        found = self.answers["sources"][source]["ways"]["shine"]["in_context_tuned"][name]
        return Estimate(**found) if found else None

    def perplexity(self, method: str, task: str) -> Estimate:
        """Of texts given back."""
        found = self.texts["sources"]["wikitext"]["methods"][method][task]
        return Estimate(found["perplexity"], *found["intervals"]["perplexity"])

    def cosines(self) -> dict[str, float]:
        """Mean cosine between the adapters of two contexts, by set."""
        return {found["name"]: found["geometry"]["cosine"]["mean"] for found in self.trust["sets"]}


def targets(results: Results) -> list[Target]:
    """What was wanted, against what was measured; of an estimate the value counts, of a difference the interval."""
    floor = results.ahead("squad", "shine", "only_question", "f1")
    untuned = results.ahead("squad", "shine", "in_context", "f1")
    way = results.gone("squad", "f1")
    given_back = results.perplexity("shine", "reconstruct")
    worlds, blind = (results.score("worlds", method, "em") for method in ("shine", "only_question"))
    cosines = results.cosines()
    return [
        Target("SQuAD: SHINE above Only Question (F1)", f"{floor:+.1f}", floor.low > 0),
        Target("SQuAD: SHINE above untuned In-Context (F1)", f"{untuned:+.1f}", untuned.low > 0),
        Target(
            "SQuAD: at least 50 % of the way to In-Context, tuned (F1)",
            f"{way:.0f} %" if way else "no way",
            bool(way and way.value >= 50),
        ),
        Target("reconstruction at 100 to 300 tokens: perplexity below 4", f"{given_back:.1f}", given_back.value < 4),
        Target("invented worlds: at least 60 % exact", f"{worlds:.1f} %", worlds.value >= 60),
        Target("invented worlds without the context: under 5 % exact", f"{blind:.1f} %", blind.value < 5),
        Target(
            "cosine between adapters of different contexts below 0.8",
            ", ".join(f"{value:.2f} ({name})" for name, value in cosines.items()),
            max(cosines.values()) < 0.8,
        ),
    ]


def curves(folder: Path, runs: Mapping[str, Path]) -> None:
    """Training and validation loss, gap and cosine over the steps of all runs, one stage after the other."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    for axes, (kind, title, name) in zip(grid.flat, PANELS, strict=True):
        done = 0
        for (stage, run), color in zip(runs.items(), STAGE_COLORS * len(runs), strict=False):
            for metric in [name] if kind != "validation" else _validation_losses(run):
                steps, values = read_metrics(run, metric)
                _draw(axes, [done + step for step in steps], values, color=color, label=stage, noisy=kind == "loss")
            done += read_metrics(run, "loss")[0][-1]
        axes.set(title=title, xlabel="optimizer step", xlim=(0, None))
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for handle, label in zip(*grid[0, 0].get_legend_handles_labels(), strict=True)}
    grid[0, 0].legend(handles.values(), handles.keys(), frameon=False)
    figure.savefig(folder / CURVES, dpi=110)
    plt.close(figure)


def _validation_losses(run: Path) -> list[str]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return sorted({name for row in rows for name in row if name.startswith("validation/") and name.endswith("/loss")})


def _draw(axes: Axes, places: list[int], values: list[float], *, color: str, label: str, noisy: bool) -> None:
    if noisy:
        axes.plot(places, values, color=color, linewidth=1, alpha=0.35)
        values = smooth(values, max(len(values) // 12, 1))
    axes.plot(places, values, "-" if noisy else "o-", color=color, linewidth=2, markersize=4, label=label)


def card(results: Results, info: CheckpointInfo, *, runs: Mapping[str, Path], parameters: int, size: int) -> Iterator[str]:
    """The lines of the page."""
    yield from _front()
    yield from _summary(results, info, parameters=parameters, size=size)
    yield from _scores(results)
    yield from _training(runs)
    yield from _limits(results)


def _front() -> Iterator[str]:
    yield from [
        "---",
        "license: other",
        "license_name: shine-weights-research-only",
        "license_link: LICENSE-WEIGHTS",
        "language: en",
    ]
    yield from ["base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "tags: [shine, hypernetwork, lora]", "---", ""]


def _summary(results: Results, info: CheckpointInfo, *, parameters: int, size: int) -> Iterator[str]:
    shape, wanted = info.hypernetwork, targets(results)
    reached = sum(target.reached for target in wanted)
    yield from ["# SHINE for SmolLM2-135M-Instruct", ""]
    yield from _paragraph(
        f"A hypernetwork ({parameters:,} trained parameters, {size / 1e6:.1f} MB) that reads a text of up to "
        f"{info.context_length} tokens once with the frozen SmolLM2-135M-Instruct and writes a LoRA of rank {shape.rank} for "
        f"{', '.join(shape.targets)} of every layer. **It reaches {reached} of the {len(wanted)} targets that were set for it.**"
    )
    yield from ["", "```python", "from shine import Shine", ""]
    yield 'shine = Shine.from_pretrained("smollm2-135m")  # fetches the backbone the first time'
    yield 'lora = shine.encode("Zoran works as a baker. Umar lives in Selkirk.")'
    yield from ['shine.chat(lora, "What is the job of Zoran?")', "```", ""]
    yield from _paragraph(
        "For research only: it learned from RACE and BBC text, see [LICENSE-WEIGHTS](LICENSE-WEIGHTS). "
        "`sh examples/smollm2/score.sh` measures everything on this page; `sh examples/smollm2/train.sh` goes on training from "
        "here."
    )


def _scores(results: Results) -> Iterator[str]:
    yield from ["", "## Wanted, and reached", "", "| wanted | measured [95 %] | |", "|---|---|---|"]
    for target in targets(results):
        yield f"| {target.wanted} | {target.measured} | {'reached' if target.reached else '**missed**'} |"
    yield from ["", "## Scores", ""]
    yield from _paragraph(
        f"Percent, with 95 % intervals (bootstrap over contexts). Single questions, greedy, at most "
        f"{results.answers['config']['max_new_tokens']} new tokens. *In-Context, tuned* is the same backbone with one ordinary "
        "LoRA (`reader/`) trained on the same questions to read the context in its prompt: the ceiling. *Way* is "
        "(SHINE − Only Question) / (ceiling − Only Question)."
    )
    for source, title in SET_TITLES.items():
        yield from _answers(results, source, title)
    yield from ["", "**WikiText-2 given back**, perplexity of texts of 100 to 300 tokens", ""]
    yield from ["| | reconstruction | completion |", "|---|---:|---:|"]
    for method in results.texts["sources"]["wikitext"]["methods"]:
        given_back = (f"{results.perplexity(method, task):.1f}" for task in ("reconstruct", "complete"))
        yield f"| {title_of(method)} | {' | '.join(given_back)} |"
    yield from ["", "**Adapters of different contexts**", "", "| | mean cosine | effective rank |", "|---|---:|---:|"]
    for found in results.trust["sets"]:
        shape = found["geometry"]
        cells = (f"{shape['cosine']['mean']:.2f}", f"{shape['effective_rank']:.2f} of {shape['rank']}")
        yield f"| {found['name']}, {found['contexts']} contexts | {' | '.join(cells)} |"


def _answers(results: Results, source: str, title: str) -> Iterator[str]:
    methods = results.answers["sources"][source]["methods"]
    first = next(iter(methods.values()))
    yield from ["", f"**{title}**: {first['questions']:,} questions about {first['contexts']} contexts", ""]
    yield from ["| | EM | F1 | not ended |", "|---|---:|---:|---:|"]
    for method, scores in methods.items():
        cells = [f"{results.score(source, method, name):.1f}" for name in ("em", "f1")]
        yield f"| {title_of(method)} | {' | '.join(cells)} | {scores['cut']:,} |"
    ways = [results.gone(source, name) for name in ("em", "f1")]
    yield f"| *way, percent* | {' | '.join(f'{gone:.0f}' if gone else 'none to go' for gone in ways)} | |"


def _training(runs: Mapping[str, Path]) -> Iterator[str]:
    yield from ["", "## Training", "", f"![Losses, gap and cosine over the steps]({CURVES})", ""]
    yield "| stage | steps | training loss | loss on unseen contexts | of that, lost in the last third | gap | cosine |"
    yield "|---|---:|---:|---|---|---:|---:|"
    for stage, run in runs.items():
        steps, losses = read_metrics(run, "loss")
        ends, falls = [], []
        for name in _validation_losses(run):
            values = read_metrics(run, name)[1]
            ends.append(f"{values[-1]:.2f} ({name.split('/')[1]})")
            falls.append(f"{values[-1 - len(values) // 3] - values[-1]:.2f}")
        gap, cosine = (read_metrics(run, f"validation/adapter_{name}")[1][-1] for name in ("gap", "cosine"))
        shown = [f"{steps[-1]:,}", f"{smooth(losses, 2)[-1]:.2f}", ", ".join(ends), ", ".join(falls), f"{gap:.2f}", f"{cosine:.2f}"]
        yield f"| {stage} | {' | '.join(shown)} |"
    yield ""
    yield from _paragraph(
        "Losses in nats a label token; the gap is how much worse a label is foretold under another context's adapter, zero "
        "if adapters held nothing. What was lost in the last third of a stage is what more of it would go on from. Recipe: "
        "`configs/experiment/smollm2.yaml`; what was tried on the way, and what did not help: `docs/training_log.md`."
    )
    yield from ["", "| learned from | for | licence |", "|---|---|---|"]
    yield "| OpenStax textbooks, CIA World Factbook, BBC news | pretrain | CC BY 4.0, public domain, research only |"
    yield "| RACE, training part | mqa, 1qa | non-commercial research only |"
    yield "| SQuAD v1.1, 28 articles of its public development set | mqa, 1qa | CC BY-SA 4.0 |"
    yield "| invented worlds and stories (`shine/data/worlds.py`, `stories.py`) | mqa, 1qa | Apache-2.0 |"
    yield ""
    yield from _paragraph(
        "Never learned from: WikiText-2, the ten SQuAD articles that `configs/sets/passages/mqa.yaml` names, worlds of seed 3000."
    )


def _limits(results: Results) -> Iterator[str]:
    yield from ["", "## What it cannot do", ""]
    missed = [f"{target.wanted} ({target.measured})" for target in targets(results) if not target.reached]
    if missed:
        yield f"- It misses {len(missed)} of its targets: {'; '.join(missed)}."
    wrong = results.score("squad", "shine", "wrong")
    yield f"- Of its answers about SQuAD's passages {wrong:.0f} % share no word with a right one: hold them against the text."
    for found in results.trust["sets"]:
        changed, leaked = (Estimate(**found["interference"][name]) for name in ("changed", "leak_on"))
        yield f"- {found['name']}: an adapter changes {changed:.0f} % of the answers about *another* context, and {leaked:.0f} %"
        yield "  are wrong and taken from the context that is on: take it off for other questions."
    yield "- English only, and texts of the lengths it was trained on; longer ones are read in pieces (`docs/adapters.md`)."
    yield "- A backbone of 135M parameters: it reads little even with the text in its prompt."


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def write_card(scores: Path, place: Path) -> Path:
    """Write the card, the curves and the figures they come from into the model's folder.

    Args:
        scores: the folder of ``score.sh``.
        place: the folder of the package that holds the model.
    """
    results, info = Results.read(scores), read_info(place / "hypernetwork")
    assert info is not None
    runs = {run.name.partition("-")[2]: run for run in sorted((place / "training").iterdir())}
    trained = [tensor for name, tensor in read_weights(place / "hypernetwork").items() if not name.startswith("m2p.standard.")]
    curves(place, runs)
    size = (place / "hypernetwork" / "hypernetwork.safetensors").stat().st_size
    lines = card(results, info, runs=runs, parameters=sum(tensor.numel() for tensor in trained), size=size)
    (place / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    figures = {"answers": results.answers, "texts": results.texts, "trust": results.trust}
    (place / SCORES).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return place / CARD


if __name__ == "__main__":
    print(write_card(Path(sys.argv[1]), PLACE))
