"""The search for what will be scored in what is learned, and its command."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import train_config
from test_sources import shared, table
from test_splits import own_file

from shine.cli.main import main
from shine.config import DataConfig, SourceConfig
from shine.data.leaks import RUN, SKETCH, LeakCheck, learned_contexts, scored_contexts

WORDS = [f"w{n}" for n in range(400)]
THRESHOLD = 0.4


def check(scored: str, *trained: str, threshold: float = THRESHOLD) -> float | None:
    found = LeakCheck([("scored", scored)], threshold=threshold)
    for number, context in enumerate(trained):
        found.train(str(number), context)
    assert (found.scored, found.trained) == (1, len(trained))
    return found.overlaps[0].share if found.overlaps else None


def every(step: int, text: str, offset: int) -> str:
    return " ".join("changed" if n % step == offset % step else word for n, word in enumerate(text.split()))


def reordered(text: str, seed: int) -> str:
    sentences = re.split(r"(?<=[.!?]) ", text)
    return " ".join(random.Random(seed).sample(sentences, len(sentences)))


CHANGES: dict[str, Callable[[str, int], str]] = {
    "as it is": lambda text, seed: text,
    "every eighth word changed": lambda text, seed: every(8, text, seed),
    "every twelfth word left out": lambda text, seed: " ".join(w for n, w in enumerate(text.split()) if n % 12 != seed % 12),
    "sentences in another order": reordered,
    "among other text": lambda text, seed: (
        f"An unlike beginning of {seed} words. {text} And an end that nobody has written before."
    ),
    "its first half": lambda text, seed: text[: len(text) // 2],
    "its second half": lambda text, seed: text[len(text) // 2 :],
    "shouted": lambda text, seed: text.upper(),
    "without marks": lambda text, seed: re.sub(r"[^\w\s]", " ", text),
    "one word a line": lambda text, seed: "\n\t ".join(text.split()),
    "full-width letters": lambda text, seed: "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in text),
}


def passages(split: str) -> list[str]:
    return sorted({row["context"] for row in table(shared("squad") / "plain_text", split)})


@pytest.mark.parametrize("change", CHANGES)
def test_every_real_passage_is_found_in_a_changed_copy(change: str) -> None:
    """Of sixty words and more: half of a shorter one is hardly a copy."""
    scored = [passage for passage in passages("validation") if len(passage.split()) >= 60]
    found = LeakCheck(((str(number), passage) for number, passage in enumerate(scored)), threshold=THRESHOLD)
    for number, passage in enumerate(scored):
        found.train(str(number), CHANGES[change](passage, number))
    assert len(scored) > 300
    assert len(found.overlaps) == len(scored)
    assert all(overlap.trained == overlap.scored for overlap in found.overlaps)


@pytest.mark.parametrize(("kind", "path", "split"), [("squad", "squad", "train"), ("race", "race/all", "validation")])
def test_unrelated_texts_are_not_found(kind: str, path: str, split: str) -> None:
    trained = SourceConfig(kind, str(shared(path)), split=split)
    found = LeakCheck((("", passage) for passage in passages("validation")), threshold=0.2)
    for name, context in learned_contexts({kind: trained}, "train"):
        found.train(name, context)
    assert found.trained > 1000
    assert found.overlaps == []


@pytest.mark.slow
def test_among_all_of_race_and_the_news_no_unrelated_text_is_found() -> None:
    """Over twelve million pairs; the largest share of any stays far below the threshold."""
    found = LeakCheck((("", passage) for passage in passages("validation")), threshold=0.01)
    sources = {
        "race": SourceConfig("race", str(shared("race/all"))),
        "texts": SourceConfig("text", str(shared("pretrain_text"))),
    }
    for name, context in learned_contexts(sources, "train"):
        found.train(name, context)
    assert found.trained == 25_135 + 5_051
    assert found.overlaps[0].share < 0.15


@pytest.mark.slow
def test_race_leaks_as_the_documentation_says() -> None:
    races = {split: {"race": SourceConfig("race", str(shared("race/all")), split=split)} for split in ("train", "validation")}
    found = LeakCheck(scored_contexts(races["validation"], "test"), threshold=THRESHOLD)
    for name, context in learned_contexts(races["train"], "train"):
        found.train(name, context)
    shares = [overlap.share for overlap in found.overlaps]
    assert (found.scored, len(shares), sum(share > 0.9 for share in shares)) == (1389, 332, 97)


@given(start=st.integers(0, 300), length=st.integers(4, 60), around=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_passage_inside_a_longer_text_is_found_whole(start: int, length: int, around: int, seed: int) -> None:
    passage = WORDS[start : start + length]
    before, after = (random.Random(seed + n).sample(["x", "y", "z"], 3) * around for n in (0, 1))
    assert check(" ".join(passage), " ".join(before + passage + after)) == 1.0
    assert check(", ".join(passage).upper(), " ".join(passage)) == 1.0


@given(step=st.integers(2, 30), length=st.integers(30, 300), offset=st.integers(0, 29))
def test_the_share_is_that_of_the_runs_that_are_left(step: int, length: int, offset: int) -> None:
    changed = every(step, " ".join(WORDS[:length]), offset).split()
    left = sum("changed" not in changed[n : n + RUN] for n in range(length - RUN + 1)) / (length - RUN + 1)
    assert check(" ".join(WORDS[:length]), " ".join(changed)) == (pytest.approx(left) if left >= THRESHOLD else None)


def test_of_a_long_context_a_sample_is_compared() -> None:
    rng = random.Random(0)
    for _ in range(20):
        text = [f"v{rng.randrange(50_000)}" for _ in range(6000)]
        share = check(" ".join(text), " ".join(text[:3600]))
        # Three standard deviations of a sample of 512.
        assert share == pytest.approx(0.6, abs=3 * (0.6 * 0.4 / SKETCH) ** 0.5)


def test_memory_grows_with_what_is_scored_and_not_with_its_length_or_with_training() -> None:
    rng = random.Random(0)
    texts = [" ".join(f"v{rng.randrange(10_000)}" for _ in range(2000)) for _ in range(20)]
    LeakCheck([("", " ".join(f"v{n}" for n in range(10_000)))], threshold=THRESHOLD)
    tracemalloc.start()
    found = LeakCheck((("", text) for text in texts), threshold=THRESHOLD)
    for text in texts * 3:
        found.train("", " ".join(reversed(text.split())))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20 * 11_000


def test_short_contexts_are_compared_whole() -> None:
    assert check("Apple is green.", "apple, IS green") == 1.0
    assert check("Apple is green.", "Apple is red.") is None
    assert check("Apple is green.", "An apple is green.") is None
    assert check("", "") is None


def test_the_training_context_that_holds_most_is_named() -> None:
    found = LeakCheck([("scored", " ".join(WORDS[:50]))], threshold=THRESHOLD)
    for name, count in (("less", 40), ("most", 50), ("least", 30)):
        found.train(name, " ".join(WORDS[:count]))
    assert [(overlap.trained, overlap.share) for overlap in found.overlaps] == [("most", 1.0)]


def test_contexts_of_one_name_are_told_apart() -> None:
    found = LeakCheck((("same", " ".join(WORDS[start : start + 20 + start])) for start in (0, 50, 100)), threshold=THRESHOLD)
    found.train("copy", " ".join(WORDS[0:20]))
    assert [overlap.share for overlap in found.overlaps] == [1.0]
    assert found.scored == 3


def test_a_near_copy_in_a_script_without_spaces_is_found() -> None:
    text = "上下文只读一次然后成为适配器中的知识模型不再需要看到原文就能回答关于它的问题"
    assert check(text, f"前言。{text[:30]}另外一句话。") == pytest.approx((30 - RUN + 1) / (len(text) - RUN + 1))
    assert check(text, "这是完全不同的一段文字它与上面的内容没有任何关系也不应该被认为是相同的") is None


def test_what_is_asked_about_counts_and_not_what_it_was_put_among() -> None:
    source = SourceConfig("squad", str(shared("squad")), split="validation", limit=20, options={"pad_to": 2000})
    alone = [context for _, context in scored_contexts({"squad": source}, "data.test")]
    joined = [context for _, context in learned_contexts({"squad": source}, "data.train")]
    assert len(alone) == len(joined) == 20
    assert all(passage in context and len(context) > 2 * len(passage) for passage, context in zip(alone, joined, strict=True))
    found = LeakCheck([("", alone[3])], threshold=0.9)
    found.train("", joined[3])
    assert len(found.overlaps) == 1


def test_a_context_without_an_answer_is_not_learned_by_questions(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"context": "asked", "turns": [{"question": "q", "answers": ["a"]}]}\n{"context": "not asked"}\n')
    sources = {"mine": SourceConfig("jsonl", str(file))}
    assert [text for _, text in learned_contexts(sources, "t", questions=True)] == ["asked"]
    assert [text for _, text in learned_contexts(sources, "t")] == ["asked", "not asked"]


def run(*arguments: str) -> int:
    return main(["data", "check", *arguments])


def test_the_command_reports_and_ends_with_one_where_something_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    passage = " ".join(WORDS[:30])
    train = own_file(tmp_path / "train", ["something else", f"before {passage} after"]).path
    test = own_file(tmp_path, [passage, "never seen"]).path
    assert run("--train", f"jsonl:{train}", "--test", f"jsonl:{test}") == 1
    out = capsys.readouterr().out
    assert "100% of" in out
    assert "1 of 2 contexts to be scored stand in 2 training contexts" in out
    assert run("--train", f"jsonl:{train}", "--test", f"jsonl:{test},skip=1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"scored": 1, "trained": 2, "overlaps": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say once what is learned"),
        (["--train", "worlds,count=1,seed=0"], "--test: missing"),
        (["--train", "worlds,count=1,seed=0", "stage=mqa"], "say once what is learned"),
        (["--run", "x", "stage=mqa"], "say once what is learned"),
        (["--run", "none"], "--run none: no run.json there"),
        (
            ["--train", "worlds,count=1,seed=0", "--test", "worlds,count=1,seed=0", "--threshold", "2"],
            "threshold 2.0: a share above 0",
        ),
        (["--train", "jsonl", "--test", "worlds,count=1,seed=0"], "--train.jsonl: data source 'jsonl' needs a path"),
        (["stag=mqa"], "stag: unknown key; did you mean stage?"),
        (["stage=mq"], "Available options in 'stage'"),
        (["stage=[1"], "stage=[1: not understood"),
        (["experiment=cpu_world", "stage=mqa", "stage.steps=none"], "stage.steps: should be a valid integer"),
        (["experiment=cpu_world", "~data.validation.worlds", "~data.test.worlds"], "nothing is scored"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_squads_validation_articles_are_not_in_its_training_part(capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared("squad")
    assert run("--train", f"squad:{folder}", "--test", f"squad:{folder},split=validation") == 0
    count = {split: len(passages(split)) for split in ("train", "validation")}
    wanted = f"0 of {count['validation']:,} contexts to be scored stand in {count['train']:,} training contexts\n"
    assert capsys.readouterr().out == wanted


def test_the_command_looks_at_the_run_that_train_would_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage, split, part and options of the configuration count: the same file on both sides, split by context or not."""
    contexts = [" ".join(f"c{n}w{m}" for m in range(12)) for n in range(40)]
    path = own_file(tmp_path, contexts).path
    places = [f"data.{side}.mine.path={path}" for side in ("train", "validation", "test")]
    words = ["experiment=cpu_world", "data=jsonl", "sets=jsonl", "stage=mqa", *places]
    assert run(*words, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["scored"], found["trained"], len(found["overlaps"])) == (80, 40, 80)
    assert {overlap["scored"].split()[0] for overlap in found["overlaps"]} == {"data.validation.mine", "data.test.mine"}
    parts = [f"data.{side}.mine.{key}" for side, part in (("train", "train"), ("validation", "held_out"), ("test", "held_out"))
             for key in (f"part={part}", "held_out=0.25", "split_seed=3")]  # fmt: skip
    assert run(*words, *parts, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"scored": 20, "trained": 30, "overlaps": []}
    # Another seed on one side alone draws other contexts: then something is on both.
    assert run(*words, *parts, "data.test.mine.split_seed=4") == 1
    assert "data.test.mine" in capsys.readouterr().out


