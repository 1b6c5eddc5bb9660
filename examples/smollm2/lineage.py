"""How what ships was trained: the part of its card that tells of its runs, of what they drew from, and of the reader."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from curves import Runs, measured_again, read_recipe, samples_drawn, steps_not_taken, validation_losses

from shine.evaluation.plots import read_metrics

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
SCORED_SEEDS = (3000, 9000, 7100)
"""Of the worlds that scores are measured on: in ``configs/sets/passages``, ``mqa.yaml`` and ``other.yaml``, and in ``score.sh``."""


def training(runs: Runs, reader: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the part.

    Args:
        reader: what lies beside the reader of how it was trained.
    """
    yield from ["", "## Training", ""]
    yield from _table(runs)
    yield from _drawn(runs)
    yield from _reader(reader)
    yield from ["", "| learned from | for | licence |", "|---|---|---|"]
    yield "| OpenStax textbooks, CIA World Factbook, BBC news | pretrain, mqa, 1qa | CC BY 4.0, public domain, research only |"
    yield "| RACE, training part | pretrain, mqa, 1qa | non-commercial research only |"
    yield "| SQuAD v1.1, 28 articles of its public development set | mqa, 1qa | CC BY-SA 4.0 |"
    yield "| invented worlds and stories (`shine/data/worlds.py`, `stories.py`) | mqa, 1qa | Apache-2.0 |"
    yield ""
    yield from paragraph(
        "Never learned from: WikiText-2, the ten SQuAD articles that `configs/source/squad_unseen.yaml` names, worlds of the seeds "
        f"{', '.join(map(str, SCORED_SEEDS))}."
    )


def _table(runs: Runs) -> Iterator[str]:
    columns = ["stage", "drawn from", "steps x samples", "tokens, context / conversation", "optimizer, learning rate", "on"]
    yield f"| {' | '.join(columns)} | loss on unseen contexts, about half way and at the end | gap | cosine |"
    yield "|---|---|---:|---:|---|---|---|---:|---:|"
    notes = []
    for stage, run in runs:
        recipe, steps = read_recipe(run)["stage"], read_metrics(run, "loss")[0][-1]
        sources = ", ".join(sources_of(read_recipe(run)["data"]))
        ends = []
        for name in validation_losses(run):
            at, values = read_metrics(run, name)
            before = min(zip(at, values, strict=True), key=lambda point: (abs(point[0] - steps / 2), -point[0]))
            half_way = f"{before[1]:.2f} at {before[0]}, " if before[0] < at[-1] else ""
            ends.append(f"{half_way}{values[-1]:.2f} ({name.split('/')[1]})")
        gap, cosine = (_last(read_metrics(run, f"validation/adapter_{name}")[1]) for name in ("gap", "cosine"))
        lengths = f"{recipe['context_length']} / {recipe['conversation_length']}"
        drawn = samples_drawn([(stage, run)])
        rate = f"{OPTIMIZERS[recipe.get('optimizer', 'adamw')]} {recipe['learning_rate']:g}"
        watched = "; ".join(ends) or "not watched"
        if (found := measured_again(run)) is not None:
            watched += " *"
            figures = ", ".join(f"{name} {found[name]:.2f}" for name in ("loss", "gap", "cosine"))
            notes.append(f"\\* {stage}, {found['about']}: {figures}.")
        size = f"{steps:,} x {recipe['batch_size']} = {drawn:,}"
        yield f"| {' | '.join([stage, sources, size, lengths, rate, _device(run), watched, gap, cosine])} |"
    for note in notes:
        yield ""
        yield from paragraph(note)


def _drawn(runs: Runs) -> Iterator[str]:
    """How many samples of what, and how the columns are to be read."""
    skipped, changed = steps_not_taken(runs), [stage for stage, run in runs if _revision(run).endswith("+changes")]
    not_taken = f"; {skipped} steps were drawn and not taken, their loss or gradient being no number" if skipped else ""
    yield ""
    yield from paragraph(
        f"{samples_drawn(runs):,} samples in all, each counted as often as it was drawn: a context with its questions, in 1qa one "
        f"question with its context, which up to four share where a recipe says so{not_taken}. The numbers behind the sources are "
        "how many there were to draw from. Losses in nats a label token; the gap is how much worse a label is foretold under "
        "another context's adapter, zero if adapters held nothing. Each run watched questions of its own, as many as its batches "
        "held, for gap and cosine at most the first sixteen contexts of them, so these columns compare within a row. Of the "
        "texts that a second and later pretraining watched, the stages of questions before it had drawn some passages. The "
        "learning rate falls to zero within each stage, so a part of what a stage gains at its end is that. *transmla* are the "
        "texts of the first row below; *gaps* and *pieces* are passages with questions made of their own sentences, *recitations* "
        "pieces to give back, *stories* and *worlds* invented. The recipes of these runs: `training/`; what is recommended since: "
        "`configs/experiment/smollm2.yaml` and `smollm2_gpu.yaml`; what was tried, and what did not help: `docs/training_log.md`."
    )
    if changed:
        yield ""
        yield from paragraph(
            f"The code of a run is that of the commit that its `recipe.json` names; of {', '.join(changed)} it was that with "
            "changes that had not been committed."
        )


def _reader(reader: Mapping[str, Any]) -> Iterator[str]:
    stage, losses = reader["stage"], reader["losses"]
    yield ""
    yield from paragraph(
        f"The reader of *In-Context, tuned*: rank {reader['rank']}, {len(losses):,} steps of {stage['batch_size']} contexts of the "
        f"stage {stage['name']} at {stage['learning_rate']:g}; its loss is {_mean(losses[:10]):.2f} over the first ten steps, "
        f"{_mean(losses[len(losses) // 2 : len(losses) // 2 + 10]):.2f} half way, {_mean(losses[-10:]):.2f} over the last ten."
    )


def _device(run: Path) -> str:
    """What a run computed on, as its recipe has it."""
    named = read_recipe(run).get("versions", {}).get("device", "")
    return named if "NVIDIA" in named else "CPU"


def _revision(run: Path) -> str:
    return str(read_recipe(run).get("versions", {}).get("revision", ""))


def _last(values: Sequence[float]) -> str:
    return f"{values[-1]:.2f}" if values else ""


def sources_of(data: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
