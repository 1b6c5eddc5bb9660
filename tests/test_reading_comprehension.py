"""Readers of public reading comprehension sets, on invented files in the schemas of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Features, Sequence, Value

from shine.config import SourceConfig
from shine.data.examples import Example, Turn
from shine.data.sources import read_source

TEXT = Value("string")
SPAN = {"text": Sequence(TEXT), "answer_start": Sequence(Value("int32"))}
DATED = {"count": TEXT, "day": TEXT, "month": TEXT, "year": TEXT}
FEATURES: dict[str, Features] = {
    "quac": Features(
        dialogue_id=TEXT,
        wikipedia_page_title=TEXT,
        background=TEXT,
        section_title=TEXT,
        context=TEXT,
        turn_ids=Sequence(TEXT),
        questions=Sequence(TEXT),
        followups=Sequence(datasets.ClassLabel(names=["y", "n", "m"])),
        yesnos=Sequence(datasets.ClassLabel(names=["y", "n", "x"])),
        answers=Sequence({"texts": Sequence(TEXT), "answer_starts": Sequence(Value("int32"))}),
        orig_answers={"texts": Sequence(TEXT), "answer_starts": Sequence(Value("int32"))},
    ),
    "coqa": Features(
        source=TEXT,
        story=TEXT,
        questions=Sequence(TEXT),
        answers=Sequence({"input_text": TEXT, "answer_start": Value("int32"), "answer_end": Value("int32")}),
    ),
    "drop": Features(
        section_id=TEXT, query_id=TEXT, passage=TEXT, question=TEXT, answers_spans=Sequence({"spans": TEXT, "types": TEXT})
    ),
    "narrativeqa": Features(
        document={
            "id": TEXT,
            "kind": TEXT,
            "url": TEXT,
            "file_size": Value("int32"),
            "word_count": Value("int32"),
            "start": TEXT,
            "end": TEXT,
            "summary": {"text": TEXT, "tokens": Sequence(TEXT), "url": TEXT, "title": TEXT},
            "text": TEXT,
        },
        question={"text": TEXT, "tokens": Sequence(TEXT)},
        answers=[{"text": TEXT, "tokens": Sequence(TEXT)}],
    ),
    "quail": Features(
        id=TEXT,
        context_id=TEXT,
        question_id=TEXT,
        domain=TEXT,
        metadata={"author": TEXT, "title": TEXT, "url": TEXT},
        context=TEXT,
        question=TEXT,
        question_type=TEXT,
        answers=Sequence(TEXT),
        correct_answer_id=Value("int32"),
    ),
    "newsqa": Features(
        context=TEXT,
        question=TEXT,
        answers=Sequence(TEXT),
        key=TEXT,
        labels=[{"end": Sequence(Value("int64")), "start": Sequence(Value("int64"))}],
    ),
    "duorc": Features(
        plot_id=TEXT, plot=TEXT, title=TEXT, question_id=TEXT, question=TEXT, answers=Sequence(TEXT), no_answer=Value("bool")
    ),
    "pwc": Features(input=TEXT, prompt=TEXT, answer=TEXT),
}


def quac(**changes: Any) -> dict[str, Any]:
    row = {
        "dialogue_id": "d1",
        "wikipedia_page_title": "Abro",
        "background": "Abro was a potter.",
        "section_title": "Life",
        "context": "Abro lived in Arlow. CANNOTANSWER",
        "turn_ids": ["d1_q0", "d1_q1"],
        "questions": [" Where did Abro live?", "With whom?"],
        "followups": [0, 1],
        "yesnos": [2, 2],
        "answers": [
            {"texts": ["Arlow", "in Arlow"], "answer_starts": [14, 11]},
            {"texts": ["CANNOTANSWER"], "answer_starts": [21]},
        ],
        "orig_answers": {"texts": ["in Arlow", "CANNOTANSWER"], "answer_starts": [11, 21]},
    }
    return {**row, **changes}


def coqa(**changes: Any) -> dict[str, Any]:
    answers = {"input_text": ["Abro", "blue "], "answer_start": [0, 5], "answer_end": [4, 9]}
    return {"source": "mctest", "story": "Abro wore blue.", "questions": ["Who?", "What color?"], "answers": answers, **changes}


def drop(**changes: Any) -> dict[str, Any]:
    spans = {"spans": ["Arlow", "Dornal", "Arlow"], "types": ["span", "span", "span"]}
    row = {"section_id": "s", "query_id": "q1", "passage": "A war.", "question": "Which towns fell? ", "answers_spans": spans}
    return {**row, **changes}


def narrativeqa(**changes: Any) -> dict[str, Any]:
    summary = {"text": " Abro sails. ", "tokens": ["Abro", "sails"], "url": "u", "title": "t"}
    document = {"id": "n1", "kind": "movie", "url": "u", "file_size": 1, "word_count": 2, "start": "", "end": "", "text": "Long."}
    row = {
        "document": {**document, "summary": summary},
        "question": {"text": "Who sails?", "tokens": ["Who"]},
        "answers": [{"text": "Abro", "tokens": ["Abro"]}, {"text": "Abro does", "tokens": ["Abro"]}],
    }
    return {**row, **changes}


def quail(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "f1_0",
        "context_id": "f1",
        "question_id": "0",
        "domain": "fiction",
        "metadata": {"author": "a", "title": "t", "url": "u"},
        "context": "Abro waits.",
        "question": "Who waits?",
        "question_type": "Factual",
        "answers": ["Ilka", "Abro", "not enough information", "nobody"],
        "correct_answer_id": 1,
    }
    return {**row, **changes}


def newsqa(**changes: Any) -> dict[str, Any]:
    row = {"context": "ARLOW (CNN) -- Rain.", "question": "What fell?", "answers": ["Rain"], "key": "k1"}
    return {**row, "labels": [{"end": [18], "start": [15]}], **changes}


def duorc(**changes: Any) -> dict[str, Any]:
    row = {"plot_id": "/m/1", "plot": "Abro leaves.", "title": "t", "question_id": "x", "question": "Who leaves?"}
    return {**row, "answers": ["Abro", "Abro", "He"], "no_answer": False, **changes}


def pwc(**changes: Any) -> dict[str, Any]:
    return {"input": "A text.", "prompt": "Title it.", "answer": "Text\nit is.", **changes}


ROWS = {row.__name__: row for row in (quac, coqa, drop, narrativeqa, quail, newsqa, duorc, pwc)}


def read(kind: str, folder: Path, *rows: dict[str, Any], **options: Any) -> list[Example]:
    """The rows as the hub lays them out: parquet, and JSON lines for PwC."""
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(list(rows), features=FEATURES[kind])
    if kind == "pwc":
        table.to_json(str(folder / "PwC_train.jsonl"))
    else:
        table.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return list(read_source(SourceConfig(kind=kind, path=str(folder), **options)))


ONE: dict[str, tuple[str, tuple[Turn, ...]]] = {
    "quac": ("Abro lived in Arlow.", (Turn("Where did Abro live?", ("in Arlow",)), Turn("With whom?", ()))),
    "coqa": ("Abro wore blue.", (Turn("Who?", ("Abro",), "mctest"), Turn("What color?", ("blue",), "mctest"))),
    "drop": ("A war.", (Turn("Which towns fell?", ("Arlow, Dornal",), "span"),)),
    "narrativeqa": ("Abro sails.", (Turn("Who sails?", ("Abro", "Abro does")),)),
    "quail": ("Abro waits.", (Turn("Who waits?", ("Abro",), "Factual"),)),
    "newsqa": ("ARLOW (CNN) -- Rain.", (Turn("What fell?", ("Rain",)),)),
    "duorc": ("Abro leaves.", (Turn("Who leaves?", ("Abro", "He")),)),
    "pwc": ("A text.", (Turn("Title it.", ("Text\nit is.",)),)),
}


@pytest.mark.parametrize("kind", ONE)
def test_a_row_becomes_a_context_and_its_turns(kind: str, tmp_path: Path) -> None:
    (example,) = read(kind, tmp_path / kind, ROWS[kind]())
    assert (example.context, example.turns) == ONE[kind]
    assert example.id


OTHER = {
    "drop": ("passage", "query_id"),
    "quail": ("context", "context_id"),
    "newsqa": ("context", "key"),
    "duorc": ("plot", "plot_id"),
    "pwc": ("input", "prompt"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_the_questions_of_a_passage_are_one_conversation(kind: str, tmp_path: Path) -> None:
    context, name = OTHER[kind]
    rows = [ROWS[kind](), ROWS[kind](**{name: "second"}), ROWS[kind](**{context: "Another.", name: "third"}), ROWS[kind]()]
    examples = read(kind, tmp_path / kind, *rows)
    assert [len(example.turns) for example in examples] == [2, 1, 1]
    assert [example.context for example in examples] == [ONE[kind][0], "Another.", ONE[kind][0]]
    assert len({example.id for example in examples}) == 3


def test_what_a_set_says_has_no_answer_comes_without_one(tmp_path: Path) -> None:
    (example,) = read("duorc", tmp_path / "duorc", duorc(), duorc(no_answer=True, answers=[""]), duorc(answers=[]))
    assert [turn.answers for turn in example.turns] == [("Abro", "He"), (), ()]
    (example,) = read("drop", tmp_path / "drop", drop(answers_spans={"spans": [], "types": []}))
    assert example.turns[0].answers == ()
    (example,) = read("quail", tmp_path / "quail", quail(correct_answer_id=2, question_type="Unanswerable"))
    assert example.turns == (Turn("Who waits?", ("not enough information",), "Unanswerable"),)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("quac", {"questions": ["One?"]}, "1 questions and 2 answers"),
    ("quac", {"orig_answers": {"texts": ["", "x"], "answer_starts": [0, 0]}}, "orig_answers"),
    ("quac", {"context": None}, "context is None"),
    ("coqa", {"questions": ["Who?", " "]}, "questions"),
    ("coqa", {"answers": {"input_text": ["x"], "answer_start": [0], "answer_end": [1]}}, "2 questions and 1 answers"),
    ("drop", {"answers_spans": {"spans": [" "], "types": ["span"]}}, "answers_spans"),
    ("drop", {"passage": None}, "passage is None"),
    ("narrativeqa", {"question": {"text": None, "tokens": []}}, "question.text"),
    ("narrativeqa", {"answers": [{"text": "", "tokens": []}]}, "answers"),
    ("quail", {"correct_answer_id": 4}, "correct_answer_id is 4, there are 4 answers"),
    ("quail", {"correct_answer_id": -1}, "correct_answer_id is -1"),
    ("newsqa", {"answers": ["", "x"]}, "answers"),
    ("duorc", {"no_answer": None}, "no_answer is None"),
    ("duorc", {"answers": ["x", ""]}, "answers"),
    ("pwc", {"answer": "  "}, "answer"),
    ("pwc", {"prompt": None}, "prompt is None"),
]


@pytest.mark.parametrize(("kind", "changes", "said"), BAD)
def test_what_is_wrong_with_a_row_is_said_with_its_place(kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    rows = [ROWS[kind](), ROWS[kind](**changes)]
    with pytest.raises(ValueError, match=said) as error:
        read(kind, tmp_path / kind, *rows)
    assert str(tmp_path / kind) in str(error.value)
    assert any(place in str(error.value) for place in ("row 2", ":2"))


def test_missing_columns_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"context": "x"}]).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="question, answers, key"):
        list(read_source(SourceConfig(kind="newsqa", path=str(tmp_path))))
