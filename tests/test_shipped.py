"""The hypernetworks that are shipped, how they get into the package, and the demo that shows them."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from shine.backbone import TARGETS, Backbone
from shine.checkpoint import CheckpointInfo, read_info, read_weights, save_hypernetwork
from shine.cli.doors import composed
from shine.config import BackboneConfig, EvaluationConfig, M2PConfig
from shine.data.worlds import World, guess_rate
from shine.evaluation.run import evaluate
from shine.fingerprint import fingerprint
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone
from shine.lora import LoRA
from shine.m2p import MEASURED
from shine.model import Shine
from shine.training.reader import starting_lora
from shine.zoo import ASSETS

ROOT = Path(__file__).resolve().parent.parent


def example(path: str) -> ModuleType:
    """A program of ``examples/``, imported."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "examples" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up, and a program finds those beside it.
    sys.modules[spec.name] = module
    folder = str((ROOT / "examples" / path).parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return example("demo.py")


def test_the_shipped_files_are_small() -> None:
    assert sum(file.stat().st_size for file in (ASSETS / "cpu-world").rglob("*") if file.is_file()) < 20e6


def test_knowledge_travels_through_the_weights(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On unseen contexts SHINE answers far beyond guessing; Only Question does not. (All 200 contexts: docs/results.md.)"""
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    scores = demo.score("test", 120)
    kinds = [turn.kind for example in World(seed=3000).examples(120) for turn in example.turns]
    guess = sum(map(guess_rate, kinds)) / len(kinds)
    assert guess <= 20
    assert abs(scores["only_question"]["em"] - guess) <= 5
    assert scores["shine"]["em"] >= 80
    assert scores["shine"]["contexts_encoded"] == 120


@pytest.mark.slow
def test_the_readme_has_the_figures_of_this_code(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 200 contexts, single questions and conversations; a tenth of a point is an answer of 1,000."""
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    found = {door: demo.score(door, 200) for door in ("test", "test_pwc")}
    titles = {"Only Question": "only_question", "In-Context": "in_context", "**SHINE**": "shine"}
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = {cells[0]: cells[1:] for cells in rows if len(cells) == 3 and cells[0] in titles}
    assert set(shown) == set(titles)
    for title, method in titles.items():
        for door, text in zip(found, shown[title], strict=True):
            assert float(text.strip("*")) == pytest.approx(found[door][method]["em"], abs=0.31), (title, door)


def test_the_demo_runs_to_its_report(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "SHORT", {"pretrain": 3, "mqa": 3, "1qa": 3})
    monkeypatch.setattr(demo, "DOORS", {"test_pretrain": 4, "test_pwc": 4, "test": 4})
    told: list[tuple[str, Path]] = []
    monkeypatch.setattr(demo, "converse_about_text", lambda *asked: bool(told.append(asked)) or True)
    demo.main()
    assert told == [("smollm2-135m", ROOT / "examples" / "conversations.jsonl")]
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["methods"]) == {"shine", "in_context", "only_question"}
    assert all(set(scores) == {"em", "f1"} for scores in report["methods"].values())
    assert report["seconds"] > 0
    assert report["conversations"] is True
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [("cpu-world", "conversations_cpu_world.jsonl"), pytest.param("smollm2-135m", "conversations.jsonl", marks=pytest.mark.slow)],
)
def test_the_last_step_converses(
    checkpoint: str, name: str, demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every question of the file with an answer of each of the three methods: of the CPU world, whose backbone is here, and of
    what the demo shows, whose backbone is fetched."""
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    file = ROOT / "examples" / name
    assert demo.converse_about_text(checkpoint, file) is True
    page = (tmp_path / "conversations.md").read_text(encoding="utf-8")
    questions = [turn["question"] for line in file.read_text().splitlines() for turn in json.loads(line)["turns"]]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    rows = [row for row in rows if row[0] in questions]
    assert [row[0] for row in rows] == questions
    assert all(len(row) == 5 and all(row) for row in rows)


def test_without_a_backbone_the_last_step_is_left_out(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No network and nothing in the cache: it is said, and the demo goes on."""
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setenv("SHINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert demo.converse_about_text("smollm2-135m", ROOT / "examples" / "conversations.jsonl") is False
    assert "left out: " in capsys.readouterr().out
    assert not (tmp_path / "conversations.md").exists()


# --- smollm2-135m ----------------------------------------------------------------------------------------------------------

SMOLLM2 = ASSETS / "smollm2-135m"


@pytest.fixture(scope="module")
def shape_of_smollm2() -> Backbone:
    """SmolLM2-135M without its weights."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    info = read_info("smollm2-135m")
    assert info is not None
    return Backbone(model, targets=info.hypernetwork.targets)


def test_smollm2_ships_within_its_limits(shape_of_smollm2: Backbone) -> None:
    """Below 60 MB, in bfloat16, for the backbone of its name, with a meta LoRA of at most rank 48; every tensor fits."""
    assert sum(file.stat().st_size for file in SMOLLM2.rglob("*") if file.is_file()) < 60e6
    info, weights = read_info("smollm2-135m"), read_weights("smollm2-135m")
    assert info is not None
    assert (info.backbone.path, info.stages[:2]) == ("smollm2-135m", ("pretrain", "mqa"))
    assert info.hypernetwork.meta_rank <= 48
    assert {tensor.dtype for name, tensor in weights.items() if not name.startswith(MEASURED)} == {torch.bfloat16}
    expected = Hypernetwork(info.hypernetwork, shape_of_smollm2).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {name: tensor.shape for name, tensor in expected.items()}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not shape_of_smollm2.misfits(LoRA.load(SMOLLM2 / "reader"))


def test_smollm2_says_what_it_is() -> None:
    """Its card has the scores that lie beside it, each target with reached or missed, and the licence of its data."""
    card, scores = (SMOLLM2 / "README.md").read_text(encoding="utf-8"), json.loads((SMOLLM2 / "scores.json").read_text())
    for source in ("squad", "worlds"):
        for found in scores["answers"]["sources"][source]["methods"].values():
            low, high = found["intervals"]["f1"]
            assert f"{found['f1']:.1f} [{low:.1f}, {high:.1f}]" in card
    methods = {"shine", "shine_other", "in_context", "in_context_tuned", "only_question"}
    assert set(scores["answers"]["sources"]["squad"]["methods"]) == methods
    module = example("smollm2/card.py")
    results = module.Results.read(scores)
    reached = [target.reached for target in module.targets(results)]
    assert len(reached) == 6
    assert ["reached" in line for line in card.splitlines() if line.endswith((" reached |", " **missed** |"))] == reached
    assert "non-commercial research" in (SMOLLM2 / "LICENSE-WEIGHTS").read_text(encoding="utf-8")
    assert "(LICENSE-WEIGHTS)" in card
    assert (SMOLLM2 / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The page is that of these figures, and these are of the weights beside them.
    version = module.Version.read(scores["version"])
    assert version.weights == module.digest_of(SMOLLM2)
    samples = module.samples_drawn(module.read_runs(SMOLLM2 / "training"))
    assert version == results.version(version.weights, rank=version.rank, samples=samples)
    assert module.page(SMOLLM2, results, version) == card


def test_smollm2_was_not_trained_on_what_it_is_scored_on() -> None:
    """No kept recipe draws worlds or stories of a seed that scores are measured on, or reads the unseen articles' part of SQuAD or
    WikiText."""
    module, runs = example("smollm2/lineage.py"), example("smollm2/curves.py").read_runs(SMOLLM2 / "training")
    tested = composed(EvaluationConfig, "test", ["experiment=smollm2", "output=x"]).data.test
    assert f"--seed {module.SCORED_SEEDS[1]} " in (ROOT / "examples" / "smollm2" / "score.sh").read_text()
    assert (tested["worlds"].options["seed"], tested["squad"].split) == (module.SCORED_SEEDS[0], "validation")
    others = composed(EvaluationConfig, "test", ["experiment=smollm2", "sets=passages/other", "output=x"]).data.test
    assert (others["worlds"].options["seed"], others["squad"].split) == (module.SCORED_SEEDS[2], "validation")
    for _, run in runs:
        for source in module.read_recipe(run)["data"].values():
            assert source["kind"] not in ("worlds", "stories") or source["options"].get("seed", 0) not in module.SCORED_SEEDS
            assert source["split"] == "train"
            assert source["kind"] != "wikitext"


@pytest.mark.slow
def test_smollm2_answers_as_its_card_shows() -> None:
    """The example of the card, and unseen worlds, most of which it knows; fetches the backbone."""
    shine = Shine.from_pretrained("smollm2-135m")
    lora = shine.encode("Zoran works as a baker. Umar lives in Selkirk.")
    asked = {"What is the job of Zoran?": "baker", "In which town is the home of Umar?": "Selkirk"}
    assert {question: shine.chat(lora, question) for question in asked} == asked
    right = []
    for example in World(seed=3000).examples(8):
        lora = shine.encode(example.context)
        right += [shine.chat(lora, turn.question).strip() in turn.answers for turn in example.turns]
    assert sum(right) > len(right) / 2


@pytest.mark.slow
def test_smollm2_still_scores_what_its_card_says(tmp_path: Path) -> None:
    """On all unseen worlds; fetches the backbone. A tenth of a point is an answer of 1,000."""
    words = [
        "experiment=smollm2",
        "checkpoint=smollm2-135m",
        "methods=[shine]",
        "sets=worlds",
        "max_new_tokens=24",
        "data.test.worlds.options.count=100",
    ]
    found = evaluate(composed(EvaluationConfig, "test", [*words, f"output={tmp_path}"]))["sources"]["worlds"]["methods"]["shine"]
    kept = json.loads((SMOLLM2 / "scores.json").read_text())["answers"]["sources"]["worlds"]["methods"]["shine"]
    assert found["questions"] == kept["questions"]
    assert found["em"] == pytest.approx(kept["em"], abs=1.5)


# --- how a hypernetwork gets into the package ------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A backbone, the checkpoint of a run beside it with its metrics, and a reader."""
    tiny_model().save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    torch.manual_seed(2)
    config = tiny_hypernetwork_config(m2p=M2PConfig(layers=2, heads=4, feed_forward=48, standardise=True))
    weights = Hypernetwork(config, Backbone(tiny_model())).state_dict()
    told = BackboneConfig(path=str(tmp_path / "backbone"), dtype="float32", device="cpu")
    save_hypernetwork(tmp_path / "run" / "final", weights, CheckpointInfo(told, config, ("pretrain",), context_length=40))
    write_run(tmp_path / "run", stage="1qa")
    starting_lora(Backbone(tiny_model()), rank=2, generator=torch.Generator().manual_seed(0)).save(tmp_path / "reader")
    (tmp_path / "reader" / "training.json").write_text('{"rank": 2}')
    return tmp_path


def write_run(folder: Path, *, stage: str) -> None:
    """What a training run leaves that is kept."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    source = {"kind": "squad", "path": str(folder / "squad"), "limit": 5}
    config = {"stage": {"name": stage}, "seed": 3, "output": str(folder), "data": {"train": {"mine": source}}}
    (folder / "run.json").write_text(json.dumps({"config": config, "versions": {"torch": "2"}}))


def test_what_ships_is_what_was_made(made: Path) -> None:
    """In bfloat16 but for what was measured, under its own name, with the backbone's fingerprint, loadable as any checkpoint."""
    place = made / "assets" / "mine"
    parts = {"backbone": made / "backbone", "reader": made / "reader", "runs": [made / "run"]}
    moved = example("ship.py").ship(made / "run", place, dtype=torch.bfloat16, **parts)
    assert 0 < moved < 0.05
    assert {part.name for part in place.iterdir()} == {"backbone", "hypernetwork", "reader", "training"}
    before, after = read_info(made / "run"), read_info(place / "hypernetwork")
    assert before is not None
    assert after is not None
    assert (after.backbone.path, after.stages, after.context_length) == ("mine", before.stages, 40)
    backbone, tokenizer = load_backbone(BackboneConfig(path=str(place / "backbone"), dtype="float32"), targets=TARGETS)
    assert after.fingerprint == fingerprint(backbone.model, tokenizer)
    old, new = read_weights(made / "run"), read_weights(place / "hypernetwork")
    assert {name for name, tensor in new.items() if tensor.dtype == torch.float32} == {"m2p.standard.mean", "m2p.standard.gain"}
    assert all(torch.equal(tensor, old[name].to(tensor.dtype)) for name, tensor in new.items())
    assert {a.dtype for a, _ in LoRA.load(place / "reader").values()} == {torch.bfloat16}
    kept = place / "training" / "01-1qa"
    assert (kept / "metrics.jsonl").read_text() == (made / "run" / "metrics.jsonl").read_text()
    recipe = json.loads((kept / "recipe.json").read_text())
    assert recipe["data"] == {"mine": {"kind": "squad", "limit": 5}}
    assert (recipe["stage"], recipe["seed"], recipe["versions"]) == ({"name": "1qa"}, 3, {"torch": "2"})
    assert (place / "reader" / "training.json").read_text() == '{"rank": 2}'
    assert not any(str(made) in file.read_text(errors="ignore") for file in place.rglob("*.json") if "backbone" not in file.parts)
    assert Shine.from_pretrained(place / "hypernetwork", backbone=str(place / "backbone")).encode("Abro lives.").rank > 0


def test_shipping_again_goes_on_from_what_is_there(made: Path) -> None:
    """The runs kept in the package are named with the new one; what else is there stays, a reader that is not given goes."""
    place, ship = made / "assets" / "mine", example("ship.py").ship
    ship(made / "run", place, reader=made / "reader", runs=[made / "run"])
    (place / "LICENSE-WEIGHTS").write_text("stays")
    (place / "training" / "01-1qa" / "again.json").write_text("measured later")
    write_run(made / "again", stage="mqa")
    assert ship(made / "run", place, runs=[place / "training" / "01-1qa", made / "again"]) == 0
    assert sorted(run.name for run in (place / "training").iterdir()) == ["01-1qa", "02-mqa"]
    assert (place / "training" / "01-1qa" / "again.json").read_text() == "measured later"
    assert not (place / "reader").exists()
    assert (place / "LICENSE-WEIGHTS").read_text() == "stays"
    assert not list(place.parent.glob("tmp*"))


def test_what_must_not_ship_does_not(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of a run, too large, or moved too far by storing: what was there before is still there."""
    place, module = made / "assets" / "mine", example("ship.py")
    module.ship(made / "run", place)
    kept = (place / "hypernetwork" / "hypernetwork.safetensors").read_bytes()
    (made / "run" / "final").rename(made / "run" / "step-000007")
    with pytest.raises(ValueError, match="step-000007: a step of a run that has not ended"):
        module.ship(made / "run", place)
    (made / "run" / "step-000007").rename(made / "run" / "final")
    monkeypatch.setattr(module, "MOST_ROUNDED", 1e-6)
    with pytest.raises(ValueError, match=r"adapters move by .* of their norm: leave --dtype out"):
        module.ship(made / "run", place, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(ValueError, match="MB are more than the 0 MB"):
        module.ship(made / "run", place)
    assert (place / "hypernetwork" / "hypernetwork.safetensors").read_bytes() == kept