def test_the_command_counts_tokens_for_sources_that_join_or_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pieces of the same articles, cut at lengths in tokens of the run's own backbone."""
    articles = "".join(f" = Title {n} = \n" + " ".join(f"a{n}b{m}" for m in range(200)) + "\n" for n in range(5))
    (tmp_path / "train.txt").write_text(articles)
    source = f"kind:wikitext,path:{tmp_path / 'train.txt'},options:{{lengths:[30]}}"
    words = ["experiment=cpu_world", "stage=pretrain", "data=pretrain", "~data.train.transmla", "~data.validation.transmla"]
    words += ["sets=jsonl", "~data.test.mine", f"+data.train.mine={{{source}}}", f"+data.test.few={{{source},limit:7}}"]
    assert run(*words, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["scored"] == len(found["overlaps"]) == 7
    assert found["trained"] > 5 * 10


def test_the_command_looks_at_a_run_that_was_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worlds = [SourceConfig("worlds", options={"count": 30, "seed": seed}) for seed in (5, 6)]
    config = train_config("unused", tmp_path, data=DataConfig(train={"w": worlds[0]}, test={"w": worlds[1], "same": worlds[0]}))
    (tmp_path / "run.json").write_text(json.dumps({"config": asdict(config)}))
    (tmp_path / "final").mkdir()
    for place in (tmp_path, tmp_path / "run.json", tmp_path / "final"):
        assert run("--run", str(place), "--threshold", "0.9", "--json") == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["scored"], found["trained"], len(found["overlaps"])) == (60, 30, 30)
    # What somebody scores beside the run's own.
    assert run("--run", str(tmp_path), "--test", "worlds,count=10,seed=9", "--json") == 1
    assert json.loads(capsys.readouterr().out)["scored"] == 70
    (tmp_path / "run.json").write_text("{}")
    assert run("--run", str(tmp_path)) == 2
    assert "not the record of a run" in capsys.readouterr().err


def test_a_paragraph_of_many_is_looked_for_by_itself(tmp_path: Path) -> None:
    """Ten paragraphs a question, three of them whole in training: too little of the context, all of the paragraphs."""
    rng = random.Random(0)
    paragraphs = [" ".join(f"v{rng.randrange(9999)}" for _ in range(90)) for _ in range(9)] + ["too short to be looked for"]
    context = {"title": [f"T{n}" for n in range(10)], "sentences": [[paragraph] for paragraph in paragraphs]}
    file = tmp_path / "dev.jsonl"
    file.write_text(json.dumps({"id": "h", "question": "q", "answer": "a", "context": context}) + "\n")
    source = {"multihop": SourceConfig("hotpotqa", str(file))}
    found = LeakCheck(scored_contexts(source, "data.test", questions=True), threshold=THRESHOLD)
    assert found.scored == 1 + 9
    for number in (2, 6, 8):
        found.train(str(number), f"Around it. {paragraphs[number]}")
    names = {overlap.scored: overlap.trained for overlap in found.overlaps}
    assert names == {f"data.test.multihop h, paragraph {number + 1}": str(number) for number in (2, 6, 8)}
