"""Write the model card of what ships as ``smollm2-135m``, with its curves, from measured results alone::

    python examples/smollm2/card.py outputs/smollm2-scores

The folder is that of ``examples/smollm2/score.sh``; the curves are those of the runs that ``examples/ship.py`` kept.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
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
from shine.m2p import MEASURED
from shine.training.tuning import TRAINING_FILE
from shine.zoo import ASSETS

PLACE = ASSETS / "smollm2-135m"
Runs = Sequence[tuple[str, Path]]
"""What was kept of each training run, oldest first: its stage, numbered where one comes twice, and its folder."""
COLORS = dict(zip(("pretrain", "mqa", "1qa"), STAGE_COLORS, strict=True))
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
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

    def way_to_tuned(self, source: str, name: str) -> Estimate | None:
        """SHINE's way from Only Question to In-Context, tuned."""
        found = self.answers["sources"][source]["ways"]["shine"]["in_context_tuned"][name]
        return Estimate(**found) if found else None

    def perplexity(self, method: str, task: str, bound: str = "") -> Estimate:
        """Of texts given back, all or those of up to ``bound`` tokens."""
        found = self.texts["sources"]["wikitext"]["methods"][method][task]
        found = found["lengths"][bound] if bound else found
        return Estimate(found["perplexity"], *found["intervals"]["perplexity"])

    def adapters(self) -> dict[str, Mapping[str, float]]:
        """Mean cosine and effective rank of SHINE's adapters, by set."""
        return {name: found["methods"]["shine"]["adapters"] for name, found in self.answers["sources"].items()}


def targets(results: Results) -> list[Target]:
    """What was wanted, against what was measured."""
    ours, only_question = (results.score("squad", method, "f1") for method in ("shine", "only_question"))
    above_untuned = results.ahead("squad", "shine", "in_context", "f1")
    way = results.way_to_tuned("squad", "f1")
    given_back = results.perplexity("shine", "reconstruct")
    worlds, without = (results.score("worlds", method, "em") for method in ("shine", "only_question"))
    cosines = {name: found["cosine"] for name, found in results.adapters().items()}
    return [
        Target(
            "SQuAD: SHINE's F1 above Only Question's, intervals apart",
            f"{ours:.1f} against {only_question:.1f}; paired {results.ahead('squad', 'shine', 'only_question', 'f1'):+.1f}",
            ours.low > only_question.high,
        ),
        Target("SQuAD: SHINE above untuned In-Context, F1", f"{above_untuned:+.1f}", above_untuned.low > 0),
        Target(
            "SQuAD: at least 50 % of the way to In-Context, tuned, F1",
            f"{way:.1f} %" if way else "no way to go",
            bool(way and way.value >= 50),
        ),
        Target("reconstruction of 100 to 300 tokens: perplexity below 4", f"{given_back:.2f}", given_back.value < 4),
        Target(
            "invented worlds: at least 60 % exact, under 5 % without the context",
            f"{worlds:.1f} and {without:.1f}",
            worlds.value >= 60 and without.value < 5,
        ),
        Target(
            "cosine between adapters of different contexts below 0.8",
            ", ".join(f"{value:.3f} ({SET_TITLES[name]})" for name, value in cosines.items()),
            max(cosines.values()) < 0.8,
        ),
    ]


