"""``make demo``: train the CPU world for a short stretch, score the shipped hypernetworks, show what they answer.

No GPU is needed, and the network only once, for the backbone of the last step. Everything is written to ``outputs/demo/``.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from shine.checkpoint import read_info
from shine.config import EvaluationConfig, SourceConfig, TrainConfig
from shine.data.examples import Example
from shine.data.sources import read_source
from shine.data.worlds import guess_rate
from shine.evaluation.plots import draw_report
from shine.evaluation.results import PREDICTIONS_FILE
from shine.evaluation.run import evaluate
from shine.evaluation.side_by_side import converse, rows_as_markdown, show_rows, three_methods
from shine.evaluation.tables import TITLES
from shine.model import Shine
from shine.parsing import parse
from shine.training.stage import train
from shine.training.stop import StoppedError
from shine.zoo import resolve

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "outputs" / "demo"
SHORT = {"pretrain": 100, "mqa": 400, "1qa": 100}
DOORS = {"test_pretrain": 100, "test_pwc": 200, "test": 200}
"""Contexts that each test looks at."""


def values(door: str, *overrides: str) -> Any:
    """The configuration that a door would get with these overrides."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return OmegaConf.to_container(compose(door, overrides=["experiment=cpu_world", *overrides]), resolve=True)


def train_short() -> dict[str, Path]:
    """The three stages, each from the one before, and the folder of each run."""
    runs: dict[str, Path] = {}
    checkpoint = "null"
    for stage, steps in SHORT.items():
        runs[stage] = OUTPUT / "train" / stage
        short = [f"stage.steps={steps}", "stage.warmup_steps=10", "stage.log_every=5", f"stage.evaluate_every={steps}"]
        place = [f"output={runs[stage]}", f"checkpoint={checkpoint}", "data.train.worlds.options.count=30000"]
        config = values("train", f"stage={stage}", *short, *place)
        checkpoint = str(train(parse(TrainConfig, config)))
    return runs


def score(door: str, contexts: int) -> dict[str, Any]:
    """Every method's scores of one test on the shipped hypernetwork."""
    overrides = ["checkpoint=cpu-world", f"output={OUTPUT / door}", f"data.test.worlds.options.count={contexts}"]
    return dict(evaluate(parse(EvaluationConfig, values(door, *overrides)))["sources"]["worlds"]["methods"])


def show_answers(predictions: Path, examples: list[Example]) -> None:
    """The questions about a few contexts, with the answers of the three methods."""
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    for example in examples:
        print(f"\n{example.context}")
        for number, turn in enumerate(example.turns):
            given = [f"{TITLES[r['method']]}: {r['prediction']:<12}" for r in rows if (r["id"], r["turn"]) == (example.id, number)]
            print(f"  {turn.question:<42} {' '.join(given)} (right: {turn.answer})")


def converse_about_text(checkpoint: str, file: Path) -> bool:
    """The example conversations on a shipped hypernetwork, and whether they were held: its backbone may not be to be had here."""
    info = read_info(checkpoint)
    assert info is not None
    try:
        resolve(info.backbone.path)
    except ValueError as error:
        print(f"left out: {error}")
        return False
    model = Shine.from_pretrained(checkpoint, device="cpu")
    examples = list(read_source(SourceConfig(kind="jsonl", path=str(file))))
    rows = converse(three_methods(model), examples, max_new_tokens=24)
    show_rows(rows)
    (OUTPUT / "conversations.md").write_text(rows_as_markdown(rows), encoding="utf-8")
    return True


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    print("1. Train the three stages for a short stretch, from nothing.", flush=True)
    runs = train_short()
    print(
        "\n2. Score the shipped hypernetwork, trained longer by the same code (make reproduce), on contexts it never saw.",
        flush=True,
    )
    scores = {door: score(door, contexts) for door, contexts in DOORS.items()}
    print("\n3. What the three methods answer. SHINE and Only Question see the question alone.", flush=True)
    source = parse(EvaluationConfig, values("test")).data.test["worlds"]
    examples = list(itertools.islice(read_source(source), DOORS["test"]))
    kinds = [turn.kind for example in examples for turn in example.turns]
    print(
        f"The best constant answer to each kind of question is right {sum(map(guess_rate, kinds)) / len(kinds):.1f} % of the time."
    )
    show_answers(OUTPUT / "test" / PREDICTIONS_FILE, examples[:3])
    panels = [("Shipped, single questions", scores["test"]), ("Shipped, conversations", scores["test_pwc"])]
    draw_report(OUTPUT / "demo.png", runs=runs, scores=panels)
    print(
        "\n4. Conversations about text in plain English, on SmolLM2-135M. What this hypernetwork reaches and what it cannot do: "
        "shine/assets/smollm2-135m/README.md",
        flush=True,
    )
    held = converse_about_text("smollm2-135m", ROOT / "examples" / "conversations.jsonl")
    report = {
        "methods": {name: {"em": found["em"], "f1": found["f1"]} for name, found in scores["test"].items()},
        "conversations": held,
        "seconds": round(time.perf_counter() - started, 1),
    }
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{report['seconds']:.0f} s. Loss and scores: {OUTPUT / 'demo.png'}; figures: {OUTPUT / 'report.json'}")


if __name__ == "__main__":
    try:
        main()
    except (StoppedError, KeyboardInterrupt):
        sys.exit("stopped; make demo starts it again from the beginning")
