"""Questions made of a text's own sentences, and the sources that read any text so."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from runs import stage_config

from shine.chat import token_counter, token_ids
from shine.cli.doors import composed
from shine.config import BackboneConfig, SourceConfig, TrainConfig
from shine.data.build import samples_of
from shine.data.examples import Turn
from shine.data.gaps import BLANK, MOST_WORDS, gap_questions
from shine.data.samples import PretrainSamples
from shine.data.sources import read_source

TEXT = (
    "The first railway opened in 1825 near Darlington, and 38 wagons carried coal. In the same decade Anna Maria Falk, "
    "a member of the council, paid $3 million for the northern harbour. On 14 March 1831 the company of Robert Adler lost "
    "40% of its ships in a violent storm! Who could know?"
)
ANSWERS = {
    "date": {"14 March 1831"},
    "year": {"1825"},
    "share": {"40%"},
    "money": {"$3 million"},
    "number": {"38"},
    "name": {"Darlington", "Anna Maria Falk", "Robert Adler"},
}


def asked(text: str, *, most: int = 99, seed: int = 0) -> tuple[Turn, ...]:
    return gap_questions(text, most=most, rng=random.Random(seed))


def test_figures_names_and_phrases_are_asked_for() -> None:
    found: dict[str, set[str]] = {}
    for turn in asked(TEXT):
        found.setdefault(turn.kind, set()).add(turn.answer)
    assert {kind: answers for kind, answers in found.items() if kind != "thing"} == ANSWERS
    assert {"council", "northern harbour", "violent storm"} <= found["thing"]


def test_a_question_is_the_clause_around_its_answer() -> None:
    questions = {
        (turn.kind, turn.answer): {t.question for s in range(40) for t in asked(TEXT, seed=s) if t.answer == turn.answer}
        for turn in asked(TEXT)
    }
    assert questions["year", "1825"] == {
        "The first railway opened in what year near Darlington?",
        "The first railway opened in which year near Darlington?",
        f"The first railway opened in {BLANK} near Darlington",
    }
    assert "And how many wagons carried coal?" in questions["number", "38"]
    assert "The first railway opened in 1825 near where?" in questions["name", "Darlington"]
    # "paid $3 million" alone would ask for little: its clause is longer.
    assert "Paid how much for the northern harbour?" in questions["money", "$3 million"]
    # A year inside a date is not asked for by itself.
    assert ("year", "1831") not in questions


def test_sentences_take_turns_and_no_question_comes_twice() -> None:
    for seed in range(20):
        first = asked(TEXT, most=3, seed=seed)
        assert len(first) == 3
        # One of each sentence: none has two of the three answers.
        places = [
            next(i for i, sentence in enumerate(TEXT.replace("!", ".").split(". ")) if turn.answer in sentence) for turn in first
        ]
        assert len(set(places)) == 3
    every = [turn.question for turn in asked(TEXT)]
    assert len(set(every)) == len(every)
    assert asked(TEXT, seed=5) == asked(TEXT, seed=5)
    assert asked(TEXT, seed=5) != asked(TEXT, seed=6)


def test_what_gives_itself_away_or_says_too_little_is_not_asked() -> None:
    assert asked("Yes, Bergen.") == ()
    assert asked("In Bergen they say that nothing is like Bergen.") == ()
    assert asked("") == ()


@given(st.text(alphabet=st.sampled_from("aB1 .,;$%-'the of in ABC\n“”"), max_size=300), st.integers(0, 9))
def test_any_text_is_asked_about_in_its_own_words(text: str, seed: int) -> None:
    flat = " ".join(text.split())
    for turn in asked(text, seed=seed):
        assert turn.answer in flat
        assert turn.answer.lower() not in turn.question.lower().replace(BLANK, "")
        assert len(turn.question.split()) <= 2 * MOST_WORDS + 5
        assert BLANK in turn.question or turn.question.endswith("?")


# --- sources ---------------------------------------------------------------------------------------------------------------


def texts_file(folder: Path, *texts: str, column: str = "text") -> str:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(file)


def test_passages_are_whole_sentences_within_a_length(tmp_path: Path) -> None:
    tokens = token_counter(tiny_tokenizer())
    limit = max(tokens(sentence) for sentence in TEXT.split(". ")) + 5
    source = SourceConfig("gaps", texts_file(tmp_path, TEXT, TEXT, "No more."), options={"length": limit, "turns": 2, "seed": 4})
    found = list(read_source(source, tokens=tokens))
    assert len(found) >= 2
    assert all(tokens(example.context) <= limit for example in found)
    assert all(1 <= len(example.turns) <= 2 for example in found)
    # The second row is the first one again, as in a set of questions; the third has nothing to ask for.
    assert {example.id.partition("#")[0] for example in found} == {"train-0"}
    assert TEXT.startswith(found[0].context)
    assert found == list(read_source(source, tokens=tokens))
    once = SourceConfig("gaps", source.path, options={"length": limit, "of_each": 1})
    assert [example.id for example in read_source(once, tokens=tokens)] == ["train-0#1"]


def test_a_recitation_asks_for_the_whole_passage(tmp_path: Path) -> None:
    source = SourceConfig(
        "recitations",
        texts_file(tmp_path, "One two.", "Three four.", column="article"),
        options={"ask": "<say>", "column": "article"},
    )
    assert [(example.context, example.turns) for example in read_source(source)] == [
        (text, (Turn("<say>", (text,), "recitation"),)) for text in ("One two.", "Three four.")
    ]
    with pytest.raises(ValueError, match=r"options\.ask: missing; a 'recitations' source needs it"):
        list(read_source(SourceConfig("recitations", source.path)))


@pytest.mark.parametrize("kind", ["gaps", "recitations"])
def test_the_first_texts_are_left_out_whole(tmp_path: Path, kind: str) -> None:
    """Names stay those of the whole file, in which a text that stands twice in a row is one."""
    path, more = texts_file(tmp_path, TEXT, TEXT, f"{TEXT} Once more.", "It was 1912. It was 1913."), {"ask": "<say>"}
    options = {"length": 400, **(more if kind == "recitations" else {})}
    everything = list(read_source(SourceConfig(kind, path, options=options)))
    found = list(read_source(SourceConfig(kind, path, options={**options, "skip_texts": 1})))
    assert found == [example for example in everything if not example.id.startswith("train-0#")]
    assert 0 < len(found) < len(everything)
    with pytest.raises(ValueError, match=r"options\.skip_texts=-1: at least 0"):
        list(read_source(SourceConfig(kind, path, options={**options, "skip_texts": -1})))


@pytest.mark.parametrize("stage", ["mqa", "1qa"])
def test_what_pretraining_is_watched_on_is_not_asked_about(stage: str) -> None:
    """Of the larger recipe, whose stages read the same texts."""
    watched = composed(TrainConfig, "train", ["experiment=smollm2_gpu", "stage=pretrain", "output=x"]).data
    asked = composed(TrainConfig, "train", ["experiment=smollm2_gpu", f"stage={stage}", "output=x"]).data.train
    texts = watched.validation["transmla"]
    assert texts.limit is not None
    assert watched.train["transmla"].skip >= texts.skip + texts.limit
    same = [source for source in asked.values() if source.path == texts.path]
    assert len(same) == 3
    assert all(source.options["skip_texts"] >= texts.skip + texts.limit for source in same)


@pytest.mark.parametrize("options", [{"length": 0}, {"of_each": 0}, {"turns": 0}])
def test_lengths_and_counts_are_at_least_one(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"options\.{next(iter(options))}=0: at least 1"):
        list(read_source(SourceConfig("gaps", texts_file(tmp_path, TEXT), options=options)))


@pytest.mark.parametrize("stage", ["mqa", "1qa"])
def test_both_are_samples_of_the_question_stages(tmp_path: Path, stage: str) -> None:
    path, tasks = texts_file(tmp_path, TEXT), BackboneConfig(path="x").task_tokens
    sources = [
        SourceConfig("gaps", path, options={"turns": 3}),
        SourceConfig("recitations", path, options={"ask": tasks.reconstruct}),
    ]
    examples = [example for source in sources for example in read_source(source)]
    samples = samples_of(
        examples, tiny_tokenizer(), stage_config(stage, context_length=400, conversation_length=600), task_tokens=tasks, seed=0
    )
    assert len(samples) == (2 if stage == "mqa" else 4)
    assert all(samples.sample(index, epoch=0).label_count for index in range(len(samples)))


def test_a_recitation_is_the_reconstruction_of_pretraining(tmp_path: Path) -> None:
    tokenizer, tasks = tiny_tokenizer(), BackboneConfig(path="x").task_tokens
    path = texts_file(tmp_path, "Anwen lives in Arlow.")
    options = {"context_length": 400, "conversation_length": 600}
    recited = samples_of(
        read_source(SourceConfig("recitations", path, options={"ask": tasks.reconstruct})),
        tokenizer,
        stage_config("mqa", **options),
        task_tokens=tasks,
        seed=0,
    )
    trained = PretrainSamples.build(
        read_source(SourceConfig("text", path)),
        tokenizer,
        stage_config("pretrain", **options),
        task_tokens=tasks,
        seed=0,
        tasks=("reconstruct",),
    )
    one, other = recited.sample(0, epoch=0), trained.sample(0, epoch=0)
    assert (one.context_ids, one.input_ids, one.labels) == (other.context_ids, other.input_ids, other.labels)
    assert token_ids(tokenizer, tasks.reconstruct)[0] in one.input_ids
