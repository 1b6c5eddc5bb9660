"""``shine data inspect`` and how a source is named on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_bad_inputs import GOOD

from shine.cli.main import main
from shine.cli.sources import parse_source
from shine.config import SourceConfig
from shine.data.stories import Story
from shine.data.worlds import World
from shine.pretrained import load_tokenizer
from shine.zoo import resolve


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("squad:data/squad", SourceConfig("squad", "data/squad")),
        (
            "race:d/all,split=validation,cloze=false,limit=3",
            SourceConfig("race", "d/all", "validation", limit=3, options={"cloze": False}),
        ),
        ("wikitext:w,lengths=[100, 200],limit=2", SourceConfig("wikitext", "w", limit=2, options={"lengths": [100, 200]})),
        ("worlds,count=10,seed=2", SourceConfig("worlds", options={"count": 10, "seed": 2})),
        ("wikitext:w,malformed=skip,part=held_out", SourceConfig("wikitext", "w", malformed="skip", part="held_out")),
    ],
)
def test_a_source_is_named_in_one_word(text: str, source: SourceConfig) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [("squad:x,split", "no KEY=VALUE"), ("squad:x,pad_to=[1", "cannot be read"), ("squad:x,limit=many", "limit: .*valid integer")],
)
def test_a_source_that_is_not_understood_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_source(text)


def inspect(tmp_path: Path, *arguments: str) -> int:
    picture = str(tmp_path / "lengths.png")
    return main(["data", "inspect", "--backbone", "cpu-world", "--histogram", picture, *arguments])


def test_inspect_prints_five_examples_with_their_labels_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(tmp_path, "--source", "worlds,count=9,seed=3", "--stage", "1qa") == 0
    out = capsys.readouterr().out
    marked = [line for line in out.splitlines() if line.startswith("⟦")]
    assert len(marked) == 5
    assert all(line.endswith("<|im_end|>⏎⟧") for line in marked)
    assert out.count("world-3-") == 5
    assert out.count("<|im_start|>user") == 5
    assert "⟦<|im_start|>" not in out
    with Image.open(tmp_path / "lengths.png") as picture:
        assert picture.width > 1000


def test_inspect_counts_what_a_stage_would_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", "worlds,count=50,seed=3", "--stage", "mqa", "--json", "--context-length", "25"]
    assert inspect(tmp_path, *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 50
    assert 0 < found["contexts_cut"] < 50
    assert found["context_max"] > 25 >= found["context_mean"] - 15
    assert found["skipped"] == {}
    assert (found["contexts"], found["questions"]) == (50, sum(len(example.turns) for example in World(seed=3).examples(50)))


def test_inspect_of_plain_texts_shows_them_as_pretraining_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.txt"
    file.write_text("Abro lives in Arlow .\n\nImre is a cook .\n")
    assert inspect(tmp_path, "--source", f"text:{file}", "--context-length", "64", "--conversation-length", "80") == 0
    out = capsys.readouterr().out
    assert "skipped                 1 (empty context)" in out
    assert "stage                   pretrain" in out
    assert "⟦" in out
    # Before they are put together into one sample.
    counts = [len(load_tokenizer(resolve("cpu-world")).tokenize(text)) for text in ("Abro lives in Arlow .", "Imre is a cook .")]
    assert "texts                   2" in out
    assert f"text mean               {sum(counts) / 2}" in out
    assert f"text max                {max(counts)}" in out
    assert "samples                 1" in out


def test_inspect_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(tmp_path, "--source", f"squad:{tmp_path / 'none'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --source.squad:")
    assert error.count("\n") == 1


ROWS = {kind: row for kind, row in GOOD.items() if kind not in ("text", "wikitext")}


@pytest.mark.parametrize("kind", ROWS)
def test_inspect_shows_five_examples_of_any_source(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.jsonl"
    # Passages that differ, since what stands in a row with one passage is one example.
    rows = [json.dumps(ROWS[kind]).replace('"c"', f'"c{n}"') for n in range(7)]
    file.write_text("\n".join(rows))
    assert inspect(tmp_path, "--source", f"{kind}:{file}") == 0
    out = capsys.readouterr().out
    assert out.count("<|im_start|>user") == 5
    assert out.count("⟦") == 5
    assert "samples                 7" in out
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["text", "wikitext", "folder"])
def test_inspect_shows_texts_of_any_source(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(7):
        (folder / f"{n}.md").write_text(f"Abro the {n} lives in Arlow . " * 3)
    lines = [f" = Abro {n} = \n\n Abro the {n} lives in Arlow . \n" for n in range(7)]
    (tmp_path / "train.txt").write_text("".join(lines) if kind == "wikitext" else "Abro lives in Arlow .\n" * 7)
    path = folder if kind == "folder" else tmp_path / "train.txt"
    assert inspect(tmp_path, "--source", f"{kind}:{path}", "--context-length", "40", "--conversation-length", "60") == 0
    out = capsys.readouterr().out
    assert "texts                   7" in out
    assert "stage                   pretrain" in out
    assert out.count("⟦") >= 5
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


def test_inspect_shows_stories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(tmp_path, "--source", "stories,count=6,seed=2,turns=3") == 0
    out = capsys.readouterr().out
    assert "samples                 6" in out
    questions = sum(len(example.turns) for example in Story(seed=2, turns=3).examples(6))
    assert f"questions               {questions}" in out
    assert out.count("⟦") == sum(len(example.turns) for example in Story(seed=2, turns=3).examples(5))
