"""The model card of what ships: its figures are those that were measured, and a target that is missed is called so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model
from matplotlib import image
from safetensors.torch import load_file, save_file
from test_scores import answer, text
from test_shipped import example

from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, save_hypernetwork
from shine.config import BackboneConfig
from shine.evaluation.run import weights_digest
from shine.evaluation.scores import compare_methods, summarise_answers, summarise_recall, summarise_times
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA
from shine.training.reader import starting_lora

METHODS = ("shine", "shine_other", "in_context", "in_context_tuned", "only_question")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return example("smollm2/card.py")


def answers(scores: dict[str, float], *, em: dict[str, float], cosine: float) -> dict[str, Any]:
    """What ``test.py`` sums up of twenty contexts with one question each, equal within a method."""
    rows = {method: [answer(str(n), scores[method], em=em[method]) for n in range(20)] for method in METHODS}
    times = [{"encode": 1.0, "answer": 1.0, "encoded": 1, "made": 1, "asked": 1, "adapter_bytes": 8}]
    methods: dict[str, Any] = {}
    for name, mine in rows.items():
        found = summarise_answers(mine, bounds=(10,))
        methods[name] = {**found, **summarise_times(times, found)}
    intervals = {"cosine": [cosine - 0.01, cosine + 0.01]}
    methods["shine"]["adapters"] = {"cosine": cosine, "intervals": intervals, "pairs": 6, "effective_rank": 1.5}
    return {"tally": "20 samples", "methods": methods, **compare_methods(rows, methods)}


def write_scores(
    folder: Path, place: Path, *, shine: float, worlds: float, perplexity_loss: float, cosine: float, dtype: str = "bfloat16"
) -> Path:
    """The three results that the card of the model in ``place`` is made of."""
    squad = {"shine": shine, "shine_other": 0.05, "in_context": 0.2, "in_context_tuned": 0.5, "only_question": 0.1}
    invented = {"shine": worlds, "shine_other": 0.0, "in_context": 0.4, "in_context_tuned": 0.9, "only_question": 0.02}
    sources = {
        "squad": answers(squad, em=dict.fromkeys(METHODS, 0.0), cosine=cosine),
        "worlds": answers(invented, em=invented, cosine=cosine / 2),
    }
    recalled = [text(str(n), perplexity_loss, task=task) for n in range(3) for task in ("reconstruct", "complete")]
    texts = {"wikitext": {"methods": {"shine": summarise_recall(recalled, bounds=(100,))}}}
    rate = {"value": 40.0, "low": 30.0, "high": 50.0}
    trust = {
        "name": "invented worlds",
        "contexts": 8,
        "interference": {"questions": 9, "changed": rate, "leak_on": rate, "right_off": rate},
        "knowledge": {"questions": 3, "kept_on": rate},
        "unanswerable": {"questions": 0},
        "decay": {"on": {"first_five": rate, "last_five": rate}},
    }
    backbone, stage = {"dtype": dtype}, {"context_length": 64, "learning_rate": 1.0}
    config = {"max_new_tokens": 32, "backbone": backbone, "stage": stage, "output": "/home/me"}
    reader = LoRA.load(place / "reader").to(dtype=getattr(torch, dtype))
    with_reader, alone = (weights_digest(place / "hypernetwork", readers) for readers in ([reader], []))
    others = {name: answers(squad, em=dict.fromkeys(METHODS, 0.0), cosine=cosine) for name in sources}
    for name, value in {
        "other/summary.json": {"config": config, "sources": others},
        "other/plan.json": {"config": config, "weights": with_reader},
        "test/summary.json": {"config": config, "sources": sources},
        "test/plan.json": {"config": config, "weights": with_reader},
        "test_pretrain/summary.json": {"config": config, "sources": texts},
        "test_pretrain/plan.json": {"config": config, "weights": alone},
        "trust/trust.json": {"weights": alone, "sets": [trust]},
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    rows = [
        {"source": source, "method": method, "id": number, "turn": turn, "question": f"{source} {number} {turn}?"}
        | {"answers": ["right", "fine"], "prediction": f"{method} | {'so ' * 40}" if turn == 0 else "later"}
        # Of the first three worlds two people have a pet.
        | {"kind": "pet" if turn == 0 or number < 3 else "job", "em": float(number >= 3)}
        # SHINE knows more of what comes later.
        | {"f1": squad[method] + 0.1 * (method == "shine") * (number - 2)}
        for method in METHODS
        for source in sources
        for number in range(6)
        for turn in range(2)
    ]
    (folder / "test" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder of a model with three runs behind it, of which the last was not watched."""
    config = tiny_hypernetwork_config()
    weights = Hypernetwork(config, Backbone(tiny_model())).state_dict()
    info = CheckpointInfo(BackboneConfig(path="x"), config, ("pretrain", "mqa"), context_length=40)
    save_hypernetwork(tmp_path / "model" / "hypernetwork", weights, info, dtype=torch.bfloat16)
    for run, stage in (("01-pretrain", "pretrain"), ("02-mqa", "mqa"), ("03-mqa", "mqa")):
        folder = tmp_path / "model" / "training" / run
        folder.mkdir(parents=True)
        rows: list[dict[str, float]] = [{"step": n, "loss": 4 - n / 100, "skipped_steps": n // 90} for n in range(10, 100, 10)]
        watched = {"validation/squad/loss": 3.0, "validation/adapter_gap": 0.5, "validation/adapter_cosine": 0.7}
        if run != "03-mqa":
            rows += [{"step": step, **watched, "validation/squad/loss": 3 - step / 100} for step in (30, 60, 90)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {"name": stage, "batch_size": 8, "context_length": 48, "conversation_length": 72, "learning_rate": 1e-3}
        data = {"squad": {"limit": None, "options": {}}, "worlds": {"limit": None, "options": {"count": 3000}}}
        device = {"device": "NVIDIA H100" if run == "01-pretrain" else "x86_64"}
        (folder / "recipe.json").write_text(json.dumps({"stage": recipe, "data": data, "versions": device}))
    generator = torch.Generator().manual_seed(0)
    starting_lora(Backbone(tiny_model()), rank=2, generator=generator).save(tmp_path / "model" / "reader")
    told = {"rank": 8, "alpha": 16, "stage": recipe, "losses": [3.0] * 10 + [2.0] * 20 + [1.0] * 10}
    (tmp_path / "model" / "reader" / "training.json").write_text(json.dumps(told))
    return tmp_path / "model"


def test_the_card_says_what_was_measured(module: ModuleType, place: Path, tmp_path: Path) -> None:
    """F1 40 on a way from 10 to 50 is 75 % of it; every target is reached."""
    scores = write_scores(tmp_path / "scores", place, shine=0.4, worlds=0.7, perplexity_loss=1.0, cosine=0.5)
    page = module.write_card(place, scores).read_text(encoding="utf-8")
    assert "It reaches 6 of the 6 targets" in page
    assert "missed" not in page
    assert "| SHINE | 0.0 [0.0, 0.0] | 40.0 [40.0, 40.0] | 0 |" in page
    assert "| *way, percent* | none to go | 75.0 [75.0, 75.0] | |" in page
    assert "| SHINE | 70.0 [70.0, 70.0] | 70.0 [70.0, 70.0] | 0 |" in page
    assert "| SHINE | 2.7 [2.7, 2.7] | 2.7 [2.7, 2.7] | 2.7 [2.7, 2.7] |" in page
    assert (
        "| mqa | squad, worlds (3,000) | 90 x 8 = 720 | 48 / 72 | AdamW 0.001 | CPU | 2.40 at 60, 2.10 (squad) | 0.50 | 0.70 |"
        in page
    )
    assert "| mqa 2 | squad, worlds (3,000) | 90 x 8 = 720 | 48 / 72 | AdamW 0.001 | CPU | not watched |  |  |" in page
    assert "| 48 / 72 | AdamW 0.001 | NVIDIA H100 | " in page
    assert "2,160 samples in all" in page
    assert "; 3 steps were drawn and not taken, their loss or gradient being no number." in " ".join(page.split())
    assert "were compared" not in page
    assert "40 steps of 8 contexts of the stage mqa at 0.001" in " ".join(page.split())
    assert "its loss is 3.00 over the first ten steps, 2.00 half way, 1.00 over the last ten" in " ".join(page.split())
    assert "| SQuAD, unseen articles | 0.500 [0.490, 0.510] | 1.50 |" in page
    words = " ".join(page.split())
    assert "under the adapter of another passage, F1 on SQuAD is 5.0 [5.0, 5.0]; under its own" in words
    assert "under its own it is 35.0 [35.0, 35.0] higher, passage by passage" in words
    assert "So it is its own passage's adapter that counts" in words
    assert "100.0 [100.0, 100.0] % are exact where one person has a fact" in words
    assert "asked for (6 questions), 0.0 [0.0, 0.0] % where several have (6)" in words
    assert "SHINE, another context 0 %" not in words
    assert "changes 40 [30, 50] % of 9 answers about *another* context, of which 40 [30, 50] % are right without it" in words
    assert "of 3 things that the model knows by itself 40 [30, 50] % are still right" in words
    assert "declines" not in page
    assert "On 20 questions about other passages of two of the articles (European Union law, Scottish Parliament)" in words
    assert "tuned 50.0 [50.0, 50.0]): +30.0 [+30.0, +30.0], +20.0 [+20.0, +20.0] and 75.0 [75.0, 75.0] % of the way." in words
    assert "Checkpoints had been compared on some of these questions" not in words
    assert "four bits" not in page
    assert "had not been committed" not in page
    assert "/home/me" not in (place / "scores.json").read_text()
    trained = re.search(r"\(([\d,]+) trained parameters", page)
    assert trained is not None
    expected = sum(p.numel() for p in Hypernetwork(tiny_hypernetwork_config(), Backbone(tiny_model())).parameters())
    assert int(trained[1].replace(",", "")) == expected
    assert json.loads((place / "scores.json").read_text())["trust"]["sets"][0]["contexts"] == 8
    picture = image.imread(place / "curves.png")
    assert picture.shape[0] > 600
    assert picture.std() > 0.05
    assert all(len(line) < 400 for line in page.splitlines())


def test_what_is_unusual_of_a_version_is_said(module: ModuleType, place: Path, tmp_path: Path) -> None:
    """Weights of the backbone that are not the original ones, a run of code that nobody has, versions scored in different types."""
    config = place / "hypernetwork" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "variant": "Q4_1, dequantised"}))
    recipe = place / "training" / "02-mqa" / "recipe.json"
    kept = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**kept, "versions": {**kept["versions"], "revision": "0123+changes"}}))
    scores = write_scores(tmp_path / "scores", place, shine=0.3, worlds=0.7, perplexity_loss=1.0, cosine=0.5)
    module.write_card(place, scores)
    spoil(place, "hypernetwork")
    scores = write_scores(tmp_path / "scores", place, shine=0.4, worlds=0.8, perplexity_loss=0.5, cosine=0.5, dtype="float32")
    page = " ".join(module.write_card(place, scores).read_text(encoding="utf-8").split())
    assert "as `shine fetch smollm2-135m` gets it: **Q4_1, dequantised**, which is to say from weights of four bits each" in page
    assert "of mqa it was that with changes that had not been committed" in page
    assert "By these values every version improved on the one before in all three, 3 of the 3 steps with intervals apart" in page
    assert "They were scored in different types (bfloat16, float32)." in page


