"""Configurations: what is refused and how it is said, and that everything under configs/ composes and parses."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from shine.config import (
    BackboneConfig,
    EvaluationConfig,
    HypernetworkConfig,
    M2PConfig,
    PromptConfig,
    SourceConfig,
    TaskTokens,
    TrainConfig,
)
from shine.data.sources import READERS
from shine.parsing import parse, unknown_key

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DOORS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "test": EvaluationConfig,
    "test_pretrain": EvaluationConfig,
    "test_pwc": EvaluationConfig,
}
STAGE_OF_TEST = {"test_pretrain": "pretrain", "test_pwc": "mqa", "test": "1qa"}
STAGES = sorted(file.stem for file in (CONFIGS / "stage").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
RECIPES = sorted(str(file.relative_to(CONFIGS / "recipe").with_suffix("")) for file in (CONFIGS / "recipe").glob("*/*.yaml"))

TRAIN: dict[str, Any] = {
    "backbone": {"path": "models/x", "task_tokens": {}},
    "hypernetwork": {"m2p": {}},
    "stage": {"name": "mqa", "context_length": 8, "conversation_length": 8, "learning_rate": 1e-3, "warmup_steps": 0},
    "data": {"train": {"w": {"kind": "worlds"}}},
    "output": "out",
}
EVALUATION: dict[str, Any] = {**TRAIN, "prompts": {"system": "Answer."}}
MISSING = object()


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted path replaced, or left out."""
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return values


def refusal(kind: type[Any], values: dict[str, Any]) -> list[str]:
    """The lines of the error, one a problem."""
    with pytest.raises(ValueError, match="does not hold") as error:
        parse(kind, values)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


# --- parse -----------------------------------------------------------------------------------------------------------------


def test_values_arrive_with_their_types_and_defaults() -> None:
    config = parse(TrainConfig, changed(TRAIN, "hypernetwork.targets", ["v_proj", "q_proj"]))
    assert config.hypernetwork.targets == ("v_proj", "q_proj")
    assert config.stage.name == "mqa"
    assert config.stage.learning_rate == 1e-3
    assert config.data.train["w"].split == "train"
    assert config.data.train["w"].limit is None
    assert config.checkpoint is None


def test_the_defaults_are_the_published_ones() -> None:
    hypernetwork = HypernetworkConfig()
    assert (hypernetwork.rank, hypernetwork.meta_rank, hypernetwork.layout) == (8, 128, "rl")
    assert hypernetwork.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert hypernetwork.m2p == M2PConfig(layers=4, heads=None, feed_forward=None, layers_first=True)
    assert TaskTokens() == TaskTokens("<RECON>", "<COMP>", "<NOTHING>")


def test_a_configuration_cannot_be_changed() -> None:
    config = parse(TrainConfig, TRAIN)
    with pytest.raises(FrozenInstanceError):
        config.stage.learning_rate = 1.0


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("sede", "seed"),
        ("backbone.pth", "path"),
        ("backbone.task_tokens.reconstrukt", "reconstruct"),
        ("hypernetwork.rnk", "rank"),
        ("hypernetwork.m2p.layer", "layers"),
        ("stage.learning_rat", "learning_rate"),
        ("data.trian", "train"),
        ("data.train.w.splt", "split"),
    ],
)
def test_an_unknown_key_is_named_in_full_with_the_nearest_known_one(path: str, near: str) -> None:
    assert refusal(TrainConfig, changed(TRAIN, path, 1)) == [f"{path}: unknown key; did you mean {near}?"]


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("zzz", ["backbone", "seed"]),
        ("stage.zzz", ["clip", "keep"]),
        ("data.zzz", ["train", "test"]),
        ("data.train.w.zzz", ["kind", "limit"]),
    ],
)
def test_an_unknown_key_like_no_other_gets_the_list(path: str, known: list[str]) -> None:
    (line,) = refusal(TrainConfig, changed(TRAIN, path, 1))
    assert line.startswith(f"{path}: unknown key; known here: ")
    assert set(known) <= set(line.split("known here: ")[1].split(", "))


