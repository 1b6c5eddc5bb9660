"""Long texts in pieces: whole sentences, in order, nothing lost, never too long."""

from __future__ import annotations

import time

import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from shine.chat import token_ids
from shine.evaluation.cloze import make_clozes
from shine.pieces import pieces, sentences

TOKENIZER = tiny_tokenizer()  # one token a byte
TEXT = 'One is here. Two is there! Is three? A heading\n\nFour (4.5) is "far." Five'


def test_sentences_are_the_text() -> None:
    found = list(sentences(TEXT))
    assert "".join(found) == TEXT
    assert [sentence.strip() for sentence in found] == [
        "One is here.", "Two is there!", "Is three?", "A heading", 'Four (4.5) is "far."', "Five",
    ]  # fmt: skip


def test_pieces_end_with_sentences() -> None:
    # 12, 13, 9, 9, 20 and 4 bytes.
    assert list(pieces(TOKENIZER, TEXT, limit=26, overlap=0)) == [
        "One is here. Two is there!", "Is three? A heading", 'Four (4.5) is "far." Five',
    ]  # fmt: skip


def test_the_end_of_a_piece_is_said_again() -> None:
    assert list(pieces(TOKENIZER, "Aaaa. Bbbb. Cccc. Dddd. Eeee.", limit=18, overlap=6)) == [
        "Aaaa. Bbbb. Cccc.", "Cccc. Dddd. Eeee.",
    ]  # fmt: skip


def test_a_sentence_that_fits_no_piece_is_cut() -> None:
    assert list(pieces(TOKENIZER, "a" * 25 + ". Short.", limit=10, overlap=0)) == ["a" * 10, "a" * 10, "aaaaa.", "Short."]
    assert list(pieces(TOKENIZER, "€" * 7, limit=7, overlap=0)) == ["€€", "€€", "€€", "€"]


def test_a_sentence_is_cut_at_a_line_end_or_else_at_a_space() -> None:
    rows = "zoran the baker of the town of arlow,1\nand another row of the same table\n"
    assert list(pieces(TOKENIZER, rows, limit=60, overlap=0)) == rows.strip().split("\n")
    assert list(pieces(TOKENIZER, "one two three four", limit=12, overlap=0)) == ["one two", "three four"]


def test_chinese_and_japanese_sentences_need_no_space() -> None:
    text = "佐伦是面包师。他住在阿洛！「你好。」她说？一"
    assert list(sentences(text)) == ["佐伦是面包师。", "他住在阿洛！", "「你好。」", "她说？", "一"]
    assert list(pieces(TOKENIZER, text, limit=42, overlap=0)) == ["佐伦是面包师。他住在阿洛！", "「你好。」她说？一"]


@pytest.mark.parametrize(
    "lines",
    [
        ["- Zoran bakes bread", "- Umar", "* cheese"],
        ["1. Zoran bakes", "2. Umar sleeps. ", "12. Runa sings"],
        ["zoran,baker,12", "umar,smith,7"],
        ["2026-11-25 10:00:00 INFO the server has been started on port 8000", "2026-11-25 10:00:01 WARN " + "a" * 60],
        ["# Heading", "Text under it"],
    ],
)
def test_list_items_rows_and_records_are_sentences(lines: list[str]) -> None:
    found = [sentence.strip() for sentence in sentences("\n".join(lines) + "\n")]
    assert found == [line.strip() for line in lines]


def test_prose_with_hard_line_breaks_keeps_its_sentences() -> None:
    text = "Zoran works as a baker in the old town by the river\nSelkirk, where he was born. Umar lives there."
    assert [s.strip() for s in sentences(text)] == [text.partition(" Umar")[0], "Umar lives there."]


def test_a_list_of_forty_lines_can_be_examined() -> None:
    text = "".join(f"- person{n} owns a thing{n}\n" for n in range(40))
    assert len(make_clozes(text)) == 40


@pytest.mark.parametrize(
    ("unit", "times"),
    [("word ", 100_000), ("\n", 200_000), ("a\n", 100_000), ("a\n\n", 70_000), ("!", 200_000), ("a", 200_000), (". ", 100_000)],
)
def test_long_texts_of_anything_are_cut_in_linear_time(unit: str, times: int) -> None:
    started = time.process_time()
    found = list(pieces(TOKENIZER, unit * times + "end", limit=256, overlap=0))
    # A few seconds; what grows with the square takes most of a minute at a fifth of a megabyte, a quarter of an hour at one.
    assert time.process_time() - started < 25
    assert "".join("".join(found).split()) == unit.strip() * times + "end"


@pytest.mark.parametrize(("limit", "overlap"), [(10, 10), (10, -1), (0, 0)])
def test_an_overlap_must_leave_room(limit: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="must be smaller than a piece"):
        list(pieces(TOKENIZER, "Text.", limit=limit, overlap=overlap))


@given(st.text(alphabet="ab .\n!é", max_size=120), st.integers(4, 40), st.integers(0, 3))
def test_nothing_is_lost_and_nothing_is_too_long(text: str, limit: int, overlap: int) -> None:
    found = list(pieces(TOKENIZER, text, limit=limit, overlap=overlap))
    assert all(0 < len(token_ids(TOKENIZER, piece)) <= limit for piece in found)
    # Every word character comes once in the order of the text, where nothing is said again.
    once = list(pieces(TOKENIZER, text, limit=limit, overlap=0))
    assert "".join("".join(once).split()) == "".join(text.split())
    place = 0
    for piece in found:
        core = "".join(piece.split())
        at = "".join(text.split()).find(core, max(place - overlap - 1, 0) if overlap else place)
        assert at >= 0, (piece, place)
        place = at + len(core)
    assert place == len("".join(text.split()))
