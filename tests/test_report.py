"""Result folders to a page, through the command: its figures are counted again from the predictions, its pictures looked at."""

from __future__ import annotations

import json
import statistics as exact
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model, tiny_tokenizer
from matplotlib import image
from test_evaluation import evaluation_config, write_examples

from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, save_hypernetwork
from shine.cli.main import main
from shine.config import BackboneConfig, FineTuningConfig, StageConfig
from shine.evaluation.results import PREDICTIONS_FILE, SUMMARY_FILE, read_jsonl
from shine.evaluation.run import evaluate
from shine.hypernetwork import Hypernetwork

METHODS = ("shine", "in_context", "only_question")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Evaluations of a tiny model: single questions twice (other lengths of answers), conversations, texts given back, a sweep."""
    folder = tmp_path_factory.mktemp("results")
    tiny_model().save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    torch.manual_seed(4)
    hypernetwork = tiny_hypernetwork_config()
    weights = Hypernetwork(hypernetwork, Backbone(tiny_model())).state_dict()
    save_hypernetwork(folder / "checkpoint", weights, CheckpointInfo(BackboneConfig(path="x"), hypernetwork))
    write_examples(folder / "mine.jsonl")
    stage = StageConfig(name="1qa", context_length=40, conversation_length=64, learning_rate=1.0, warmup_steps=0)
    first = evaluation_config(str(folder / "backbone"), folder, checkpoint=str(folder / "checkpoint"), stage=stage)
    tuning = FineTuningConfig(conversations=(0, 1), epochs=(1, 2), rank=2)
    configs = {
        "first": first,
        "second": replace(first, max_new_tokens=2),
        "talks": replace(first, stage=replace(stage, name="mqa")),
        "texts": replace(first, stage=replace(stage, name="pretrain")),
        "texts_of_others": replace(first, stage=replace(stage, name="pretrain", context_length=30)),
        "sweep": replace(first, methods=("shine", "fine_tuning"), fine_tuning=tuning),
    }
    folders = {name: folder / name for name in configs}
    for name, config in configs.items():
        evaluate(replace(config, output=str(folders[name])))
    return folders


def table(page: str, title: str) -> list[list[str]]:
    """The rows below a heading of the page, the head among them."""
    below = page.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in below.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if not line.startswith("| ---") and "---:" not in line
    ]


def mean(rows: list[dict[str, Any]], method: str, score: str) -> float:
    return 100 * exact.mean(row[score] for row in rows if row["method"] == method)


def test_the_page_says_what_the_predictions_say(
    results: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(results[name]) for name in ("first", "second", "talks", "texts", "sweep")]
    assert main(["report", *names, "--output", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report" / "report.md")
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    rows = {name: read_jsonl(results[name] / PREDICTIONS_FILE) for name in results}
    f1 = {cells[0]: cells[1].split(" ")[0] for cells in table(page, "F1")[1:]}
    titles = dict(zip(METHODS, ("SHINE", "In-Context", "Only Question"), strict=True))
    for name in ("first", "second", "talks"):
        for method in METHODS:
            assert f1[f"{titles[method]} ({name})"] == f"{mean(rows[name], method, 'f1'):.1f}"
    assert f1["Fine-tuned, text × 1 (sweep)"] == f"{mean(rows['sweep'], 'fine_tuning:0x1', 'f1'):.1f}"
    head, *scored = table(page, "Scores, shares and costs")
    for cells in scored:
        found = dict(zip(head, cells, strict=True))
        method = next((key for key, title in titles.items() if title == found["method"]), None)
        if method is None:
            assert float(found["encode, s a context"]) > 0, "the time of fine-tuning counts as encoding"
            assert found["pays from"] == "", "there is no In-Context to compare with"
            continue
        mine = [row for row in rows[found["run"]] if row["method"] == method]
        assert found["right"] == f"{100 * exact.mean(row['f1'] == 1 for row in mine):.1f}"
        assert found["wrong"] == f"{100 * exact.mean(row['f1'] == 0 for row in mine):.1f}"
        assert found["EM"].startswith(f"{mean(rows[found['run']], method, 'em'):.1f} ±")
        assert (found["adapter, kB"] != "") == (method == "shine")


def test_two_runs_are_compared_context_by_context(results: dict[str, Path], tmp_path: Path) -> None:
    main(["report", str(results["first"]), str(results["second"]), "--output", str(tmp_path / "report")])
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    first, second = (read_jsonl(results[name] / PREDICTIONS_FILE) for name in ("first", "second"))
    found = {(row["method"], row["score"]): row for row in figures["comparisons"]}
    assert set(found) == {(method, score) for method in METHODS for score in ("em", "f1", "rouge_l")}
    for (method, score), row in found.items():
        gap = row["difference"]
        assert gap["value"] == pytest.approx(mean(second, method, score) - mean(first, method, score))
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert (row["from"], row["to"], row["source"], row["contexts"]) == ("first", "second", "mine", 3)
    page = (tmp_path / "report" / "report.md").read_text()
    assert [cells[:4] for cells in table(page, "Differences between runs")[1:]] == [
        ["first", "second", "mine", title] for title in ("SHINE", "In-Context", "Only Question")
    ]
    assert set(figures["runs"]) == {"first", "second"}
    assert figures["runs"]["first"]["sources"] == json.loads((results["first"] / SUMMARY_FILE).read_text())["sources"]


def test_texts_given_back_are_compared_by_loss_and_prefix(results: dict[str, Path], tmp_path: Path) -> None:
    """The difference in nats a token, each text weighing as many tokens as it has."""
    main(["report", str(results["texts"]), str(results["texts_of_others"]), "--output", str(tmp_path / "report")])
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {(row["method"], row["task"], row["score"]): row["difference"]["value"] for row in figures["comparisons"]}
    assert len(found) == 3 * 2 * 2
    runs = [read_jsonl(results[name] / PREDICTIONS_FILE) for name in ("texts", "texts_of_others")]
    for method, task, score in found:
        mine = [[row for row in rows if (row["method"], row["task"]) == (method, task)] for rows in runs]
        if score == "loss":
            means = [sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows) for rows in mine]
        else:
            means = [100 * exact.mean(row["exact_prefix"] for row in rows) for rows in mine]
        assert found[method, task, score] == pytest.approx(means[1] - means[0], abs=1e-9)
    shown = table((tmp_path / "report" / "report.md").read_text(), "Differences between runs")[1:]
    assert [cells[4] for cells in shown[:2]] == ["loss, nats a token (reconstruct)", "exact prefix (reconstruct)"]


def test_pictures_are_drawn_for_what_there_is(results: dict[str, Path], tmp_path: Path) -> None:
    """Each named by the page, none empty, and none of turns where nobody talked."""

    def report(name: str, *runs: str) -> set[str]:
        return {file.name for file in pictures(tmp_path / name, [results[run] for run in runs])}

    assert report("a", "first") == {"by_length.png", "time_quality.png"}
    assert report("b", "talks", "sweep") == {"by_length.png", "by_turn.png", "time_quality.png"}
    assert report("c", "texts") == {"perplexity_by_length.png"}


def pictures(output: Path, folders: list[Path]) -> list[Path]:
    assert main(["report", *map(str, folders), "--output", str(output)]) == 0
    page, files = (output / "report.md").read_text(), sorted(output.glob("*.png"))
    for file in files:
        assert f"]({file.name})" in page
        pixels = image.imread(file)
        assert pixels.shape[0] > 300
        # Axes, words and lines: more than a few colors, on mostly white.
        assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::7]}) > 20
        assert 0.5 < pixels[..., :3].mean() < 1
    return files


def test_texts_given_back_have_their_table(results: dict[str, Path], tmp_path: Path) -> None:
    main(["report", str(results["texts"]), "--output", str(tmp_path / "report")])
    head, *found = table((tmp_path / "report" / "report.md").read_text(), "Texts given back")
    rows = read_jsonl(results["texts"] / PREDICTIONS_FILE)
    assert len(found) == 6
    for cells in found:
        named = dict(zip(head, cells, strict=True))
        method = dict(zip(("SHINE", "In-Context", "Only Question"), METHODS, strict=True))[named["method"]]
        mine = [row for row in rows if (row["method"], row["task"]) == (method, named["task"])]
        assert named["exact prefix"].startswith(f"{100 * exact.mean(row['exact_prefix'] for row in mine):.1f} ±")
        assert named["texts"] == str(len(mine)) == "3"


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["none"], "none: no summary.json; name the output folder of an evaluation that has ended"),
        (["first", "first"], "a folder is named twice: name each once"),
    ],
)
def test_bad_input_is_one_line(
    folders: list[str], message: str, results: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["report", *(str(results.get(name, tmp_path / name)) for name in folders), "--output", str(tmp_path / "report")]) == 2
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
