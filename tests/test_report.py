"""Result folders to a page, through the command: its figures are counted again from the predictions, its pictures looked at."""

from __future__ import annotations

import json
import math
import shutil
import statistics as exact
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model, tiny_tokenizer
from matplotlib import image
from test_evaluation import evaluation_config, write_examples
from test_scores import answer, timed_methods

from shine.backbone import Backbone
from shine.chat import token_ids
from shine.checkpoint import CheckpointInfo, load_hypernetwork, save_hypernetwork
from shine.cli.main import main
from shine.config import BackboneConfig, FineTuningConfig, StageConfig
from shine.data.batching import even_chunks
from shine.evaluation import plots
from shine.evaluation.report import Run
from shine.evaluation.results import PREDICTIONS_FILE, SUMMARY_FILE, read_jsonl
from shine.evaluation.run import evaluate
from shine.evaluation.scores import compare_methods
from shine.hypernetwork import Hypernetwork
from shine.pretrained import load_model, load_tokenizer

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
        "texts_cut": replace(first, stage=replace(stage, name="pretrain", context_length=30)),
        "texts_asked_otherwise": replace(
            first, stage=replace(stage, name="pretrain"), prompts=replace(first.prompts, repeat="Again!", complete="Go on!")
        ),
        "sweep": replace(first, methods=("shine", "fine_tuning"), fine_tuning=tuning),
    }
    folders = {name: folder / name for name in configs}
    for name, config in configs.items():
        evaluate(replace(config, output=str(folders[name])))
    return folders


def tmp_path_of(results: dict[str, Path]) -> Path:
    """The folder that the evaluations share with their model and data."""
    return results["first"].parent


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
        assert found["right"].startswith(f"{100 * exact.mean(row['f1'] == 1 for row in mine):.1f} ±")
        assert found["wrong"].startswith(f"{100 * exact.mean(row['f1'] == 0 for row in mine):.1f} ±")
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
    main(["report", str(results["texts"]), str(results["texts_asked_otherwise"]), "--output", str(tmp_path / "report")])
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {(row["method"], row["task"], row["score"]): row["difference"]["value"] for row in figures["comparisons"]}
    assert len(found) == 3 * 2 * 2
    runs = [read_jsonl(results[name] / PREDICTIONS_FILE) for name in ("texts", "texts_asked_otherwise")]
    for method, task, score in found:
        mine = [[row for row in rows if (row["method"], row["task"]) == (method, task)] for rows in runs]
        if score == "loss":
            means = [sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows) for rows in mine]
        else:
            means = [100 * exact.mean(row["exact_prefix"] for row in rows) for rows in mine]
        assert found[method, task, score] == pytest.approx(means[1] - means[0], abs=1e-9)
    shown = table((tmp_path / "report" / "report.md").read_text(), "Differences between runs")[1:]
    assert [cells[4] for cells in shown[:2]] == ["loss, nats a token (reconstruct)", "exact prefix (reconstruct)"]


def test_runs_that_were_asked_other_things_are_not_compared(results: dict[str, Path], tmp_path: Path) -> None:
    """The ids are the same, the contexts are cut elsewhere: a paired difference would be none."""
    main(["report", str(results["texts"]), str(results["texts_cut"]), "--output", str(tmp_path / "report")])
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["comparisons"] == []
    assert figures["not_compared"] == [{"from": "texts", "to": "texts_cut", "source": "mine"}]
    page = (tmp_path / "report" / "report.md").read_text()
    assert "texts and texts_cut are not compared on mine: they were not asked the same there" in page
    assert "## Differences between runs" not in page