def curves(folder: Path, runs: Runs) -> None:
    """Training and validation loss, gap and cosine over the steps of all runs, one stage after the other."""
    figure, grid = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    for axes, (kind, title, name) in zip(grid.flat, PANELS, strict=True):
        done = 0
        for numbered, run in runs:
            stage = numbered.split()[0]
            for metric in [name] if kind != "validation" else _validation_losses(run):
                steps, values = read_metrics(run, metric)
                _draw(axes, [done + step for step in steps], values, color=COLORS[stage], label=stage, noisy=kind == "loss")
            done += read_metrics(run, "loss")[0][-1]
        axes.set(title=title, xlabel="optimizer step", xlim=(0, None))
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for handle, label in zip(*grid[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside lower center", ncols=len(handles))
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


def card(
    results: Results, info: CheckpointInfo, *, runs: Runs, reader: Mapping[str, Any], parameters: int, size: int
) -> Iterator[str]:
    """The lines of the page."""
    yield from _front()
    yield from _summary(results, info, parameters=parameters, size=size)
    yield from _scores(results)
    yield from _training(runs, reader)
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
        "LoRA (`reader/`) trained to read the context in its prompt, on the mixture of the first mqa: the ceiling. *Way* is "
        "(SHINE − Only Question) / (ceiling − Only Question)."
    )
    for source, title in SET_TITLES.items():
        yield from _answers(results, source, title)
    found = results.texts["sources"]["wikitext"]["methods"]
    bounds = list(found["shine"]["reconstruct"]["lengths"])
    yield from ["", "**WikiText-2 given back**: perplexity a token by length, beginnings of articles, one text each", ""]
    yield "| | " + " | ".join(f"reconstruction, {bound} tokens" for bound in bounds) + " | all | completion, all |"
    yield "|---|" + "---:|" * (len(bounds) + 2)
    for method in found:
        cells = [f"{results.perplexity(method, 'reconstruct', bound):.1f}" for bound in bounds]
        cells += [f"{results.perplexity(method, task):.1f}" for task in ("reconstruct", "complete")]
        yield f"| {title_of(method)} | {' | '.join(cells)} |"
    yield from ["", "**Adapters of different contexts**", "", "| | mean cosine | effective rank |", "|---|---:|---:|"]
    for source, adapters in results.adapters().items():
        yield f"| {SET_TITLES[source]} | {adapters['cosine']:.3f} | {adapters['effective_rank']:.2f} |"


def _answers(results: Results, source: str, title: str) -> Iterator[str]:
    methods = results.answers["sources"][source]["methods"]
    first = next(iter(methods.values()))
    tally = results.answers["sources"][source]["tally"]
    yield from ["", f"**{title}**: {first['questions']:,} questions about {first['contexts']} contexts ({tally})", ""]
    yield from ["| | EM | F1 | not ended |", "|---|---:|---:|---:|"]
    for method, scores in methods.items():
        cells = [f"{results.score(source, method, name):.1f}" for name in ("em", "f1")]
        yield f"| {title_of(method)} | {' | '.join(cells)} | {scores['cut']:,} |"
    ways = [results.way_to_tuned(source, name) for name in ("em", "f1")]
    yield f"| *way, percent* | {' | '.join(f'{way:.1f}' if way else 'none to go' for way in ways)} | |"


def _training(runs: Runs, reader: Mapping[str, Any]) -> Iterator[str]:
    yield from ["", "## Training", "", f"![Losses, gap and cosine over the steps]({CURVES})", ""]
    columns = ["stage", "learned from", "steps x contexts", "tokens, context / conversation", "optimizer, learning rate"]
    yield f"| {' | '.join(columns)} | loss on unseen contexts, about half way and at the end | gap | cosine |"
    yield "|---|---|---:|---:|---|---|---:|---:|"
    for stage, run in runs:
        recipe, steps = read_recipe(run)["stage"], read_metrics(run, "loss")[0][-1]
        sources = ", ".join(_sources(read_recipe(run)["data"]))
        ends = []
        for name in _validation_losses(run):
            at, values = read_metrics(run, name)
            before = min(zip(at, values, strict=True), key=lambda point: (abs(point[0] - steps / 2), -point[0]))
            half_way = f"{before[1]:.2f} at {before[0]}, " if before[0] < at[-1] else ""
            ends.append(f"{half_way}{values[-1]:.2f} ({name.split('/')[1]})")
        gap, cosine = (_last(read_metrics(run, f"validation/adapter_{name}")[1]) for name in ("gap", "cosine"))
        lengths = f"{recipe['context_length']} / {recipe['conversation_length']}"
        rate = f"{OPTIMIZERS[recipe.get('optimizer', 'adamw')]} {recipe['learning_rate']:g}"
        cells = [sources, f"{steps:,} x {recipe['batch_size']}", lengths, rate, "; ".join(ends) or "not watched", gap, cosine]
        yield f"| {stage} | {' | '.join(cells)} |"
    yield ""
    yield from _paragraph(
        "Losses in nats a label token; the gap is how much worse a label is foretold under another context's adapter, zero "
        "if adapters held nothing. The learning rate falls to zero within each stage, so a part of what a stage gains at its end "
        "is that. "
        "Recipes: `training/`, `configs/experiment/smollm2.yaml` and `smollm2_gpu.yaml`; what was tried, and what did not help: "
        "`docs/training_log.md`."
    )
    stage, losses = reader["stage"], reader["losses"]
    yield ""
    yield from _paragraph(
        f"The reader of *In-Context, tuned*: rank {reader['rank']}, {len(losses):,} steps of {stage['batch_size']} contexts of the "
        f"stage {stage['name']} at {stage['learning_rate']:g}; its loss is {_mean(losses[:10]):.2f} over the first ten steps, "
        f"{_mean(losses[len(losses) // 2 : len(losses) // 2 + 10]):.2f} half way, {_mean(losses[-10:]):.2f} over the last ten."
    )
    yield from ["", "| learned from | for | licence |", "|---|---|---|"]
    yield "| OpenStax textbooks, CIA World Factbook, BBC news | pretrain, mqa, 1qa | CC BY 4.0, public domain, research only |"
    yield "| RACE, training part | pretrain, mqa, 1qa | non-commercial research only |"
    yield "| SQuAD v1.1, 28 articles of its public development set | mqa, 1qa | CC BY-SA 4.0 |"
    yield "| invented worlds and stories (`shine/data/worlds.py`, `stories.py`) | mqa, 1qa | Apache-2.0 |"
    yield ""
    yield from _paragraph(
        "Never learned from: WikiText-2, the ten SQuAD articles that `configs/source/squad_unseen.yaml` names, worlds of seed 3000."
    )


def _last(values: Sequence[float]) -> str:
    return f"{values[-1]:.2f}" if values else ""


def _limits(results: Results) -> Iterator[str]:
    yield from ["", "## What it cannot do", ""]
    if missed := sum(not target.reached for target in targets(results)):
        yield f"- It misses {missed} of its targets; the table above says by how much."
    wrong = results.score("squad", "shine", "wrong")
    yield f"- Of its answers about SQuAD's passages {wrong:.0f} % share no word with a right one: hold them against the text."
    for found in results.trust["sets"]:
        about = f"{found['name']}, {found['contexts']} contexts"
        changed, leaked = (Estimate(**found["interference"][name]) for name in ("changed", "leak_on"))
        yield f"- {about}: an adapter changes {changed:.0f} % of the answers about *another* context, and {leaked:.0f} % are wrong"
        yield "  and taken from the context that is on: take it off for other questions."
        if (known := found["knowledge"])["questions"]:
            kept = Estimate(**known["kept_on"])
            yield f"- {about}: of what the model knows by itself {kept:.0f} % is still right with an adapter on."
        if (open_ := found["unanswerable"])["questions"]:
            yield f"- {about}: of questions that the context leaves open it declines {Estimate(**open_['declined_on']):.0f} %."
        first, last = (Estimate(**found["decay"]["on"][span]) for span in ("first_five", "last_five"))
        yield f"- {about}: over 15 turns its EM goes from {first:.0f} in the first five to {last:.0f} in the last five."
    yield "- English, texts of the lengths that it was trained on; longer ones are read in pieces (`docs/adapters.md`)."


def _sources(data: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The sources of a run; equal ones that a number tells apart, ``squad_2``, once and how often."""
    members: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, source in data.items():
        members.setdefault((re.sub(r"_\d+$", "", name), json.dumps(source, sort_keys=True)), []).append(source)
    for (name, _), found in members.items():
        yield _size_of(name, found[0]) + (f" {len(found)} times" if len(found) > 1 else "")


def _size_of(name: str, source: Mapping[str, Any]) -> str:
    """A source by its name, with how many contexts of it there were where that was limited."""
    count = source["options"].get("count", source["limit"])
    return f"{name.replace('_', ' ')} ({count:,})" if count else name.replace("_", " ")


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def write_card(scores: Path, place: Path) -> Path:
    """Write the card, the curves and the figures they come from into the model's folder.

    Args:
        scores: the folder of ``score.sh``.
        place: the folder of the package that holds the model.

    Raises:
        ValueError: the scores are not of the hypernetwork that lies there.
    """
    results, info = Results.read(scores), read_info(place / "hypernetwork")
    assert info is not None
    for summary in (results.answers, results.texts):
        if Path(summary["config"]["checkpoint"]).resolve() != (place / "hypernetwork").resolve():
            raise ValueError(
                f"{scores}: scored {summary['config']['checkpoint']}, not {place / 'hypernetwork'}; run score.sh on that"
            )
    runs, reader = read_runs(place / "training"), json.loads((place / "reader" / TRAINING_FILE).read_text(encoding="utf-8"))
    trained = [tensor for name, tensor in read_weights(place / "hypernetwork").items() if not name.startswith(MEASURED)]
    parameters = sum(tensor.numel() for tensor in trained)
    curves(place, runs)
    size = (place / "hypernetwork" / "hypernetwork.safetensors").stat().st_size
    lines = card(results, info, runs=runs, reader=reader, parameters=parameters, size=size)
    (place / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = {"answers": _without_paths(results.answers), "texts": _without_paths(results.texts), "trust": results.trust}
    (place / SCORES).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return place / CARD


def _without_paths(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary without what it says of the machine that it was made on."""
    config = {name: summary["config"].get(name) for name in ("methods", "max_new_tokens", "seed", "prompts", "stage")}
    return {"config": config, **{name: value for name, value in summary.items() if name != "config"}}


if __name__ == "__main__":
    print(write_card(Path(sys.argv[1]), PLACE))
