"""Splits by context."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from shine.cli.doors import composed
from shine.config import SourceConfig, TrainConfig
from shine.data.sources import read_source


def own_file(folder: Path, contexts: list[str]) -> SourceConfig:
    file = folder / "mine.jsonl"
    turns = [{"question": "q", "answers": ["a"]}]
    file.write_text("".join(json.dumps({"context": context, "turns": turns}) + "\n" for context in contexts))
    return SourceConfig("jsonl", str(file), held_out=0.25)


def contexts_of(source: SourceConfig) -> list[str]:
    return [example.context for example in read_source(source)]


def test_the_two_sides_share_no_context_and_miss_none(tmp_path: Path) -> None:
    contexts = [f"Context {n}." for n in range(40)]
    # Each twice more, once shouted: the same context to any reader.
    source = own_file(tmp_path, contexts + [context.upper() for context in contexts] + contexts)
    held_out = contexts_of(replace(source, part="held_out"))
    kept = contexts_of(replace(source, part="train"))
    assert len(held_out) == 3 * 10
    assert len(kept) == 3 * 30
    assert not {context.lower() for context in held_out} & {context.lower() for context in kept}
    assert sorted(held_out + kept) == sorted(contexts_of(source))


def test_the_split_depends_on_the_contexts_and_the_seed_alone(tmp_path: Path) -> None:
    contexts = [f"Context {n}." for n in range(40)]
    source = replace(own_file(tmp_path, contexts), part="held_out")
    found = set(contexts_of(source))
    shuffled = random.Random(0).sample(contexts, 40)
    (tmp_path / "other").mkdir()
    assert set(contexts_of(replace(own_file(tmp_path / "other", shuffled), part="held_out"))) == found
    assert set(contexts_of(replace(source, split_seed=1))) != found


def test_one_context_cannot_be_split(tmp_path: Path) -> None:
    source = own_file(tmp_path, ["a", "A"])
    with pytest.raises(ValueError, match="at least two different contexts; set part=all"):
        contexts_of(replace(source, part="train"))


@pytest.mark.parametrize(("kind", "options"), [("squad", {"pad_to": 100}), ("wikitext", {"lengths": [10]})])
def test_what_is_joined_or_cut_is_not_split(kind: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="joined or cut cannot be split by context"):
        contexts_of(SourceConfig(kind, "x", part="train", options=options))


def test_the_shipped_split_learns_and_watches_different_contexts_of_one_file(tmp_path: Path) -> None:
    contexts = [f"context {n}" for n in range(100)]
    file = own_file(tmp_path, contexts).path
    # The share and the seed are set once, for both sides.
    words = ["stage=mqa", "data=jsonl_split", f"data.train.mine.path={file}", "data.train.mine.held_out=0.1", "output=out"]
    config = composed(TrainConfig, "train", [*words, "data.train.mine.split_seed=7"])
    learned, watched = (contexts_of(side["mine"]) for side in (config.data.train, config.data.validation))
    assert (len(learned), len(watched)) == (90, 10)
    assert sorted([*learned, *watched]) == sorted(contexts)
    other = composed(TrainConfig, "train", [*words, "data.train.mine.split_seed=8"])
    assert contexts_of(other.data.validation["mine"]) != watched