def test_methods_are_compared_on_the_page(results: dict[str, Path], tmp_path: Path) -> None:
    """The first method against each other: F1 of answers; loss, in nats a token, and exact prefix of texts given back."""
    main(["report", str(results["first"]), str(results["texts"]), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.md").read_text()
    rows = read_jsonl(results["first"] / PREDICTIONS_FILE)
    for cells, other in zip(table(page, "Differences between methods, F1")[1:], METHODS[1:], strict=True):
        gap = mean(rows, "shine", "f1") - mean(rows, other, "f1")
        assert cells[3].startswith(f"{gap:+.1f} [")
    rows = read_jsonl(results["texts"] / PREDICTIONS_FILE)
    found = table(page, "Differences between methods, texts given back")[1:]
    assert [cells[2] for cells in found] == ["SHINE − In-Context"] * 2 + ["SHINE − Only Question"] * 2
    for cells, (other, task) in zip(found, product(METHODS[1:], ("reconstruct", "complete")), strict=True):
        mine, theirs = ([row for row in rows if (row["method"], row["task"]) == (name, task)] for name in ("shine", other))
        losses = [sum(r["loss"] * r["tokens"] for r in side) / sum(r["tokens"] for r in side) for side in (mine, theirs)]
        assert cells[4].startswith(f"{losses[0] - losses[1]:+.3f} [")
        prefixes = [100 * exact.mean(r["exact_prefix"] for r in side) for side in (mine, theirs)]
        assert cells[5].startswith(f"{prefixes[0] - prefixes[1]:+.1f} [")


def test_pays_from_and_differences_stand_on_the_page(results: dict[str, Path], tmp_path: Path) -> None:
    """Real times say nothing here, so the folder is given some: 1 s to encode, 0.25 s a question against 0.5 s in context."""
    folder = tmp_path / "timed"
    shutil.copytree(results["first"], folder)
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    found = summary["sources"]["mine"]
    rows = {method: [answer(str(n), (n + gain) / 10) for n in range(4)] for method, gain in (("shine", 3), ("in_context", 1))}
    found |= compare_methods(rows, timed_methods(encode=1.0, shine=0.25, in_context=0.5))
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))
    main(["report", str(folder), "--output", str(tmp_path / "report")])
    head, *scored = table((tmp_path / "report" / "report.md").read_text(), "Scores, shares and costs")
    assert [dict(zip(head, cells, strict=True))["pays from"] for cells in scored] == ["5", "", ""]
    shown = table((tmp_path / "report" / "report.md").read_text(), "Differences between methods, F1")[1:]
    assert shown == [["timed", "mine", "SHINE − In-Context", "+20.0 [+20.0, +20.0]"]]


