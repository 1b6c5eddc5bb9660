"""What the doors can be told to score on, one word each: composed, read from the hub's layout, scored by a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_tokenizer
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_public_sets import COLLECTION, HOTPOT, MARCO, WIKITEXT, json_lines, musique_row, wiki_files
from test_sources import parquet, shared, squad_folder

from shine.chat import token_ids
from shine.cli.main import main
from shine.config import EvaluationConfig
from shine.evaluation.results import PREDICTIONS_FILE
from shine.evaluation.run import evaluate
from shine.parsing import parse

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SETS = sorted(file.stem for file in (CONFIGS / "sets").glob("*.yaml"))
STAGES = ("pretrain", "mqa", "1qa")
Score = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


def configured(door: str, *overrides: str) -> EvaluationConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(door, list(overrides)), resolve=True)
    return parse(EvaluationConfig, values)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``data`` folder, where the doors look."""
    monkeypatch.setenv("SHINE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def score(tiny_backbone_folder: str, tmp_path: Path) -> Score:
    """Run a door with the baselines of a tiny model; its summary and its predictions."""

    def run(door: str, *overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        small = ["backbone=custom", f"backbone.path={tiny_backbone_folder}", "backbone.dtype=float32", "backbone.device=cpu"]
        small += ["methods=[in_context,only_question]", "max_new_tokens=3"]
        summary = evaluate(configured(door, *small, f"output={tmp_path / 'out'}", "stage.context_length=300", *overrides))
        return summary, [json.loads(line) for line in (tmp_path / "out" / PREDICTIONS_FILE).read_text().splitlines()]

    return run


def lay_out(data: Path) -> None:
    """The sets of single questions as ``hf download`` leaves them, small."""
    squad_folder(data / "squad" / "plain_text")
    parquet(data / "hotpot_qa" / "distractor", "validation", **{**HOTPOT, "answer": ["no"]})
    json_lines(data / "MuSiQue" / "musique_ans_v1.0_dev.jsonl", [musique_row(), musique_row(id="2hop__2", answerable=False)])
    parquet(data / "2WikiMultihopQA", "validation", **HOTPOT)
    for version in ("v1.1", "v2.1"):
        parquet(data / "ms_marco" / version, "validation", **MARCO)


@pytest.mark.parametrize(
    ("name", "questions", "answers"),
    [
        ("squad", 3, ["Abro", "abro"]),
        ("squad_512", 3, ["Abro", "abro"]),
        ("squad_1k", 3, ["Abro", "abro"]),
        ("squad_2k", 3, ["Abro", "abro"]),
        ("hotpotqa", 1, ["no"]),
        ("musique", 1, ["Abro", "A. Bro"]),
        ("2wiki", 1, ["Arlow"]),
        ("msmarco_v1", 1, ["Two days.", "2 days"]),
        ("msmarco_v2", 1, ["Two days.", "2 days"]),
    ],
)
def test_single_questions_by_one_word(name: str, questions: int, answers: list[str], data: Path, score: Score) -> None:
    lay_out(data)
    summary, rows = score("test", f"sets={name}")
    source = "wikimultihop" if name == "2wiki" else name
    assert list(summary["sources"]) == [source]
    assert len(rows) == 2 * questions
    assert rows[0]["answers"] == answers
    assert summary["sources"][source]["methods"]["in_context"]["questions"] == questions


@pytest.mark.parametrize(("name", "target"), [("squad", None), ("squad_512", 512), ("squad_1k", 1024), ("squad_2k", 2048)])
def test_squad_is_padded_to_what_its_name_says(name: str, target: int | None) -> None:
    assert configured("test", f"sets={name}").data.test[name].options["pad_to"] == target


def test_the_published_table_is_one_word_and_sets_can_be_listed(data: Path, score: Score) -> None:
    lay_out(data)
    summary, _ = score("test", "sets=published")
    assert list(summary["sources"]) == ["squad", "hotpotqa", "musique", "wikimultihop", "msmarco_v1", "msmarco_v2"]
    assert list(configured("test", "sets=[msmarco_v2,squad_1k]").data.test) == ["msmarco_v2", "squad_1k"]
    assert list(configured("test", "sets=squad_lengths").data.test) == ["squad", "squad_512", "squad_1k", "squad_2k"]


def test_yes_and_no_are_scored_by_hotpotqas_rule_where_it_is_hotpotqa_or_2wiki(
    data: Path, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that begins as the gold one does is half right on SQuAD, and nothing on HotpotQA and 2WikiMultihopQA."""
    lay_out(data)
    squad_folder(data / "squad" / "plain_text", answers=[{"text": ["no"], "answer_start": [0]}] * 3)
    monkeypatch.setattr("shine.evaluation.methods.clean_answer", lambda text: "no, never")
    parquet(data / "2WikiMultihopQA", "validation", **{**HOTPOT, "answer": ["no"]})
    _, rows = score("test", "sets=[squad,hotpotqa,2wiki]")
    assert {row["source"]: row["f1"] for row in rows} == {"squad": pytest.approx(2 / 3), "hotpotqa": 0.0, "wikimultihop": 0.0}


def test_2wiki_is_scored_with_the_aliases_that_its_official_script_counts(
    tmp_path: Path, data: Path, score: Score, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demonym is right where the file of aliases is given; where it is not, the reader is told that golds are without them."""
    file, aliases = wiki_files(tmp_path)
    monkeypatch.setattr("shine.evaluation.methods.clean_answer", lambda text: "The Arlish.")
    summary, rows = score("test", "sets=2wiki", f"data.test.wikimultihop.path={file}")
    plain, said = summary["sources"]["wikimultihop"], capsys.readouterr().out
    assert {(row["em"], row["f1"]) for row in rows} == {(0.0, 0.0)}
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "report")]) == 0
    for told in (said, plain["tally"], (tmp_path / "report" / "report.md").read_text()):
        assert "1 samples: 0 contexts cut" in told
        assert "golds without aliases" in told
    given = f"data.test.wikimultihop.options.aliases={aliases}"
    summary, rows = score("test", "sets=2wiki", f"data.test.wikimultihop.path={file}", given)
    named = summary["sources"]["wikimultihop"]
    assert {(row["em"], row["f1"]) for row in rows} == {(1.0, 1.0)}
    assert "golds without aliases" not in named["tally"] + capsys.readouterr().out
    assert named["examples"] != plain["examples"], "the two are not compared as if they were asked the same"