@pytest.mark.parametrize(
    "path", ["output", "stage", "backbone.path", "stage.name", "stage.learning_rate", "stage.context_length", "data.train.w.kind"]
)
def test_a_missing_key_is_named_in_full(path: str) -> None:
    assert refusal(TrainConfig, changed(TRAIN, path, MISSING)) == [f"{path}: missing; set {path}=..."]


def test_a_value_that_hydra_left_open_is_missing() -> None:
    # What OmegaConf hands over for a mandatory value (`output: ???`) that nobody set.
    assert refusal(TrainConfig, changed(TRAIN, "output", "???")) == ["output: missing; set output=..."]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hypernetwork.rank", "eight"),
        ("hypernetwork.rank", 2.5),
        ("hypernetwork.rank", None),
        ("hypernetwork.m2p.heads", "two"),
        ("hypernetwork.targets", "q_proj"),
        ("stage.learning_rate", "fast"),
        ("stage", None),
        ("stage", 3),
        ("seed", "x"),
        ("backbone.activation_checkpointing", "maybe"),
        ("backbone.path", 3),
        ("data.train", ["w"]),
        ("data.train.w.limit", "all"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_it_is(path: str, value: Any) -> None:
    (line,) = refusal(TrainConfig, changed(TRAIN, path, value))
    assert line.startswith(f"{path}: should be ")
    assert repr(value) in line


@pytest.mark.parametrize(
    ("path", "value", "choices"),
    [
        ("hypernetwork.layout", "rx", ["rl", "lr", "rr", "ll"]),
        ("stage.name", "sft", ["pretrain", "mqa", "1qa"]),
        ("backbone.dtype", "int8", ["bfloat16", "float32", "float64"]),
        ("history", "none", ["own", "gold"]),
        ("methods.1", "oracle", ["shine", "in_context", "only_question"]),
    ],
)
def test_a_value_that_is_no_choice_gets_the_choices(path: str, value: str, choices: list[str]) -> None:
    change = ("methods", ["shine", value]) if path == "methods.1" else (path, value)
    (line,) = refusal(EvaluationConfig, changed(EVALUATION, *change))
    assert line.startswith(f"{path}: ")
    assert all(repr(choice) in line for choice in choices)
    assert repr(value) in line


@pytest.mark.parametrize(("stage", "micro_batch_size", "remedy"), [("mqa", 8, "set it to 1"), ("1qa", 2, "at least as much")])
def test_conversations_share_a_context_where_they_can(stage: str, micro_batch_size: int, remedy: str) -> None:
    values = changed(changed(TRAIN, "stage.name", stage), "stage.conversations_per_context", 4)
    values = changed(changed(values, "stage.batch_size", 8), "stage.micro_batch_size", micro_batch_size)
    (line,) = refusal(TrainConfig, values)
    assert "conversations_per_context=4" in line
    assert remedy in line
    right = changed(changed(values, "stage.name", "1qa"), "stage.micro_batch_size", 4)
    assert parse(TrainConfig, right).stage.conversations_per_context == 4


def test_a_batch_must_be_a_multiple_of_the_micro_batch() -> None:
    values = changed(changed(TRAIN, "stage.batch_size", 6), "stage.micro_batch_size", 4)
    (line,) = refusal(TrainConfig, values)
    assert line.startswith("stage: ")
    assert "batch_size=6" in line
    assert "micro_batch_size=4" in line
    assert parse(TrainConfig, changed(values, "stage.batch_size", 8)).stage.batch_size == 8


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stage.micro_batch_size", 0),
        ("stage.micro_batch_size", -1),
        ("stage.batch_size", 0),
        ("stage.batch_size", -32),
        ("stage.context_length", 0),
        ("stage.conversation_length", -5),
        ("stage.steps", -1),
        ("stage.log_every", -1),
        ("stage.learning_rate", -1e-3),
        ("hypernetwork.rank", 0),
        ("hypernetwork.meta_rank", -2),
        ("hypernetwork.m2p.heads", -2),
        ("hypernetwork.scale", -1.0),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused(path: str, value: float) -> None:
    lines = refusal(TrainConfig, changed(TRAIN, path, value))
    assert path.rsplit(".", 1)[1] in lines[0]
    assert str(value) in lines[0]


def test_every_problem_is_told_at_once() -> None:
    values = changed(changed(changed(TRAIN, "output", MISSING), "stage.nme", 1), "hypernetwork.rank", "x")
    assert sorted(line.split(":")[0] for line in refusal(TrainConfig, values)) == ["hypernetwork.rank", "output", "stage.nme"]


# --- configs/ --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def hydra_here() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def values_of(door: str, *overrides: str) -> dict[str, Any]:
    config = compose(config_name=door, overrides=[*(["output=out"] if door == "train" else []), *overrides])
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return values


def composed(door: str, *overrides: str) -> Any:
    config = parse(DOORS[door], values_of(door, *overrides))
    assert isinstance(config, DOORS[door])
    return config


def groups_of(door: str) -> set[str]:
    """The groups in the door's defaults, those of what it includes too."""
    groups = set()
    for entry in yaml.safe_load((CONFIGS / f"{door}.yaml").read_text()).get("defaults", []):
        if isinstance(entry, dict):
            groups |= {key.removeprefix("override ").split("@")[0] for key in entry}
        elif entry != "_self_" and "@" not in entry:
            # What is put elsewhere by @ has its groups there, under another name.
            groups |= groups_of(entry)
    return groups


CHOICES = [
    (door, group.name, file.stem)
    for door in DOORS
    for group in sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    if group.name in groups_of(door) - {"stage", "recipe", "experiment"}
    for file in sorted(group.glob("*.yaml"))
]


def test_every_folder_of_configs_is_a_group_that_some_door_reads() -> None:
    read = set().union(*map(groups_of, DOORS))
    for file in (CONFIGS / "data").rglob("*.yaml"):
        entries = yaml.safe_load(file.read_text()).get("defaults", [])
        read |= {key.split("@")[0].strip("/").split("/")[0] for entry in entries if isinstance(entry, dict) for key in entry}
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} <= read


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONFIGS / "source").glob("*.yaml")))
def test_every_source_can_be_added_to_a_run_and_says_all_its_keys(name: str) -> None:
    config = composed("train", f"+source@data.train.more={name}", "data.train.more.path=/x/y")
    assert config.data.train["more"].path == "/x/y"
    written = yaml.safe_load((CONFIGS / "source" / f"{name}.yaml").read_text())
    assert set(written) == {field.name for field in fields(SourceConfig)}
    taken = inspect.signature(READERS[written["kind"]]).parameters
    assert set(written["options"]) <= {option.name for option in taken.values() if option.kind is option.KEYWORD_ONLY}