def test_a_missed_target_is_called_so(module: ModuleType, place: Path, tmp_path: Path) -> None:
    """Above Only Question, below In-Context, a quarter of the way; and no way at all is none."""
    scores = write_scores(tmp_path / "scores", place, shine=0.19, worlds=0.3, perplexity_loss=3.0, cosine=0.9)
    page = module.write_card(place, scores).read_text(encoding="utf-8")
    missed = [line.split("|")[1].strip() for line in page.splitlines() if line.endswith("**missed** |")]
    assert [line.split(":")[0].split(" ")[0] for line in missed] == ["SQuAD", "SQuAD", "reconstruction", "invented", "cosine"]
    assert "That is not beyond chance." not in page
    assert "intervals apart | 19.0 [19.0, 19.0] against 10.0 [10.0, 10.0]; paired +9.0 [+9.0, +9.0] | reached |" in page
    assert "It reaches 1 of the 6 targets" in page
    assert "It misses 5 of its targets" in page


def spoil(place: Path, part: str) -> None:
    """Other weights under the same name."""
    file = next((place / part).glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def test_an_adapter_that_is_no_better_than_anothers_is_called_so(module: ModuleType, place: Path, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", place, shine=0.05, worlds=0.3, perplexity_loss=3.0, cosine=0.9)
    page = " ".join(module.write_card(place, scores).read_text(encoding="utf-8").split())
    assert "higher, passage by passage. That is not beyond chance." in page
    assert "own passage's adapter that counts" not in page


def test_side_effects_of_other_weights_make_no_card(module: ModuleType, place: Path, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", place, shine=0.4, worlds=0.7, perplexity_loss=1.0, cosine=0.5)
    figures = json.loads((scores / "trust" / "trust.json").read_text())
    (scores / "trust" / "trust.json").write_text(json.dumps({**figures, "weights": "0123456789abcdef"}))
    with pytest.raises(ValueError, match=r"trust: scored other weights than .*model.hypernetwork; run score\.sh on that"):
        module.write_card(place, scores)


@pytest.mark.parametrize("part", ["hypernetwork", "reader"])
def test_scores_of_other_weights_make_no_card(part: str, module: ModuleType, place: Path, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", place, shine=0.4, worlds=0.7, perplexity_loss=1.0, cosine=0.5)
    spoil(place, part)
    with pytest.raises(ValueError, match=r"test: scored other weights than .*model.hypernetwork; run score\.sh on that"):
        module.write_card(place, scores)
    assert not (place / "README.md").exists()


def test_a_card_is_made_anew_of_what_was_kept(module: ModuleType, place: Path, tmp_path: Path) -> None:
    """The same page; and none once the weights are others."""
    with pytest.raises(ValueError, match=r"scores\.json: is not of the weights beside it"):
        module.write_card(place)
    scores = write_scores(tmp_path / "scores", place, shine=0.4, worlds=0.7, perplexity_loss=1.0, cosine=0.5)
    page = module.write_card(place, scores, chosen_on={"squad": 7}, notes=["On a Tuesday."]).read_text(encoding="utf-8")
    assert "\nOn a Tuesday.\n" in page
    words = " ".join(page.split())
    assert "7 of the 20 (SQuAD, unseen articles)" in words
    # The first seven questions are of the first four contexts, so the last two of six are left, of 60 and 70.
    assert "On the 4 others, about 2 passages, F1 is 65.0 [60.0, 70.0] (Only Question 10.0 [10.0, 10.0], In-Context 20.0" in words
    assert "+55.0 [+50.0, +60.0] beside Only Question, +45.0 [+40.0, +50.0] beside untuned In-Context, 137.5" in words
    assert module.write_card(place).read_text(encoding="utf-8") == page
    spoil(place, "hypernetwork")
    with pytest.raises(ValueError, match=r"scores\.json: is not of the weights beside it; run score\.sh"):
        module.write_card(place)


def test_a_card_tells_what_earlier_versions_scored(module: ModuleType, place: Path, tmp_path: Path) -> None:
    """Each once, however often its scores are written; better ones promise more, and one that is worse does not."""
    before = 0.2
    for shine, worlds in ((0.2, 0.5), (0.2, 0.5), (0.3, 0.6), (0.25, 0.7)):
        if shine != before:
            spoil(place, "hypernetwork")
        scores = write_scores(tmp_path / "scores", place, shine=shine, worlds=worlds, perplexity_loss=1.0, cosine=0.5)
        page = " ".join(module.write_card(place, scores).read_text(encoding="utf-8").split())
        before = shine
    kept = json.loads((place / "scores.json").read_text())
    assert [round(version["scores"]["squad"]["value"]) for version in kept["before"]] == [20, 30]
    assert "SQuAD's F1 from 20.0 to 30.0 (intervals apart); worlds from 50.0 to 60.0" in page
    assert "SQuAD's F1 from 30.0 to 25.0" in page
    assert "every version improved" not in page
    assert "They were scored in different types" not in page
    assert "The cosine between adapters of SQuAD's passages was 0.50, 0.50, 0.50, of which less is wanted." in page


def test_a_card_shows_the_first_answers(module: ModuleType, place: Path, tmp_path: Path) -> None:
    """The first question of the first contexts, whatever they are like, in one line each."""
    scores = write_scores(tmp_path / "scores", place, shine=0.4, worlds=0.7, perplexity_loss=1.0, cosine=0.5)
    page = module.write_card(place, scores).read_text(encoding="utf-8")
    assert "| question | right | SHINE | In-Context | In-Context, tuned | Only Question |" in page
    shown = [line.split(" | ") for line in page.splitlines() if re.match(r"\| (squad|worlds) \d 0\?", line)]
    assert [cells[0] for cells in shown] == [f"| {source} {n} 0?" for source in ("squad", "worlds") for n in range(4)]
    assert all(cells[1] == "right" and cells[2].startswith("shine / so so") and cells[2].endswith("…") for cells in shown)


def test_a_source_that_is_learned_several_times_is_named_once() -> None:
    data = {
        "race": {"options": {}, "limit": 6000},
        "squad": {"options": {}, "limit": None},
        "squad_2": {"options": {}, "limit": None},
        "gaps_short": {"options": {}, "limit": None},
        "worlds": {"options": {"count": 12}, "limit": None},
        "worlds_2": {"options": {"count": 7}, "limit": None},
    }
    found = list(example("smollm2/lineage.py").sources_of(data))
    assert found == [
        "race (6,000)",
        "squad 2 times",
        "gaps short",
        "worlds (12)",
        "worlds (7)",
    ]