@pytest.mark.parametrize("name", ["msmarco_mqa", "mqa_collection"])
def test_conversations_are_scored_turn_by_turn(name: str, data: Path, score: Score) -> None:
    if name == "msmarco_mqa":
        turns = [{"question": f"q{n}?", "answer": f"a{n}"} for n in range(15)]
        rows = [{"query_id": n, "context": f"Abro {n}.", "conversations": turns[: 15 - n]} for n in range(2)]
        json_lines(data / "msmarco-mqa" / "validation.jsonl", rows)
    else:
        data.mkdir()
        contexts = [{**COLLECTION[0], "context": f"Abro {n} lives."} for n in range(100)]
        (data / "ift_pwc.json").write_text(json.dumps(contexts))
    summary, rows = score("test_pwc", f"sets={name}")
    turns_found = summary["sources"][name]["methods"]["in_context"]["turns"]
    expected = {**{str(n): 2 for n in range(1, 15)}, "15": 1} if name == "msmarco_mqa" else {"1": 2, "2": 2}
    assert {turn: found["questions"] for turn, found in turns_found.items()} == expected
    assert all(set(found) == {"em", "f1", "rouge_l", "f1_interval", "questions"} for found in turns_found.values())
    assert len(rows) == 2 * sum(expected.values())


def test_texts_are_given_back_by_length(data: Path, score: Score) -> None:
    """The buckets are 100 to 1,100 tokens, and each holds the texts that the set was cut to for it."""
    configuration = configured("test_pretrain", "sets=wikitext")
    bounds = tuple(range(100, 1101, 100))
    assert configuration.lengths == tuple(configuration.data.test["wikitext"].options["lengths"]) == bounds
    words = " ".join(f"w{n}" for n in range(400))
    parquet(data / "wikitext" / "wikitext-2-v1", "validation", text=[*WIKITEXT, f" {words} "])
    summary, rows = score("test_pretrain", "data.test.wikitext.options.lengths=[100,200]")
    found = summary["sources"]["wikitext"]["methods"]["in_context"]
    tokenizer = tiny_tokenizer()
    for task in ("reconstruct", "complete"):
        buckets = found[task]["lengths"]
        assert set(buckets) == {"100", "200"}
        assert sum(bucket["texts"] for bucket in buckets.values()) == found[task]["texts"]
        assert all({"perplexity", "perplexity_p10", "perplexity_p90", "exact_prefix"} <= set(bucket) for bucket in buckets.values())
    assert {row["id"].split("#")[0] for row in rows} <= {"Elba", "Abro"}
    assert all(row["context_tokens"] <= 200 for row in rows)
    assert len(token_ids(tokenizer, words)) > 1000