@pytest.mark.parametrize("stage", STAGES)
def test_passages_train_every_stage(stage: str) -> None:
    assert composed("train", f"stage={stage}", f"data=passages/{stage}").data.train


@pytest.mark.parametrize(("door", "group", "choice"), CHOICES)
def test_every_file_of_every_group_composes_for_every_door(door: str, group: str, choice: str) -> None:
    config = composed(door, f"{group}={choice}", *(["backbone.path=mine"] if choice == "custom" else []))
    written = {
        key: value for key, value in yaml.safe_load((CONFIGS / group / f"{choice}.yaml").read_text()).items() if key != "defaults"
    }
    for key, value in written.items():
        if isinstance(value, str | int | float) and "$" not in str(value) and value != "???":
            assert getattr(getattr(config, group), key) == value


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_every_stage_of_every_experiment_composes_for_training(experiment: str | None, stage: str) -> None:
    config = composed("train", f"stage={stage}", *([f"experiment={experiment}"] if experiment else []))
    assert config.stage.name == stage
    assert config.data.train, "an experiment that trains on nothing"
    assert config.stage.epochs > 0 or config.stage.steps


@pytest.mark.parametrize("door", sorted(STAGE_OF_TEST))
@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_every_experiment_composes_for_the_tests_each_with_its_stage(door: str, experiment: str | None) -> None:
    config = composed(door, *([f"experiment={experiment}"] if experiment else []))
    assert config.stage.name == STAGE_OF_TEST[door]
    assert config.data.test, "a test of nothing"
    assert config.methods == ("shine", "in_context", "only_question")


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_training_and_test_agree_on_backbone_hypernetwork_and_context_length(experiment: str | None) -> None:
    chosen = [f"experiment={experiment}"] if experiment else []
    for door, stage in STAGE_OF_TEST.items():
        trained, tested = composed("train", f"stage={stage}", *chosen), composed(door, *chosen)
        assert tested.backbone == trained.backbone
        assert tested.hypernetwork == trained.hypernetwork
        assert tested.stage.context_length == trained.stage.context_length


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_its_stage_its_values(recipe: str) -> None:
    stage = recipe.rsplit("/", 1)[1]
    config = composed("train", f"stage={stage}", f"recipe@stage={recipe}")
    assert config.stage.name == stage
    for key, value in yaml.safe_load((CONFIGS / "recipe" / f"{recipe}.yaml").read_text()).items():
        assert key == "defaults" or getattr(config.stage, key) == value


