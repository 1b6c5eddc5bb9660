"""Readers of the recipe's data sets, on small invented files in their true schemas."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from test_sources import parquet, read, shared, squad_folder

from shine.config import SourceConfig
from shine.data.examples import Example, Turn
from shine.data.sources import read_source
from shine.data.tally import Tally, answerable


def json_lines(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


HOTPOT: dict[str, list[Any]] = {
    "id": ["h1"],
    "question": [" Where was the maker of Elba born? "],
    "answer": ["Arlow"],
    "type": ["bridge"],
    "level": ["hard"],
    "supporting_facts": [{"title": ["Elba", "Abro"], "sent_id": [0, 0]}],
    "context": [
        {"title": ["Elba", "Abro"], "sentences": [["Elba is a boat.", " Abro made it."], ["Abro was born in Arlow."]]},
    ],
}
HOTPOT_EXAMPLE = Example(
    "h1",
    "Elba\nElba is a boat. Abro made it.\n\nAbro\nAbro was born in Arlow.",
    (Turn("Where was the maker of Elba born?", ("Arlow",), "bridge"),),
)


def test_hotpotqa_is_read_from_the_hubs_layout(tmp_path: Path) -> None:
    parquet(tmp_path / "hotpotqa" / "distractor", "validation", **HOTPOT)
    assert read("hotpotqa", tmp_path / "hotpotqa" / "distractor") == [HOTPOT_EXAMPLE]


def test_a_folder_of_several_data_sets_says_which_there_are(tmp_path: Path) -> None:
    for name in ("distractor", "fullwiki"):
        parquet(tmp_path / name, "validation", **HOTPOT)
    files = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}/validation-*\n"
        for name in ("distractor", "fullwiki")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    with pytest.raises(ValueError, match=r"its folders are distractor, fullwiki: name the folder"):
        read("hotpotqa", tmp_path)


@pytest.mark.parametrize("layout", ["table", "pairs", "text"])
def test_2wiki_is_read_in_each_of_its_layouts(tmp_path: Path, layout: str) -> None:
    table = HOTPOT["context"][0]
    pairs = [[title, sentences] for title, sentences in zip(table["title"], table["sentences"], strict=True)]
    if layout == "table":
        path: Path | str = parquet(tmp_path, "validation", **HOTPOT)
    elif layout == "pairs":
        row = {"_id": "h1", "question": HOTPOT["question"][0], "answer": "Arlow", "type": "bridge", "context": pairs}
        path = tmp_path / "dev.json"
        path.write_text(json.dumps([row]))
    else:
        path = parquet(
            tmp_path, "dev", _id=["h1"], question=HOTPOT["question"], answer=["Arlow"], type=["bridge"], context=[json.dumps(pairs)]
        )
    assert read("2wiki", path) == [HOTPOT_EXAMPLE]


def wiki_files(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """``dev.json`` and ``id_aliases.json`` as the authors lay them out: a list of rows, and an object a line."""
    row = {"_id": "w1", "type": "compositional", "question": "Where is Abro from?", "context": [["Abro", ["Abro is Arlish."]]]}
    row |= {"answer": "Arlow", "answer_id": "Q1", "supporting_facts": [["Abro", 0]], "evidences": [], "entity_ids": "Q5_Q6"}
    file = folder / "dev.json"
    file.write_text(json.dumps([{name: value for name, value in {**row, **changes}.items() if value != "left out"}]))
    names = [
        {"Q_id": "Q1", "aliases": ["Arlow Town", "Arlow", "阿罗"], "demonyms": ["Arlish", ""]},
        {"Q_id": "Q2", "aliases": ["Borin"], "demonyms": []},
    ]
    return file, json_lines(folder / "id_aliases.json", names)


@pytest.mark.parametrize(
    ("answer_id", "golds"),
    [("Q1", ("Arlow", "Arlow Town", "阿罗", "Arlish")), ("Q3", ("Arlow",)), (None, ("Arlow",))],
    ids=["known", "not in the file", "a comparison, without one"],
)
def test_2wiki_counts_other_names_of_the_answer_where_it_is_given_them(
    answer_id: str | None, golds: tuple[str, ...], tmp_path: Path
) -> None:
    """The answer first, then its aliases and demonyms, each once."""
    file, aliases = wiki_files(tmp_path, answer_id=answer_id)
    (example,) = read("2wiki", file, options={"aliases": str(aliases)})
    assert example.turns == (Turn("Where is Abro from?", golds, "compositional"),)
    (plain,) = read("2wiki", file)
    assert plain.turns[0].answers == ("Arlow",)


def test_aliases_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    file, aliases = wiki_files(tmp_path, answer_id="left out")
    with pytest.raises(ValueError, match=r'item 1: "answer_id" is missing, .* or set options.aliases=null'):
        read("2wiki", file, options={"aliases": str(aliases)})
    with pytest.raises(ValueError, match=r"options.aliases=.*none.json: no such file; name the authors' id_aliases.json"):
        read("2wiki", file, options={"aliases": str(tmp_path / "none.json")})
    file, aliases = wiki_files(tmp_path)
    aliases.write_text('{"Q_id": "Q1", "aliases": ["Arlow"], "demonyms": []}\n{"Q_id": "Q2", "aliases": [2], "demonyms": []}\n')
    with pytest.raises(ValueError, match=r"id_aliases.json:2: aliases and demonyms must be lists of texts; mend the file"):
        read("2wiki", file, options={"aliases": str(aliases)})


def musique_row(**changes: Any) -> dict[str, Any]:
    paragraphs = [
        {"idx": 0, "title": "Elba", "paragraph_text": "Elba is a boat.", "is_supporting": True},
        {"idx": 1, "title": "Abro", "paragraph_text": "Abro made Elba.", "is_supporting": True},
    ]
    row = {"id": "2hop__1", "paragraphs": paragraphs, "question": "Who made the boat?", "question_decomposition": []}
    return {**row, "answer": "Abro", "answer_aliases": ["A. Bro", "Abro"], "answerable": True, **changes}


def test_musique_counts_aliases_and_leaves_unanswerable_questions_without_an_answer(tmp_path: Path) -> None:
    rows = [musique_row(), musique_row(id="2hop__2", answerable=False)]
    json_lines(tmp_path / "musique_full_v1.0_dev.jsonl", rows)
    found = read("musique", tmp_path)
    assert found[0] == Example(
        "2hop__1", "Elba\nElba is a boat.\n\nAbro\nAbro made Elba.", (Turn("Who made the boat?", ("Abro", "A. Bro")),)
    )
    assert [turn.answers for turn in found[1].turns] == [()]


MARCO: dict[str, list[Any]] = {
    "answers": [["Two days.", "2 days"], ["No Answer Present."], []],
    "passages": [
        {"is_selected": [0, 1], "passage_text": ["It is far.", "The way takes two days."], "url": ["u", "v"]},
        {"is_selected": [0], "passage_text": ["Nothing."], "url": ["u"]},
        {"is_selected": [0], "passage_text": ["Nothing."], "url": ["u"]},
    ],
    "query": ["how long is the way", "who", "where"],
    "query_id": [7, 8, 9],
    "query_type": ["NUMERIC", "PERSON", "LOCATION"],
    "wellFormedAnswers": [[], [], []],
}


def test_msmarco_joins_what_the_search_found_and_skips_the_unanswerable(tmp_path: Path) -> None:
    parquet(tmp_path / "v2.1", "validation", **MARCO)
    tally = Tally()
    found = list(answerable(read("msmarco", tmp_path / "v2.1"), tally))
    turn = Turn("how long is the way", ("Two days.", "2 days"), "NUMERIC")
    assert found == [Example("7", "It is far.\n\nThe way takes two days.", (turn,))]
    assert tally.skipped == {"question without an answer": 2}
    selected = read("msmarco", tmp_path / "v2.1", limit=1, options={"passages": "selected"})
    assert [example.context for example in selected] == ["The way takes two days."]
    with pytest.raises(ValueError, match=r"options.passages=some: choose all or selected"):
        read("msmarco", tmp_path / "v2.1", options={"passages": "some"})


def test_msmarco_mqa_is_read_from_all_files_of_its_split(tmp_path: Path) -> None:
    row = {"query_id": 3, "context": "Abro lives.", "conversations": [{"question": "Who?", "answer": "Abro"}] * 2}
    json_lines(tmp_path / "train.jsonl", [row])
    json_lines(tmp_path / "train_v2.jsonl", [{**row, "query_id": 4}])
    json_lines(tmp_path / "validation.jsonl", [{**row, "query_id": 5}])
    found = read("msmarco-mqa", tmp_path, "train")
    assert [example.id for example in found] == ["3", "4"]
    assert found[0] == Example("3", "Abro lives.", (Turn("Who?", ("Abro",)),) * 2)


COLLECTION = [
    {
        "context": "Abro lives in Arlow.",
        "conversations": [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Abro"},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "Arlow"},
            {"role": "user", "content": "Why?"},
        ],
        "contextlen": 6,
        "conversationlen": 30.5,
    },
    {"context": "Ünü", "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
]


@pytest.mark.parametrize("layout", ["list", "indented", "lines", "gzip"])
def test_the_published_collections_are_read_as_they_are(tmp_path: Path, layout: str) -> None:
    file = tmp_path / ("ift_pwc.json.gz" if layout == "gzip" else "ift_pwc.json")
    if layout == "lines":
        json_lines(file, COLLECTION)
    else:
        text = json.dumps(COLLECTION, ensure_ascii=False, indent=2 if layout == "indented" else None).encode()
        file.write_bytes(gzip.compress(text) if layout == "gzip" else text)
    found = read("conversations", file)
    assert [(example.context, example.turns) for example in found] == [
        ("Abro lives in Arlow.", (Turn("Who?", ("Abro",)), Turn("Where?", ("Arlow",)), Turn("Why?", ()))),
        ("Ünü", (Turn("q", ("a",)),)),
    ]
    assert len({example.id for example in found}) == 2


def test_a_collection_is_streamed(tmp_path: Path) -> None:
    """The first items come although the file never ends as it should."""
    file = tmp_path / "ift_pwc.json"
    file.write_text("[" + ",".join([json.dumps(COLLECTION[0])] * 400) + ',{"context":')
    assert len(read("conversations", file, limit=300)) == 300
    with pytest.raises(ValueError, match=r"ift_pwc.json: damaged after item 400"):
        read("conversations", file)


WIKITEXT = [
    "",
    " = Elba = ",
    "",
    " Elba is a boat . ",
    "",
    " = = History = = ",
    "",
    " Abro made it . It is old . ",
    " = Abro = ",
    "",
    " Abro lives . ",
]


def test_wikitext_is_read_by_article(tmp_path: Path) -> None:
    folder = parquet(tmp_path, "validation", text=WIKITEXT)
    assert [(example.id, example.context) for example in read("wikitext", folder)] == [
        ("Elba", "= Elba =\nElba is a boat .\n= = History = =\nAbro made it . It is old ."),
        ("Abro", "= Abro =\nAbro lives ."),
    ]


def test_wikitext_can_be_cut_to_lengths(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(30)]
    folder = parquet(tmp_path, "validation", text=["= One =", " ".join(words)])
    # "= One =" and thirty words, a token each: 4, then 10, then 4 …
    found = read("wikitext", folder, options={"lengths": [4, 10]})
    assert [len(example.context.split()) for example in found] == [4, 10, 4, 10, 4]
    assert " ".join(example.context for example in found).split() == ["=", "One", "=", *words][:32]
    assert [example.id for example in found][:2] == ["One#1", "One#2"]
    with pytest.raises(ValueError, match="whole numbers of tokens"):
        read("wikitext", folder, options={"lengths": [0]})
    once = read("wikitext", folder, options={"lengths": [4, 10], "of_each": 1})
    assert [example.id.partition("#")[2] for example in once] == ["1"] * len({e.id.partition("#")[0] for e in once})
    assert {example.id for example in once} & {example.id for example in found}
    for odd in ({"lengths": [4], "of_each": 0}, {"of_each": 1}):
        with pytest.raises(ValueError, match="how many pieces of an article, at least one"):
            read("wikitext", folder, options=odd)


def test_a_folder_of_text_files_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "b.md").write_text("# Two\n")
    (tmp_path / "below" / "a.TXT").write_bytes(b"\xef\xbb\xbf one \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [(example.id, example.context) for example in read("folder", tmp_path)] == [("b.md", "# Two"), ("below/a.TXT", "one")]
    assert [example.id for example in read("folder", tmp_path / "b.md")] == ["b.md"]
    (tmp_path / "b.md").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b.md: not UTF-8 \(byte 3\)"):
        read("folder", tmp_path)
    tally = Tally()
    source = SourceConfig("folder", str(tmp_path), malformed="skip")
    assert [example.id for example in read_source(source, tally=tally)] == ["below/a.TXT"]
    assert tally.skipped == {"malformed": 1}
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no"):
        read("folder", empty)


def test_a_padded_passage_keeps_its_questions_and_its_place_is_random(tmp_path: Path) -> None:
    count = 60
    folder = squad_folder(
        tmp_path,
        id=[f"q{n}" for n in range(count)],
        title=["t"] * count,
        context=[f"p{n} " + "x " * (5 + n % 20) for n in range(count)],
        question=["Who?"] * count,
        answers=[{"text": [f"p{n}"], "answer_start": [0]} for n in range(count)],
    )
    found = read("squad", folder, options={"pad_to": 100})
    again = read("squad", folder, options={"pad_to": 100})
    assert found == again != read("squad", folder, options={"pad_to": 100, "seed": 1})
    places = []
    for number, example in enumerate(found):
        members = [passage.split()[0] for passage in example.context.split("\n\n")]
        assert members.count(f"p{number}") == 1
        assert len(set(members)) == len(members)
        assert example.turns == (Turn("Who?", (f"p{number}",)),)
        places.append(members.index(f"p{number}") / (len(members) - 1))
    mean = sum(len(example.context.split()) for example in found) / count
    assert 95 <= mean <= 105
    assert 0.3 < sum(places) / count < 0.7


@pytest.mark.parametrize("target", [512, 1024, 2048])
def test_padded_squad_has_the_published_average_lengths(target: int) -> None:
    found = read("squad", shared("squad"), options={"pad_to": target})
    mean = sum(len(example.context.split()) for example in found) / len(found)
    assert abs(mean - target) < 0.05 * target
    assert len(found) == 405