@pytest.mark.parametrize("door", ["test", "test_pwc", "test_pretrain"])
def test_any_file_of_a_users_own(door: str, tmp_path: Path, score: Score) -> None:
    rows = [
        {"context": "Ada is red.", "turns": [{"question": "Who?", "answers": ["Ada"]}, {"question": "What?", "answers": ["red"]}]}
    ]
    file = json_lines(tmp_path / "questions.jsonl", rows)
    summary, rows = score(door, "sets=jsonl", f"data.test.mine.path={file}")
    assert list(summary["sources"]) == ["mine"]
    assert len(rows) == 2 * 2


def test_texts_of_a_users_own(tmp_path: Path, score: Score) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("Ada is red.")
    _, rows = score("test_pretrain", "sets=folder", f"data.test.mine.path={tmp_path / 'notes'}")
    assert [(row["id"], row["task"]) for row in rows][:2] == [("a.md", "reconstruct"), ("a.md", "complete")]


def test_real_squad_by_its_word(score: Score) -> None:
    """The first passages of the real files, padded and plain, where they lie beside the project."""
    folder = shared("squad")
    paths = [f"data.test.{name}.{key}" for name in ("squad", "squad_512") for key in (f"path={folder}", "limit=3")]
    summary, _ = score("test", "sets=[squad,squad_512]", *paths, "methods=[only_question]")
    asked = {name: found["methods"]["only_question"]["questions"] for name, found in summary["sources"].items()}
    assert asked["squad"] == asked["squad_512"] > 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_scored_on_its_own_set_also_after_training(stage: str) -> None:
    expected = {"pretrain": "wikitext", "mqa": "msmarco_mqa", "1qa": "squad"}[stage]
    door = {"pretrain": "test_pretrain", "mqa": "test_pwc", "1qa": "test"}[stage]
    assert list(configured(door).data.test) == [expected]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        trained = compose("train", [f"stage={stage}", "output=out"])
        other = compose("train", [f"stage={stage}", "output=out", "sets=hotpotqa"])
    assert list(trained.data.test) == [expected]
    assert list(other.data.test) == ["hotpotqa"]


def test_every_set_is_named_by_the_documentation() -> None:
    page = (CONFIGS.parent / "docs" / "evaluation.md").read_text()
    assert [name for name in SETS if name not in STAGES and f"`{name}`" not in page] == []


def test_the_keys_of_every_set_can_be_set_on_a_command_line() -> None:
    for name in SETS:
        sources = configured("test", f"sets={name}").data.test
        changed = configured("test", f"sets={name}", *(f"data.test.{source}.limit=7" for source in sources)).data.test
        assert {source: found.limit for source, found in changed.items()} == dict.fromkeys(sources, 7)


def test_a_set_is_scored_on_what_is_kept_for_scoring() -> None:
    """Never a training split; what the worlds invent for training has other seeds."""
    for name in SETS:
        for source in configured("test", f"sets={name}").data.test.values():
            written = yaml.safe_load((CONFIGS / "data" / "worlds.yaml").read_text())
            learned = [part["worlds"]["options"]["seed"] for part in (written["train"], written["validation"])]
            kept = source.split == "validation" or source.part == "held_out" or source.options.get("seed") not in [None, *learned]
            assert kept or source.kind in ("jsonl", "folder"), name
