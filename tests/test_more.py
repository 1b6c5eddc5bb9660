"""What more training does: from the scores of checkpoints to the model card."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib import image
from test_card import place, spoil, write_scores
from test_shipped import example

from shine.evaluation.run import weights_digest

__all__ = ["place"]
QUESTIONS = 6


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return example("smollm2/more.py")


def write_checkpoint(scored: Path, name: str, *, squad: float, worlds: float, weights: str = "") -> None:
    """Scores of six contexts of each set, which differ by half a point about what is given."""
    folder = scored / name
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"weights": weights}))
    methods = {"methods": {"shine": {"adapters": {"cosine": 0.9}}}}
    (folder / "summary.json").write_text(json.dumps({"sources": {"squad": methods, "worlds": methods}}))
    rows = [
        {"source": source, "id": str(n), "f1": score + (n % 2) / 100, "em": score + (n % 2) / 100}
        for source, score in (("squad", squad), ("worlds", worlds))
        for n in range(QUESTIONS)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, place: Path) -> Path:
    """Of a run that loses what it knew of worlds, and of one that gains in both."""
    out = tmp_path / "more"
    start = weights_digest(place / "hypernetwork", [])
    write_checkpoint(out / "scores", "start", squad=0.2, worlds=0.7, weights=start)
    for arm, step, squad, worlds in (("labels", 10, 0.2, 0.5), ("labels", 20, 0.2, 0.4), ("distilled", 20, 0.3, 0.8)):
        write_checkpoint(out / "scores", f"{arm}-{step:06}", squad=squad, worlds=worlds)
        (out / arm).mkdir(exist_ok=True)
        stage = {"batch_size": 48, "learning_rate": 4e-4}
        watched = {"step": step, "validation/answers/loss": 2.5 - step / 100, "validation/adapter_gap": 0.5}
        with (out / arm / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(watched) + "\n")
        (out / arm / "run.json").write_text(json.dumps({"config": {"stage": stage}}))
    return out


def test_a_card_tells_what_more_training_does(module: ModuleType, place: Path, folder: Path, tmp_path: Path) -> None:
    """Each checkpoint beside the start, on the same questions, the worse ones too."""
    module.write_more(folder, place)
    scores = write_scores(tmp_path / "scores", place, shine=0.4, worlds=0.7, perplexity_loss=1.0, cosine=0.5)
    page = example("smollm2/card.py").write_card(place, scores).read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith(("| the shipped file", "| the labels", "| the tuned"))]
    # Steps, SQuAD, against the start, worlds, against the start, cosine, loss and gap.
    assert rows == [
        "| the shipped file | 0 | 20.5 [20.2, 20.8] |  | 70.5 [70.2, 70.8] |  | 0.900 | | |",
        "| the labels | 10 | 20.5 [20.2, 20.8] | +0.0 [+0.0, +0.0] | 50.5 [50.2, 50.8] "
        "| -20.0 [-20.0, -20.0] | 0.900 | 2.40 | 0.50 |",
        "| the labels | 20 | 20.5 [20.2, 20.8] | +0.0 [+0.0, +0.0] | 40.5 [40.2, 40.8] "
        "| -30.0 [-30.0, -30.0] | 0.900 | 2.30 | 0.50 |",
        "| the tuned reader's distribution too | 20 | 30.5 [30.2, 30.8] | +10.0 [+10.0, +10.0] | 80.5 [80.2, 80.8] "
        "| +10.0 [+10.0, +10.0] | 0.900 | 2.30 | 0.50 |",
    ]
    words = " ".join(page.split())
    assert "scored on 6 questions about passages of the unseen articles and 6 about unseen worlds" in words
    assert "The longest of these runs draws 960 samples more, 44 % of those behind the shipped file." in words
    assert "Intervals without zero: 4 of 6." in words
    assert "Worlds, exact: worse after 20 steps from the labels and better after 20 steps from the tuned reader" in words
    assert "no different beyond chance after 20 steps from the labels" in words
    picture = image.imread(place / "more.png")
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05


def test_what_was_measured_of_other_weights_is_not_told(module: ModuleType, place: Path, folder: Path) -> None:
    module.write_more(folder, place)
    assert module.More.read(place) is not None
    spoil(place, "hypernetwork")
    assert module.More.read(place) is None
    with pytest.raises(ValueError, match=r"start: scored other weights than .*hypernetwork; run more\.sh on that"):
        module.write_more(folder, place)