def test_the_way_stands_on_the_page(results: dict[str, Path], tmp_path: Path) -> None:
    """From 10 to 50 with F1 20 in every context; of EM, where nothing is exact, there is no way."""
    folder = tmp_path / "gone"
    shutil.copytree(results["first"], folder)
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    scores = {"shine": 0.2, "in_context_tuned": 0.5, "only_question": 0.1}
    summary["sources"]["mine"] |= compare_methods({name: [answer(c, f1) for c in "abc"] for name, f1 in scores.items()}, {})
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))
    main(["report", str(folder), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.md").read_text()
    assert table(page, "The way from Only Question to the context in the prompt, percent") == [
        ["run", "set", "method", "to", "EM [95 %]", "F1 [95 %]"],
        ["gone", "mine", "SHINE", "In-Context, tuned", "none to go", "25 [25, 25]"],
    ]
    main(["report", str(results["sweep"]), "--output", str(tmp_path / "sweep")])
    assert "The way from" not in (tmp_path / "sweep" / "report.md").read_text()


def test_adapters_of_different_contexts_are_held_against_each_other(results: dict[str, Path], tmp_path: Path) -> None:
    """The page has the mean cosine of the pairs of each batch, computed again."""
    summary = json.loads((results["first"] / SUMMARY_FILE).read_text())
    found = summary["sources"]["mine"]["methods"]
    assert [name for name, scores in found.items() if "adapters" in scores] == ["shine"]
    rows = [json.loads(line) for line in (tmp_path_of(results) / "mine.jsonl").read_text().splitlines()]
    backbone = Backbone(load_model(str(tmp_path_of(results) / "backbone"), dtype=torch.float32))
    hypernetwork = load_hypernetwork(tmp_path_of(results) / "checkpoint", backbone)
    tokenizer = load_tokenizer(str(tmp_path_of(results) / "backbone"))
    flat = []
    texts = sorted((token_ids(tokenizer, row["context"])[:40] for row in rows), key=len)
    for text in texts:
        ids = torch.tensor([text])
        with torch.no_grad():
            lora = hypernetwork(backbone, ids, None)
        flat.append(torch.cat([(a[0] @ b[0]).flatten() for a, b in lora.values()]))
    batches = even_chunks(range(len(texts)), summary["config"]["batch_size"])
    within = [(i, j) for batch in batches for i in batch for j in batch if j < i]
    pairs = [float(torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=0)) for i, j in within]
    assert found["shine"]["adapters"]["pairs"] == len(within) > 0
    assert found["shine"]["adapters"]["cosine"] == pytest.approx(exact.mean(pairs), abs=1e-4)
    main(["report", str(results["first"]), "--output", str(tmp_path / "report")])
    shown = table((tmp_path / "report" / "report.md").read_text(), "Adapters of different contexts")
    assert shown[1][:2] == ["first", "mine"]
    low, high = found["shine"]["adapters"]["intervals"]["cosine"]
    assert shown[1][2] == f"{exact.mean(pairs):.2f} [{low:.2f}, {high:.2f}]"


def test_every_line_of_a_picture_is_told_from_the_others(results: dict[str, Path]) -> None:
    """Eight fine-tunings in two runs: no two look alike, and each is named in some panel, none where all are named already."""
    methods = [f"fine_tuning:{count}x{epochs}" for count in (0, 4) for epochs in (5, 10, 20, 40)]
    halves = [("shine", *methods[:4]), ("shine", *methods[4:])]
    runs = [Run(str(n), {"sources": {"s": {"methods": dict.fromkeys(half)}}}, []) for n, half in enumerate(halves)]
    styles = plots._styles([(run, "s") for run in runs])
    assert set(styles) == {"shine", *methods}
    assert len({styles[method] for method in methods}) == 8
    figure, grid = plots._grid(3)
    for axes, half in zip(grid, (*halves, halves[0]), strict=True):
        for method in half:
            axes.plot([0, 1], [0, 1], styles[method], label=method)
    plots._legends(grid)
    assert [axes.get_legend() is not None for axes in grid] == [True, True, False]
    plots.plt.close(figure)


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


def test_texts_given_back_have_a_row_for_each_length(results: dict[str, Path], tmp_path: Path) -> None:
    """Three texts, the longest cut to 40 tokens, in the buckets 10, 20 and 40: a row for each that holds one, as in the JSON."""
    main(["report", str(results["texts"]), "--output", str(tmp_path / "report")])
    head, *found = table((tmp_path / "report" / "report.md").read_text(), "Texts given back, by length")
    rows = read_jsonl(results["texts"] / PREDICTIONS_FILE)
    bounds = {row["id"]: next(bound for bound in (10, 20, 40) if row["context_tokens"] <= bound) for row in rows}
    assert len(set(bounds.values())) == 3
    titles = dict(zip(METHODS, ("SHINE", "In-Context", "Only Question"), strict=True))
    expected = list(product(titles.values(), ("reconstruct", "complete"), sorted(set(bounds.values()))))
    assert [(cells[2], cells[3], int(cells[4])) for cells in found] == expected
    kept = json.loads((tmp_path / "report" / "report.json").read_text())["runs"]["texts"]["sources"]["mine"]["methods"]
    for cells in found:
        named = dict(zip(head, cells, strict=True))
        method = next(name for name, title in titles.items() if title == named["method"])
        task, bound = named["task"], int(named["tokens up to"])
        mine = [row for row in rows if (row["method"], row["task"], bounds[row["id"]]) == (method, task, bound)]
        losses = sum(row["loss"] * row["tokens"] for row in mine) / sum(row["tokens"] for row in mine)
        assert named["perplexity [95 %]"].startswith(f"{math.exp(losses):.2f} [")
        assert named["exact prefix"].startswith(f"{100 * exact.mean(row['exact_prefix'] for row in mine):.1f} ±")
        assert named["texts"] == str(len(mine))
        assert kept[method][task]["lengths"][str(bound)]["perplexity"] == pytest.approx(math.exp(losses))


def test_answers_have_a_column_for_each_turn_and_length(results: dict[str, Path], tmp_path: Path) -> None:
    """Of conversations both, of single questions no turns; a set whose questions are all of one group has no table."""
    main(["report", str(results["first"]), str(results["talks"]), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.md").read_text()
    head, *found = table(page, "F1 by turn")
    assert head[3:] == ["1", "2", "3"]
    assert {cells[0] for cells in found} == {"talks"}
    assert found.pop()[2:] == ["*questions*", "3", "2", "1"]
    rows = read_jsonl(results["talks"] / PREDICTIONS_FILE)
    for cells, method in zip(found, METHODS, strict=True):
        for turn, cell in enumerate(cells[3:]):
            mine = [row["f1"] for row in rows if (row["method"], row["turn"]) == (method, turn)]
            assert cell.startswith(f"{100 * exact.mean(mine):.1f} ±")
    head, *found = table(page, "F1 by length of the context, tokens up to")
    assert head[3:] == ["10", "20", "40"]
    assert [cells[0] for cells in found] == ["first"] * 4 + ["talks"] * 4


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
