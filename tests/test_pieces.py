"""Long texts in pieces: whole sentences, in order, nothing lost, never too long."""

from __future__ import annotations

import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from shine.chat import token_ids
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
