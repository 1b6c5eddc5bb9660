"""The readers of files, and real data where it lies beside the project."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer

from shine.config import SourceConfig, StageConfig, TaskTokens
from shine.data.examples import Example, Turn
from shine.data.samples import PretrainSamples
from shine.data.sources import READERS, look_into, read_source
from shine.data.tally import Tally, answerable
from shine.data.worlds import World

TOKENIZER = tiny_tokenizer()
SHARED = Path(os.environ.get("SHINE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def stage(name: str = "pretrain", *, context: int = 100, conversation: int = 200) -> StageConfig:
    return StageConfig(name=name, context_length=context, conversation_length=conversation, learning_rate=1e-3, warmup_steps=0)


def parquet(folder: Path, split: str, **columns: list[Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def squad_folder(folder: Path, **changes: list[Any]) -> str:
    columns = {
        "id": ["q1", "q2", "q3"],
        "title": ["t", "t", "t"],
        "context": ["first", "first", "second"],
        "question": [" Who? ", "Where?", "When?"],
        "answers": [
            {"text": ["Abro", "abro", "Abro"], "answer_start": [0, 0, 0]},
            {"text": ["Arlow"], "answer_start": [3]},
            {"text": ["May"], "answer_start": [1]},
        ],
    }
    return parquet(folder, "validation", **{**columns, **changes})


def read(kind: str, path: str | Path | None, split: str = "validation", **more: Any) -> list[Example]:
    return list(read_source(SourceConfig(kind=kind, path=None if path is None else str(path), split=split, **more)))


def test_squad_gathers_the_questions_of_a_passage(tmp_path: Path) -> None:
    assert read("squad", squad_folder(tmp_path / "squad")) == [
        Example("q1", "first", (Turn("Who?", ("Abro", "abro")), Turn("Where?", ("Arlow",)))),
        Example("q3", "second", (Turn("When?", ("May",)),)),
    ]


def test_articles_are_taken_by_title(tmp_path: Path) -> None:
    folder = squad_folder(tmp_path / "squad", title=["a", "a", "b"])
    assert [e.context for e in read("squad", folder, options={"titles": ["b"]})] == ["second"]
    assert [e.context for e in read("squad", folder, options={"titles": ["b", "a"]})] == ["first", "second"]
    with pytest.raises(ValueError, match=r"squad: has no article c; mend options\.titles"):
        read("squad", folder, options={"titles": ["b", "c"]})
    for odd in ("b", []):
        with pytest.raises(ValueError, match=r"options\.titles=.*: give a list of articles"):
            read("squad", folder, options={"titles": odd})
    nameless = squad_folder(tmp_path / "nameless", title=["a", None, "b"])
    with pytest.raises(ValueError, match="row 2: title is None, not a text"):
        read("squad", nameless, options={"titles": ["b"]})


def test_a_limit_takes_the_first_contexts(tmp_path: Path) -> None:
    folder = squad_folder(tmp_path)
    assert [e.context for e in read("squad", folder, limit=1)] == ["first"]
    assert len(read("squad", folder, limit=100)) == 2


def test_a_question_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    # SQuAD 2.0 has the same columns, and questions that have no answer.
    nothing = {"text": [], "answer_start": []}
    folder = squad_folder(tmp_path, answers=[nothing, {"text": ["Arlow"], "answer_start": [3]}, nothing])
    tally = Tally()
    usable = list(answerable(read("squad", folder), tally))
    assert usable == [Example("q1", "first", (Turn("Where?", ("Arlow",)),))]
    assert str(tally).endswith(", 2 skipped: question without an answer (first q1)")


def test_what_is_wrong_with_a_source_is_said_without_reading_it_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"context": "one"}\nnot json\n')
    good = {"worlds": SourceConfig("worlds", options={"count": 10**9, "seed": 1}), "mine": SourceConfig("jsonl", str(file))}
    look_into(good, "data.train")
    with pytest.raises(ValueError, match=r"data.test.gone: .*none.jsonl"):
        look_into({**good, "gone": SourceConfig("jsonl", str(tmp_path / "none.jsonl"))}, "data.test")


RACE: dict[str, list[Any]] = {
    "example_id": ["high1.txt", "high1.txt", "high2.txt"],
    "article": ["first", "first", "second"],
    "answer": ["B", "D", "A"],
    "question": ["Who is it?", "It is _ .", "The end _ ."],
    "options": [["a", " b ", "c", "d"], ["e", "f", "g", "h"], ["i", "j", "k", "l"]],
}


def test_race_answers_with_the_text_of_the_right_option(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "race", "validation", **RACE)
    examples = read("race", folder)
    assert [(e.context, [(t.question, t.answers) for t in e.turns]) for e in examples] == [
        ("first", [("Who is it?", ("b",)), ("It is _ .", ("h",))]),
        ("second", [("The end _ .", ("i",))]),
    ]
    assert len({e.id for e in examples}) == 2


def test_race_can_leave_out_cloze_questions_and_articles_that_have_no_other(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "race", "validation", **RACE)
    examples = read("race", folder, options={"cloze": False})
    assert [(e.context, [t.question for t in e.turns]) for e in examples] == [("first", ["Who is it?"])]


@pytest.mark.parametrize("letter", ["E", "", "b"])
def test_a_race_answer_that_is_no_option_names_the_folder(tmp_path: Path, letter: str) -> None:
    folder = parquet(tmp_path / "race", "validation", **{**RACE, "answer": ["B", letter, "A"]})
    with pytest.raises(ValueError, match=re.escape(folder)):
        read("race", folder)


def test_text_gives_a_row_each_and_leaves_empty_ones_to_be_counted(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "text", "train", text=[" one \n", "", "  ", None, "two"], source=["a"] * 5)
    assert [(e.context, e.turns) for e in read("text", folder, "train")] == [(text, ()) for text in ("one", "", "", "", "two")]


def test_text_reads_another_column_and_plain_text_files(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "text", "train", body=["x", "y"])
    assert [e.context for e in read("text", folder, "train", options={"column": "body"})] == ["x", "y"]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("one\n\ntwo\n")
    assert [e.context for e in read("text", tmp_path / "lines", "train")] == ["one", "", "two"]


def test_ids_of_a_source_are_unique(tmp_path: Path) -> None:
    examples = read("text", parquet(tmp_path / "text", "train", text=["x", "x", "x"]), "train")
    assert len({e.id for e in examples}) == 3


def test_worlds_are_a_source() -> None:
    options = {"count": 5, "seed": 7, "facts": [2, 3], "people": [1, 2], "kinds": [3, 4]}
    world = World(facts=(2, 3), people=(1, 2), kinds=(3, 4), seed=7)
    assert read("worlds", None, options=options) == list(world.examples(5))
    assert read("worlds", None, options=options, limit=2) == list(world.examples(2))


def test_jsonl_is_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"context": "é one", "turns": [{"question": "q", "answers": ["a", "b"], "kind": "k"}], "id": "mine"},
        {"context": "two", "turns": []},
        {"context": "three"},
    ]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    examples = read("jsonl", file)
    assert examples[0] == Example("mine", "é one", (Turn("q", ("a", "b"), "k"),))
    assert [(e.context, e.turns) for e in examples[1:]] == [("two", ()), ("three", ())]
    assert len({e.id for e in examples}) == 3


@pytest.mark.parametrize(
    ("line", "about"),
    [
        ('{"context": "x"', "JSON"),
        ("context", "JSON"),
        ("[]", "context"),
        ("{}", "context"),
        ('{"context": " "}', "context"),
        ('{"context": 3}', "context"),
        ('{"context": "x", "turns": ["q"]}', "question"),
        ('{"context": "x", "turns": [{"answers": ["a"]}]}', "question"),
        ('{"context": "x", "turns": [{"question": 1, "answers": ["a"]}]}', "question"),
        ('{"context": "x", "turns": [{"question": " ", "answers": ["a"]}]}', "question"),
        ('{"context": "x", "turns": [{"question": "q"}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": "a"}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": []}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": [""]}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": ["a", 2]}]}', "answers"),
        ('{"context": "x", "turns": {"question": "q", "answers": ["a"]}}', "turns?"),
        ('{"context": "x", "turns": null}', "turns?"),
        ('{"context": "x", "turns": 5}', "turns?"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, about: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"context": "fine"}\n\n' + line + '\n{"context": "never reached"}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}:3: .*{about}"):
        read("jsonl", file)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes('{"context": "café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read("jsonl", file)


@pytest.mark.parametrize("kind", ["squad", "race", "text", "jsonl"])
def test_a_missing_folder_or_file_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "absent")) + ": no such"):
        read(kind, tmp_path / "absent")
    with pytest.raises(ValueError, match=f"'{kind}' needs a path"):
        read(kind, None)


@pytest.mark.parametrize(("kind", "column"), [("squad", "context"), ("race", "article"), ("text", "text")])
def test_a_folder_with_other_columns_says_which_are_missing(tmp_path: Path, kind: str, column: str) -> None:
    folder = parquet(tmp_path, "validation", something=["x"], id=["1"])
    with pytest.raises(ValueError, match=rf"{re.escape(folder)}.*: no column .*{column}.*something") as error:
        read(kind, folder)
    assert kind in str(error.value)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}: .*'nosuch'"):
        read("squad", squad_folder(tmp_path), "nosuch")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read("text", tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("squad", {"question": ["Who?", None, "When?"]}, "row 2: question is None, not a text"),
        ("squad", {"context": [None, "a", "b"]}, "row 1: context is None, not a text"),
        ("squad", {"answers": [{"text": ["x"]}, {"text": ["x"]}, None]}, "row 3: answers is None, not a table"),
        ("squad", {"answers": [{"text": ["x"]}, {"text": [None]}, {"text": ["x"]}]}, "answers is .*not a list of texts"),
        ("race", {"question": ["Who?", None, "_ is red."]}, "row 2: question is None, not a text"),
        ("race", {"options": [["a", "b"], ["a"], ["a", "b"]], "answer": ["A", "B", "A"]}, "the answer is 'B', not one of A$"),
        ("race", {"options": [None, ["a"], ["b"]]}, "row 1: options is None, not a list"),
        ("text", {"text": [1, 2, 3]}, "row 1: text is 1, not a text"),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_named(kind: str, changes: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    if kind == "squad":
        good = {"id": ["1", "2", "3"], "context": ["a"] * 3, "question": ["x"] * 3, "answers": [{"text": ["y"]}] * 3}
    else:
        good = {**RACE, "options": [["a", "b", "c", "d"]] * 3, "answer": ["A"] * 3} if kind == "race" else {}
    folder = parquet(tmp_path / kind, "validation", **{**good, **changes})
    with pytest.raises(ValueError, match=message) as error:
        read(kind, folder)
    assert str(folder) in str(error.value)


def test_a_folder_is_no_jsonl_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; name the file in it"):
        read("jsonl", str(tmp_path))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"context": "Ada is red."}\n')
    assert [example.context for example in read("jsonl", str(tmp_path / "mine.jsonl"))] == ["Ada is red."]


def test_an_unknown_kind_gets_the_list_of_kinds() -> None:
    with pytest.raises(ValueError, match="unknown data source 'sqaud'") as error:
        read("sqaud", "x")
    assert all(kind in str(error.value) for kind in READERS)


@pytest.mark.parametrize(
    ("kind", "options"), [("squad", {"cloze": True}), ("race", {"clozed": True}), ("worlds", {"count": 1, "seeds": 2})]
)
def test_an_unknown_option_is_named(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"options.{list(options)[-1]}: a '{kind}' source does not take it"):
        read(kind, tmp_path, options=options)


def test_a_needed_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"options\.seed: missing; a 'worlds' source needs it"):
        read("worlds", tmp_path, options={"count": 3})


def shared(folder: str) -> Path:
    path = SHARED / folder
    if not path.exists():
        pytest.skip(f"no {path}: the development data is not part of the repository")
    return path


def table(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}-00000-of-00001.parquet").to_pylist()


def test_squad_validation_is_read_completely() -> None:
    folder = shared("squad/plain_text")
    examples = read("squad", folder)
    found = Counter((e.context, t.question, t.answers) for e in examples for t in e.turns)
    # The first gold answer first, each only once.
    wanted = Counter(
        (row["context"], row["question"].strip(), tuple(sorted(set(gold), key=gold.index)))
        for row in table(folder, "validation")
        for gold in [row["answers"]["text"]]
    )
    assert found == wanted
    assert sum(found.values()) == 1901
    assert len(examples) == len({e.context for e in examples})
    assert all(answer in e.context for e in examples for t in e.turns for answer in t.answers)


def test_race_validation_is_read_completely() -> None:
    folder = shared("race/all")
    rows = table(folder, "validation")
    examples = read("race", folder)
    found = Counter((e.context, t.question, t.answers) for e in examples for t in e.turns)
    wanted = Counter(
        (row["article"], row["question"].strip(), (row["options"]["ABCD".index(row["answer"])].strip(),)) for row in rows
    )
    assert found == wanted
    assert sum(found.values()) == len(rows) == 4887
    assert len({e.id for e in examples}) == len(examples)
    plain = read("race", folder, options={"cloze": False}, limit=50)
    assert not any("_" in t.question for e in plain for t in e.turns)


def test_pretraining_text_is_read_row_by_row() -> None:
    folder = shared("pretrain_text")
    rows = [row["text"].strip() for row in table(folder, "validation") if row["text"].strip()]
    assert [e.context for e in read("text", folder)] == rows


def test_pretraining_samples_of_real_text_fit_their_budgets() -> None:
    samples = PretrainSamples.build(
        read("text", shared("pretrain_text"), limit=4),
        TOKENIZER,
        stage(context=300, conversation=400),
        task_tokens=TaskTokens(),
        seed=0,
    )
    for index in range(0, len(samples), max(len(samples) // 40, 1)):
        sample = samples.sample(index, epoch=0)
        assert len(sample.context_ids) <= 300
        assert len(sample.input_ids) <= 400