@pytest.mark.parametrize(
    ("stage", "lengths", "learning_rate", "warmup", "epochs"),
    [("pretrain", (1141, 1150), 5e-5, 200, 1), ("mqa", (1150, 1150), 3e-5, 400, 2), ("1qa", (2380, 100), 1e-5, 400, 1)],
)
def test_without_an_experiment_the_recipe_is_the_published_one(
    stage: str, lengths: tuple[int, int], learning_rate: float, warmup: int, epochs: float
) -> None:
    found = composed("train", f"stage={stage}").stage
    assert (found.context_length, found.conversation_length) == lengths
    assert (found.learning_rate, found.warmup_steps, found.epochs) == (learning_rate, warmup, epochs)
    assert (found.batch_size, found.weight_decay, found.clip, found.steps) == (32, 0.01, 1.0, None)


def test_seeds_of_the_worlds_keep_training_watching_and_testing_apart() -> None:
    data = composed("train", "experiment=cpu_world").data
    seeds = [source.options["seed"] for part in (data.train, data.validation, data.test) for source in part.values()]
    assert len(seeds) >= 3
    assert len(set(seeds)) == len(seeds)


def test_an_override_reaches_the_configuration_and_a_misspelt_one_is_refused() -> None:
    assert composed("train", "stage=mqa", "stage.learning_rate=0.5").stage.learning_rate == 0.5
    # `+` is how Hydra lets any key in: the dataclasses are what stops it.
    values = values_of("train", "+stage.learning_rat=0.5")
    assert refusal(TrainConfig, values) == ["stage.learning_rat: unknown key; did you mean learning_rate?"]


def test_a_door_without_an_output_says_so_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    started: list[TrainConfig] = []
    monkeypatch.setattr(train, "train_and_evaluate", started.append)
    with pytest.raises(SystemExit) as end:
        train.main(compose(config_name="train"))
    assert end.value.code == 2
    assert "output: missing" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("door", DOORS)
def test_hydra_writes_no_log_file_beside_the_program(door: str) -> None:
    logging = compose(config_name=door, return_hydra_config=True).hydra.job_logging
    assert not [handler for handler in logging.get("handlers", {}).values() if "File" in handler["class"]]


