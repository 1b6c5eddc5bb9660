"""Splits by context, and the search for what was seen in training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sources import shared, table

from shine.cli.main import main
from shine.config import SourceConfig
from shine.data.sources import read_source
from shine.data.splits import LeakCheck

WORDS = [f"w{n}" for n in range(400)]


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


def check(scored: str, *trained: str, threshold: float = 0.5) -> float | None:
    found = LeakCheck(threshold=threshold)
    found.score("scored", scored)
    for number, context in enumerate(trained):
        found.train(str(number), context)
    assert found.trained == len(trained)
    return found.overlaps[0].share if found.overlaps else None


@given(start=st.integers(0, 300), length=st.integers(8, 60), around=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_passage_inside_a_longer_text_is_found_whole(start: int, length: int, around: int, seed: int) -> None:
    passage = WORDS[start : start + length]
    before, after = (random.Random(seed + n).sample(["x", "y", "z"], 3) * around for n in (0, 1))
    assert check(" ".join(passage), " ".join(before + passage + after)) == 1.0
    assert check(", ".join(passage).upper(), " ".join(passage)) == 1.0


def test_a_near_copy_is_found_and_a_distant_one_is_not() -> None:
    passage = WORDS[:100]
    changed = [word if n % 40 else "changed" for n, word in enumerate(passage)]
    # 93 runs of eight words; the words at 0, 40 and 80 spoil 1 + 8 + 8 of them.
    assert check(" ".join(passage), " ".join(changed)) == pytest.approx(76 / 93)
    distant = [word if n % 8 else "changed" for n, word in enumerate(passage)]
    assert check(" ".join(passage), " ".join(distant)) is None
    assert check(" ".join(passage), " ".join(passage[:60])) == pytest.approx(53 / 93)
    assert check(" ".join(passage), " ".join(passage[:60]), threshold=0.6) is None


def test_short_contexts_are_compared_whole() -> None:
    assert check("Apple is green.", "apple, IS green") == 1.0
    assert check("Apple is green.", "Apple is red.") is None
    assert check("", "") is None


def test_the_training_context_that_holds_most_is_named() -> None:
    found = LeakCheck()
    found.score("scored", " ".join(WORDS[:50]))
    for name, count in (("less", 40), ("most", 50), ("least", 30)):
        found.train(name, " ".join(WORDS[:count]))
    assert [(overlap.trained, overlap.share) for overlap in found.overlaps] == [("most", 1.0)]


def test_contexts_of_one_name_are_told_apart() -> None:
    found = LeakCheck()
    for start in (0, 50, 100):
        found.score("same", " ".join(WORDS[start : start + 20 + start]))
    found.train("copy", " ".join(WORDS[0:20]))
    assert [overlap.share for overlap in found.overlaps] == [1.0]
    assert found.scored == 3


def test_a_near_copy_in_a_script_without_spaces_is_found() -> None:
    text = "上下文只读一次然后成为适配器中的知识模型不再需要看到原文就能回答关于它的问题"
    assert check(text, f"前言。{text[:30]}另外一句话。") == pytest.approx(23 / (len(text) - 7))
    assert check(text, "这是完全不同的一段文字它与上面的内容没有任何关系也不应该被认为是相同的") is None


@pytest.mark.parametrize(("kind", "options"), [("squad", {"pad_to": 100}), ("wikitext", {"lengths": [10]})])
def test_what_is_joined_or_cut_is_not_split(kind: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="joined or cut cannot be split by context"):
        contexts_of(SourceConfig(kind, "x", part="train", options=options))


def test_the_command_reports_and_ends_with_one_where_something_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    passage = " ".join(WORDS[:30])
    train = own_file(tmp_path / "train", ["something else", f"before {passage} after"]).path
    test = own_file(tmp_path, [passage, "never seen"]).path
    assert main(["data", "check", "--train", f"jsonl:{train}", "--test", f"jsonl:{test}"]) == 1
    out = capsys.readouterr().out
    assert "100% of" in out
    assert "1 of 2 contexts to be scored stand in 2 training contexts" in out
    assert main(["data", "check", "--train", f"jsonl:{train}", "--test", f"jsonl:{test},skip=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"scored": 1, "trained": 2, "overlaps": []}
    assert main(["data", "check", "--train", f"jsonl:{train}", "--test", f"jsonl:{test}", "--threshold", "2"]) == 2
    assert main(["data", "check", "--train", "jsonl", "--test", f"jsonl:{test}"]) == 2


def test_squads_validation_articles_are_not_in_its_training_part(capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared("squad")
    assert main(["data", "check", "--train", f"squad:{folder}", "--test", f"squad:{folder},split=validation"]) == 0
    passages = {split: len({row["context"] for row in table(folder / "plain_text", split)}) for split in ("train", "validation")}
    wanted = f"0 of {passages['validation']:,} contexts to be scored stand in {passages['train']:,} training contexts\n"
    assert capsys.readouterr().out == wanted
