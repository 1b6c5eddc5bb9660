"""What is wrong with a file is said with the file and the line, row or item; or counted where the source allows it."""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shine.config import SourceConfig
from shine.data.examples import Turn
from shine.data.sources import READERS, read_source
from shine.data.sources.json_lists import list_items
from shine.data.tally import Tally

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD: dict[str, dict[str, Any]] = {
    "jsonl": {"context": "c", "turns": [{"question": "q", "answers": ["a"]}]},
    "conversations": {"context": "c", "conversations": TURNS},
    "msmarco-mqa": {"query_id": 1, "context": "c", "conversations": [{"question": "q", "answer": "a"}]},
    "squad": {"id": "1", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
    "race": {"example_id": "1", "article": "c", "question": "q", "options": ["a", "b", "c", "d"], "answer": "A"},
    "hotpotqa": {"id": "1", "question": "q", "answer": "a", "context": {"title": ["t"], "sentences": [["s"]]}},
    "2wiki": {"_id": "1", "question": "q", "answer": "a", "context": [["t", ["s"]]]},
    "musique": {"id": "1", "question": "q", "answer": "a", "answer_aliases": [], "paragraphs": [{"paragraph_text": "p"}]},
    "msmarco": {"query": "q", "query_id": 1, "answers": ["a"], "passages": {"passage_text": ["p"], "is_selected": [1]}},
    "text": {"text": "c"},
    "wikitext": {"text": "c"},
    "quac": {"dialogue_id": "1", "context": "c CANNOTANSWER", "questions": ["q"], "orig_answers": {"texts": ["a"]}},
    "coqa": {"source": "race", "story": "c", "questions": ["q"], "answers": {"input_text": ["a"]}},
    "drop": {"query_id": "1", "passage": "c", "question": "q", "answers_spans": {"spans": ["a"], "types": ["span"]}},
    "narrativeqa": {
        "document": {"id": "1", "summary": {"text": "c"}},
        "question": {"text": "q"},
        "answers": [{"text": "a"}],
    },
    "quail": {"context_id": "1", "context": "c", "question": "q", "answers": ["a", "b"], "correct_answer_id": 0},
    "pwc": {"input": "c", "prompt": "q", "answer": "a"},
    "newsqa": {"context": "c", "question": "q", "answers": ["a"], "key": "1"},
    "duorc": {"plot_id": "1", "plot": "c", "question": "q", "answers": ["a"], "no_answer": False},
}
NO_LETTER: list[tuple[str, dict[str, Any], str]] = [
    ("jsonl", {"context": 3}, "context is 3, not a text"),
    ("jsonl", {"context": " "}, '"context" must be a text that is not empty'),
    ("jsonl", {"turns": [{"question": "q", "answers": [" "]}]}, "answers is .*not a list of texts that are not empty"),
    ("jsonl", {"turns": ["q"]}, 'each turn needs a "question"'),
    ("conversations", {"context": None}, "context is None, not a text"),
    ("conversations", {"context": ...}, '"context" is missing'),
    ("conversations", {"conversations": ...}, '"conversations" is missing'),
    ("conversations", {"conversations": "q"}, "conversations is 'q', not a list"),
    ("conversations", {"conversations": {}}, "conversations is {}, not a list"),
    ("conversations", {"conversations": ["q"]}, 'message 1: "content" is None'),
    ("conversations", {"conversations": [TURNS[0], {"role": "assistant", "content": ""}]}, "message 2: \"content\" is ''"),
    ("conversations", {"conversations": [TURNS[0], {"role": "assistant", "content": 5}]}, 'message 2: "content" is 5'),
    ("conversations", {"conversations": TURNS[::-1]}, "message 1: \"role\" is 'assistant', not 'user'"),
    ("conversations", {"conversations": [TURNS[0], TURNS[0]]}, "message 2: \"role\" is 'user', not 'assistant'"),
    ("conversations", {"conversations": [{"role": "system", "content": "s"}]}, "message 1: \"role\" is 'system', not 'user'"),
    ("msmarco-mqa", {"conversations": [{"question": "q"}]}, "answer is .None., not a list of texts"),
    ("msmarco-mqa", {"conversations": [{"question": "", "answer": "a"}]}, 'each turn needs a "question"'),
    ("msmarco-mqa", {"conversations": [{"question": "q", "answer": " "}]}, "answer is"),
    ("squad", {"answers": ["a"]}, "answers is .'a'., not a table"),
    ("squad", {"answers": {"text": [""]}}, "answers is"),
    ("squad", {"answers": {"text": "a"}}, "answers is 'a'"),
    ("squad", {"question": None}, "question is None, not a text"),
    ("squad", {"id": ...}, '"id" is missing'),
    ("squad", {"question": " "}, "question is ' ', not a text that is not empty"),
    ("hotpotqa", {"question": ""}, "question is ''"),
    ("msmarco", {"query": " "}, "query is ' '"),
    ("race", {"question": " "}, "question is ' '"),
    ("race", {"answer": "E"}, "the answer is 'E', not one of A, B, C, D"),
    ("race", {"options": ["a", ""]}, "options is"),
    ("race", {"options": "abcd"}, "options is 'abcd', not a list"),
    ("hotpotqa", {"context": {"title": ["t"]}}, "context is .*not titles with their sentences"),
    ("hotpotqa", {"context": {"title": ["t"], "sentences": ["s"]}}, "context is"),
    ("hotpotqa", {"answer": ""}, "answer is"),
    ("2wiki", {"context": "[[1"}, "context is not JSON"),
    ("2wiki", {"context": [["t"]]}, "context is .*not titles with their sentences"),
    ("2wiki", {"context": []}, "context is .*not titles with their sentences"),
    ("musique", {"paragraphs": [{"title": "t"}]}, 'needs a "paragraph_text"'),
    ("musique", {"answer_aliases": [1]}, "answer_aliases is"),
    ("msmarco", {"passages": {"passage_text": [None]}}, "passages is"),
    ("msmarco", {"passages": []}, "passages is .*not a table"),
    ("msmarco", {"answers": "a"}, "answers is 'a', not a list"),
    ("text", {"text": 7}, "text is 7, not a text"),
    ("wikitext", {"text": ["a"]}, "text is"),
    ("quac", {"questions": ["q", "r"]}, "2 questions and 1 answers"),
    ("quac", {"orig_answers": {"texts": [""]}}, "orig_answers is"),
    ("coqa", {"story": ...}, '"story" is missing'),
    ("coqa", {"answers": {"input_text": "a"}}, "answers is 'a'"),
    ("drop", {"answers_spans": {"spans": [1]}}, "answers_spans is"),
    ("drop", {"passage": 1}, "passage is 1, not a text"),
    ("narrativeqa", {"document": {"summary": "s"}}, "needs a text in document.summary.text"),
    ("narrativeqa", {"answers": [{"text": " "}]}, "answers is"),
    ("quail", {"correct_answer_id": 2}, "correct_answer_id is 2, there are 2 answers"),
    ("quail", {"answers": ["a", None]}, "answers is"),
    ("pwc", {"answer": " "}, "answer is"),
    ("pwc", {"prompt": ...}, '"prompt" is missing'),
    ("newsqa", {"answers": "a"}, "answers is 'a', not a list"),
    ("newsqa", {"key": 5}, "key is 5, not a text"),
    ("duorc", {"no_answer": "no"}, "no_answer is 'no', not true or false"),
    ("duorc", {"answers": [""]}, "answers is"),
    ("msmarco", {"passages": {"passage_text": ["p"], "is_selected": 5}}, "is_selected is 5, not 0 or 1 for each of 1 passages"),
    ("msmarco", {"passages": {"passage_text": ["p", "r"], "is_selected": [1]}}, "is_selected is .1., not 0 or 1 for each of 2"),
    ("msmarco", {"answers": [7, None, {"a": 1}]}, "answers is .7, None.*not a list of texts"),
    ("hotpotqa", {"context": {"title": ["t", "u"], "sentences": [["s"]]}}, "context has 2 titles, 1 lists of sentences"),
    ("2wiki", {"context": {"title": ["t"], "content": [["s"], ["r"]]}}, "context has 1 titles, 2 lists of sentences"),
    ("2wiki", {"context": "5"}, "context is 5, not titles with their sentences"),
    ("2wiki", {"context": "[" * 5000 + "]" * 5000}, "context is not JSON .*recursion"),
    ("2wiki", {"context": '[["t", ["\\ud800"]]]'}, "context is not JSON .*surrogates not allowed"),
    ("drop", {"answers_spans": {"spans": ["a"], "types": {"k": 1}}}, "types is .*not a list of texts"),
    ("drop", {"answers_spans": {"spans": ["a"], "types": 5}}, "types is 5, not a list of texts"),
    ("musique", {"answerable": "false"}, "answerable is 'false', not true or false"),
    ("musique", {"paragraphs": [{"title": 5.5, "paragraph_text": "p"}]}, "title is 5.5, not a text"),
    ("quail", {"correct_answer_id": True}, "correct_answer_id is True, not a whole number"),
    ("quail", {"correct_answer_id": "1"}, "correct_answer_id is '1', not a whole number"),
    ("msmarco", {"query_id": [1]}, "query_id is .1., not a text or a whole number"),
    ("drop", {"question": "  "}, "question is '  ', not a text that is not empty"),
    ("quail", {"question": " "}, "question is ' ', not a text that is not empty"),
    ("pwc", {"prompt": " "}, "prompt is ' ', not a text that is not empty"),
    ("newsqa", {"question": ""}, "question is '', not a text that is not empty"),
    ("narrativeqa", {"question": {"text": " "}}, "needs a text in document.summary.text and in question.text"),
    ("duorc", {"question": "\n"}, "question is .*not a text that is not empty"),
]


def changed(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    row = {**GOOD[kind], **changes}
    return {name: value for name, value in row.items() if value is not ...}


@pytest.mark.parametrize(("kind", "changes", "message"), NO_LETTER)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    file = tmp_path / "train.jsonl"
    rows = [GOOD[kind], changed(kind, changes), {**GOOD[kind], "context": "d"} if kind == "jsonl" else GOOD[kind]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}:2.*{message}"):
        list(read_source(SourceConfig(kind, str(file))))
    tally = Tally()
    found = list(read_source(SourceConfig(kind, str(file), malformed="skip"), tally=tally))
    assert tally.skipped == {"malformed": 1}
    assert f"{file}:2" in tally.first_skipped["malformed"]
    assert found == list(read_source(SourceConfig(kind, str(without_line_2(file)))))


def replaced(value: Any, new: Any) -> Iterator[Any]:
    """``value`` with each of the values in it, however deep, replaced in turn."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, old in inner:
        for changed in (new, *replaced(old, new)):
            whole = copy.copy(value)
            whole[key] = changed
            yield whole


@pytest.mark.parametrize("new", [5, None, "", [], {}, True, [[5]], {"k": 1}], ids=repr)
@pytest.mark.parametrize("kind", GOOD)
def test_whatever_stands_in_place_of_any_value_the_row_is_refused_with_its_place_or_read_as_what_it_is(
    tmp_path: Path, kind: str, new: Any
) -> None:
    for number, row in enumerate(replaced(GOOD[kind], new)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        tally = Tally()
        found = list(read_source(SourceConfig(kind, str(file), malformed="skip"), tally=tally))
        if tally.skipped:
            assert (found, tally.skipped) == ([], {"malformed": 1})
            with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:1"):
                list(read_source(SourceConfig(kind, str(file))))
        for example in found:
            said = [text for turn in example.turns for text in (turn.question, *turn.answers)]
            assert all(text.strip() for text in said)
            # Nothing that was no text has become one; only a number may be a name.
            names = [example.id] if new != 5 else []
            assert new == "" or not {str(new), repr(new)} & {example.context, *names, *said}


def test_an_item_of_any_depth_is_refused_or_counted(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(b"[" + ROW + b"," + b"[" * 3000 + b"]" * 3000 + b"," + ROW + b"]")
    with pytest.raises(ValueError, match=r"f.json, item 2: .*RecursionError"):
        list(read_source(SourceConfig("conversations", str(file))))
    tally = Tally()
    assert len(list(read_source(SourceConfig("conversations", str(file), malformed="skip"), tally=tally))) == 2
    assert tally.skipped == {"malformed": 1}


TEXTS = [
    rb"q",
    b"caf\xc3\xa9 \xf0\x9f\x98\x80",
    rb"\ud83d\ude00 \\ud800 \" \\\\",
    rb"\u00e9\ud83d\udE00\ud83d\ude00",
    rb"\\\ud83d\ude00",
]
NO_TEXTS = [b"\xe9", b"\xf0\x9f\x98", rb"\ud800", rb"\uDE00\ud83d", rb"\ud83d\ud83d\ude00", rb"\\\ud83dx", rb"\ud83d\n"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 65536])
def test_a_list_gives_the_items_that_lines_would_however_it_is_cut_into_pieces(size: int) -> None:
    """Each text as the standard library reads it; what that refuses, or takes for half a character, is refused here."""
    texts = [text for pair in itertools.zip_longest(TEXTS * 2, NO_TEXTS, fillvalue=b"deadbeef") for text in pair]

    class Pieces(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            return super().read(size)

    found = list(list_items(Pieces(b"[" + b",".join(b'{"%s": ["%s"]}' % (text, text) for text in texts) + b"]")))
    assert len(found) == len(texts)
    for item, text in zip(found, texts, strict=True):
        try:
            said = json.loads(b'"' + text + b'"')
            said.encode("utf-8")
        except ValueError:
            assert isinstance(item, ValueError)
            assert text in NO_TEXTS
        else:
            assert item == {said: [said]}


@pytest.mark.parametrize("bad", [b'"caf\xe9"', rb'"\ud800"'])
def test_items_that_are_no_text_are_counted_and_the_others_read(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(b"[" + b",\n".join([ROW, ROW.replace(b'"q"', bad), ROW, ROW.replace(b'"a"', bad), ROW] * 400) + b"]")
    tally = Tally()
    found = list(read_source(SourceConfig("conversations", str(file), malformed="skip"), tally=tally))
    assert len(found) == 1200
    assert {example.turns for example in found} == {(Turn("q", ("a",)),)}
    assert tally.skipped == {"malformed": 800}
    assert f"{file}, item 2: not" in tally.first_skipped["malformed"]


def without_line_2(file: Path) -> Path:
    lines = file.read_text().splitlines(keepends=True)
    # A name of its own in the same folder, so that ids made of places differ in nothing but the folder's file.
    file.write_text(lines[0] + "\n" + lines[2])
    return file


def lines(*parts: bytes) -> bytes:
    return b"".join(part + b"\n" for part in parts)


ROW = json.dumps(GOOD["conversations"]).encode()
FILES: list[tuple[str, bytes, str]] = [
    ("f.jsonl", lines(ROW, b"{", ROW), r"f.jsonl:2: not JSON \(.* at column \d+\)"),
    ("f.jsonl", lines(ROW, ROW[:-9]), "f.jsonl:2: not JSON"),
    ("f.jsonl", lines(ROW, b"caf\xe9"), r"f.jsonl:2: not UTF-8 \(byte 3 of the line\)"),
    ("f.jsonl", lines(ROW, b"[]"), r"f.jsonl:2: \[\] is not a JSON object"),
    ("f.jsonl", lines(ROW, b"null"), "f.jsonl:2: None is not a JSON object"),
    ("f.jsonl", lines(ROW, b"NaN"), "f.jsonl:2: nan is not a JSON object"),
    ("f.jsonl", lines(ROW, b"[" * 100_000), "f.jsonl:2: not JSON"),
    ("f.jsonl", lines(ROW, ROW.replace(b'"q"', b'"\\ud800"')), "f.jsonl:2: not JSON .*surrogates not allowed"),
    ("f.jsonl", lines(ROW, ROW[:-1] + b', "n": ' + b"1" * 5000 + b"}"), "f.jsonl:2: not JSON .*integer string"),
    (
        "f.json",
        json.dumps(GOOD["conversations"], indent=2).encode(),
        "f.json:1: not JSON .*not a list .* not one object a line",
    ),
    ("f.json", b'{"data": [' + ROW + b"]}", r'f.json:1: "context" is missing \(there are data\)'),
    ("f.json", b'"a text"', "f.json:1: 'a text' is not a JSON object with context"),
    (
        "f.jsonl",
        b"\n\nno JSON\n" + ROW,
        "f.jsonl:3: not JSON .*; as it stands the file is not a list ",
    ),
    ("f.json", b"[" + ROW + b"," + ROW[:-5], "f.json: damaged after item 1"),
    ("f.json", b"[" + ROW + b" " + ROW + b"]", "f.json: damaged after item 1"),
    ("f.json", b"[" + ROW + b',"caf\xe9"]', "f.json, item 2: not UTF-8; save the file as UTF-8"),
    ("f.json", b"[" + ROW + b"," + ROW.replace(b'"q"', b'"\\ud800"') + b"]", "f.json, item 2: not JSON .*surrogates not allowed"),
    ("f.json", b"[" + ROW + b",\xe9]", r"f.json: damaged after item 1 \(lexical error: invalid char in json text\)"),
    ("f.json", b"[" + ROW + b",]", r"f.json: damaged after item 1 \(parse error: [a-zA-Z ]+\)"),
    ("f.json", b"[" + ROW + b",5]", "f.json, item 2: 5 is not a JSON object"),
    ("f.jsonl.gz", gzip.compress(lines(ROW) * 5000, mtime=0)[:-200], "f.jsonl.gz: damaged after line [1-9]"),
    ("f.jsonl.gz", b"no gzip at all", "f.jsonl.gz: damaged after its beginning"),
    ("f.json.gz", gzip.compress(b"[" + ROW + b"]", mtime=0)[:20], "f.json.gz: damaged after its beginning"),
    ("f.json.gz", gzip.compress(b"[" + b",".join([ROW] * 9000) + b"]", mtime=0)[:-100], "f.json.gz: damaged after item [1-9]"),
    ("f.parquet", b"PAR1 not really PAR1", "f.parquet: damaged after row 0"),
    ("f.parquet", b"", "f.parquet: damaged after row 0"),
    ("f.csv", b"context\nx\n", "f.csv: cannot be read; convert it"),
]


def test_only_the_first_line_speaks_of_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(lines(ROW, b"{", ROW))
    with pytest.raises(ValueError, match=r"f.jsonl:2: not JSON .*; mend the line$"):
        list(read_source(SourceConfig("conversations", str(tmp_path / "f.jsonl"))))


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_a_damaged_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_source(SourceConfig("conversations", str(tmp_path / name))))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


DAMAGED: dict[str, Callable[[bytes], tuple[str, bytes, str]]] = {
    "no JSON": lambda row: ("f.jsonl", lines(row, row[:-2]), "f.jsonl:2: not JSON"),
    "not UTF-8": lambda row: ("f.jsonl", lines(row, row[:-1] + b', "x": "caf\xe9"}'), "f.jsonl:2: not UTF-8"),
    "no object": lambda row: ("f.jsonl", lines(row, b"7"), "f.jsonl:2: 7 is not a JSON object"),
    "an empty object": lambda row: ("f.jsonl", lines(row, b"{}"), 'f.jsonl:2: "[a-z_]+" is missing'),
    "a cut gzip": lambda row: ("f.jsonl.gz", cut_gzip(row), "f.jsonl.gz: damaged after line [1-9]"),
    "a cut list": lambda row: ("f.json", b"[" + row + b"," + row[:-3], "f.json: damaged after item 1"),
    "a cut parquet": lambda row: ("f.parquet", parquet_of(row)[:-20], "f.parquet: damaged after row 0"),
}


def cut_gzip(row: bytes) -> bytes:
    # Numbers, so that what is cut off is not everything.
    whole = gzip.compress(lines(*(row[:-1] + b', "n": %d}' % number for number in range(6_000))))
    return whole[: len(whole) // 2]


def parquet_of(row: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([json.loads(row)]), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_names_the_place_of_every_damage(tmp_path: Path, kind: str, damage: str) -> None:
    # A title beside its sentences is no column of a table: there 2wiki is laid out as hotpotqa.
    row = GOOD["hotpotqa" if (kind, damage) == ("2wiki", "a cut parquet") else kind]
    name, content, message = DAMAGED[damage](json.dumps(row).encode())
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/{message}"):
        list(read_source(SourceConfig(kind, str(file))))
    # A line can be left out and counted; a file that ends too soon never is.
    lenient = SourceConfig(kind, str(file), malformed="skip")
    if ":2" not in message:
        with pytest.raises(ValueError, match=message):
            list(read_source(lenient))
    else:
        tally = Tally()
        assert len(list(read_source(lenient, tally=tally))) == 1
        assert tally.skipped == {"malformed": 1}
        assert f"{file}:2" in tally.first_skipped["malformed"]


def test_more_than_forty_bad_inputs_are_fed() -> None:
    assert set(GOOD) == set(READERS) - {"folder", "gaps", "recitations", "worlds", "stories"}
    assert len(NO_LETTER) + len(FILES) + len(GOOD) * len(DAMAGED) > 4 * 40


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfea\0", b"\x80"])
def test_a_file_of_a_folder_that_is_not_utf8_is_named_or_counted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"b.md: not UTF-8 \(byte [03]\)"):
        list(read_source(SourceConfig("folder", str(tmp_path))))
    tally = Tally()
    found = list(read_source(SourceConfig("folder", str(tmp_path), malformed="skip"), tally=tally))
    assert [example.context for example in found] == ["good"]
    assert tally.skipped == {"malformed": 1}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def spoil_the_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = b"\xff" * 400
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("spoil", [cut, spoil_the_middle])
def test_a_truncated_or_spoiled_parquet_file_is_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": [f"{n} {n * 7919 % 104729}" for n in range(5000)]}), file, row_group_size=500)
    spoil(file)
    with pytest.raises(ValueError, match=r"train.parquet: damaged after row \d+ .*download or write it again"):
        list(read_source(SourceConfig("text", str(file))))


def test_bytes_in_a_parquet_text_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": bad}), file)
    with pytest.raises(ValueError, match=r"train.parquet: damaged after row 0 .*utf-8"):
        list(read_source(SourceConfig("text", str(file))))


@pytest.mark.parametrize("kind", ["squad", "race", "hotpotqa", "musique", "msmarco"])
def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "train.parquet"
    question = "query" if kind == "msmarco" else "question"
    pq.write_table(pa.Table.from_pylist([GOOD[kind], {**GOOD[kind], question: None}]), file)
    with pytest.raises(ValueError, match=rf"train.parquet, row 2: {question} is None, not a text"):
        list(read_source(SourceConfig(kind, str(file))))


def test_a_file_that_cannot_be_read_on_is_an_error_also_where_rows_may_be_skipped(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(b"[" + ROW + b"," + ROW[:-5])
    with pytest.raises(ValueError, match="damaged after item 1"):
        list(read_source(SourceConfig("conversations", str(file), malformed="skip")))


def test_every_malformed_row_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_bytes(lines(b"{", ROW, b"\xff", b"5", ROW))
    tally = Tally()
    found = list(read_source(SourceConfig("conversations", str(file), malformed="skip"), tally=tally))
    assert len(found) == 2
    assert tally.skipped == {"malformed": 3}
    assert "f.jsonl:1: not JSON" in tally.first_skipped["malformed"]
