"""What ``shine data check`` does: which sides it compares, and its report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shine.cli.doors import composed
from shine.cli.sources import parse_source
from shine.config import DataConfig, SourceConfig, TrainConfig
from shine.data.leaks import LeakCheck, learned_contexts, scored_contexts
from shine.parsing import parse

SHOWN = 20
"""Overlaps that are printed."""
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Sides:
    """What is learned and what is scored.

    Attributes:
        learned, scored: sources under the place where they stand.
        questions: contexts without a question that has an answer are neither.
        backbone: whose tokenizer counts where a source joins or cuts contexts to a length.
    """

    learned: Mapping[str, Mapping[str, SourceConfig]]
    scored: Mapping[str, Mapping[str, SourceConfig]]
    questions: bool
    backbone: str


def sides(
    *,
    train: Sequence[str],
    test: Sequence[str],
    run: str | None,
    overrides: Sequence[str],
    backbone: str | None,
    default_backbone: str,
) -> Sides:
    """What to compare: sources named by hand, a run that was started, or the one that ``train.py`` would start with ``overrides``.

    Raises:
        ValueError: none of these, or two ways to name what is learned; or what is named cannot be read.
    """
    if sum((bool(train), run is not None, bool(overrides))) != 1:
        raise ValueError(
            "say once what is learned: --train SOURCE, or --run FOLDER, or what you would give train.py, as in stage=mqa"
        )
    by_hand = {"--test": {text: parse_source(text) for text in test}} if test else {}
    if train:
        if not by_hand:
            raise ValueError("--test: missing; name what is scored")
        return Sides({"--train": {text: parse_source(text) for text in train}}, by_hand, False, backbone or default_backbone)
    if run is not None:
        data, stage, path = _started(Path(run).expanduser())
    else:
        # Where it would write does not matter here.
        config = composed(TrainConfig, "train", ["output=unused", *overrides])
        data, stage, path = config.data, config.stage.name, config.backbone.path
    scored = {name: found for name, found in (("data.validation", data.validation), ("data.test", data.test)) if found}
    if not {**scored, **by_hand}:
        raise ValueError("nothing is scored: neither data.validation nor data.test names a source; add --test SOURCE")
    return Sides({"data.train": data.train}, {**scored, **by_hand}, stage != "pretrain", backbone or path)


def _started(path: Path) -> tuple[DataConfig, str, str]:
    """Data, stage and backbone of a run, from the record in its folder, or in one of its steps."""
    places = [path] if path.is_file() else [path / RUN_FILE, path.parent / RUN_FILE]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"--run {path}: no {RUN_FILE} there: name the output folder of a training run, or one of its checkpoints")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["config"]
        return parse(DataConfig, config["data"]), str(config["stage"]["name"]), str(config["backbone"]["path"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not the record of a run ({error!r}); name the output folder of a training run") from None


def check(compared: Sides, *, threshold: float, as_json: bool) -> int:
    """Search, report, and return the exit code: 1 where something that is scored is learned."""
    count = _counter(compared.backbone)
    options: dict[str, Any] = {"tokens": count, "questions": compared.questions}
    scored = (scored_contexts(sources, place, **options) for place, sources in compared.scored.items())
    found = LeakCheck(itertools.chain.from_iterable(scored), threshold=threshold)
    if not found.scored:
        raise ValueError(f"{', '.join(compared.scored)}: no context to be scored; look at the splits and limits")
    for place, sources in compared.learned.items():
        for name, context in learned_contexts(sources, place, **options):
            found.train(name, context)
    if as_json:
        overlaps = [asdict(overlap) for overlap in found.overlaps]
        print(json.dumps({"scored": found.scored, "trained": found.trained, "overlaps": overlaps}, indent=2, ensure_ascii=False))
    else:
        _report(found)
    return 1 if found.overlaps else 0


def _report(found: LeakCheck) -> None:
    overlaps = found.overlaps
    for overlap in overlaps[:SHOWN]:
        print(f"{overlap.share:4.0%} of {overlap.scored}\n     stands in {overlap.trained}")
    more = f" (the {SHOWN} largest are shown; --json prints all)" if len(overlaps) > SHOWN else ""
    print(f"{len(overlaps):,} of {found.scored:,} contexts to be scored stand in {found.trained:,} training contexts{more}")


def _counter(backbone: str) -> Callable[[str], int]:
    """Tokens of a text; the tokenizer is loaded when the first source asks, which most never do."""

    @cache
    def loaded() -> Callable[[str], int]:
        from shine.chat import token_counter
        from shine.pretrained import load_tokenizer
        from shine.zoo import resolve

        return token_counter(load_tokenizer(resolve(backbone)))

    return lambda text: loaded()(text)