def test_data_paths_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHINE_DATA", "/elsewhere")
    paths = [source["path"] for source in values_of("train", "stage=mqa")["data"]["train"].values()]
    assert paths
    assert all(path.startswith("/elsewhere/") for path in paths)


def test_every_command_of_the_readme_composes() -> None:
    """Its Hydra commands, with the placeholders filled in."""
    text = (CONFIGS.parent / "README.md").read_text()
    commands = re.findall(r"^python (train|test_pretrain|test_pwc|test)\.py +(.*?)(?: *#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 10
    for door, overrides in commands:
        filled = re.sub(r"<.*?>", "data", overrides).split()
        config = composed(door, *filled)
        if door == "train" and config.stage.name == "pretrain" and "data.train.transmla.path=data" in filled:
            assert config.data.validation["transmla"].path == "data"


def missing_keys(kind: Any, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields of a configuration class that composed values leave out, down to the sources of the data."""
    missing = []
    for name, hint in get_type_hints(kind).items():
        if name not in values:
            missing.append(prefix + name)
        elif is_dataclass(hint):
            missing += missing_keys(hint, values[name], f"{prefix}{name}.")
        elif get_origin(hint) is Mapping and is_dataclass(get_args(hint)[1]):
            for entry, source in values[name].items():
                missing += missing_keys(get_args(hint)[1], source, f"{prefix}{name}.{entry}.")
    return missing


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
@pytest.mark.parametrize("door", sorted(DOORS))
def test_every_key_can_be_set_on_the_command_line(door: str, experiment: str | None) -> None:
    """Hydra takes an override only of a key that a file names: the files name all that the classes have."""
    stages = STAGES if door == "train" else [None]
    for stage in stages:
        chosen = [*([f"experiment={experiment}"] if experiment else []), *([f"stage={stage}"] if stage else [])]
        assert missing_keys(DOORS[door], values_of(door, *chosen)) == []


@pytest.mark.parametrize("backbone", sorted(file.stem for file in (CONFIGS / "backbone").glob("*.yaml")))
def test_every_backbone_has_every_key(backbone: str) -> None:
    assert missing_keys(BackboneConfig, values_of("train", f"backbone={backbone}", "backbone.path=x")["backbone"]) == []


def test_a_known_key_that_the_files_leave_out_gets_a_remedy_that_works() -> None:
    assert unknown_key(TrainConfig, "stage.steps") == (
        "stage.steps: the chosen configuration files leave this key out; set it with +stage.steps=..."
    )


def test_tokens_and_methods_that_repeat_are_refused() -> None:
    with pytest.raises(ValueError, match="three different tokens"):
        TaskTokens("<a>", "<a>", "<b>")
    with pytest.raises(ValueError, match=r"methods=\['shine', 'shine'\]: .*each once"):
        composed("test", "methods=[shine,shine]")


def test_what_is_downloaded_lies_where_the_configuration_reads_it() -> None:
    catalogue = yaml.safe_load((CONFIGS / "downloads.yaml").read_text())
    folders = {item["folder"] for item in (catalogue["data"] | catalogue["models"]).values()}
    paths = [yaml.safe_load(file.read_text())["path"] for file in (CONFIGS / "source").glob("*.yaml")]
    paths += [yaml.safe_load(file.read_text())["path"] for file in (CONFIGS / "backbone").glob("qwen3*.yaml")]
    read = [path.replace("${oc.env:SHINE_DATA,data}", "data") for path in paths if path not in (None, "???")]
    # WikiText has no licence that would let it train here; it is only measured on, by those who have it.
    missing = [path for path in read if "wikitext" not in path and not any(path.startswith(folder) for folder in folders)]
    assert missing == []


def test_the_prompts_of_an_installed_shine_are_those_of_the_yaml() -> None:
    values = yaml.safe_load((CONFIGS / "prompts" / "default.yaml").read_text())
    assert PromptConfig(**values) == PromptConfig()
