"""The launch scripts, as users run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_hypernetwork_config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import losses_of, stage_config, train_config

from shine.checkpoint import WEIGHTS_FILE, read_info
from shine.cli.stages import train_and_evaluate
from shine.config import DataConfig, EvaluationConfig, HypernetworkConfig, SourceConfig, TrainConfig
from shine.data.samples import Sample
from shine.manifest import damage
from shine.parsing import parse
from shine.training import loop
from shine.training.monitor import METRICS_FILE
from shine.training.stage import train
from shine.training.state import load_state, step_directories

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*/*.sh"))
CALL = re.compile(r'^(train|evaluate) (.*) "\$@"$', re.MULTILINE)


def test_the_published_scripts_are_there() -> None:
    for size in ("0.6B", "1.7B", "8B"):
        for name in (
            "pretrain_group_4layer_8lora_128metalora",
            "meta_train_parallel_ift_pwc_4layer_8lora_128metalora",
            "meta_train_parallel_ift_c1qa_4layer_8lora_128metalora",
        ):
            assert (ROOT / "scripts" / f"Qwen3-{size}" / f"{name}.sh").exists()
        for name in ("test_pretrain", "test_pwc", "test"):
            assert (ROOT / "scripts" / f"Qwen3-{size}" / f"{name}.sh").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_script_is_posix_sh_and_adds_launching_only(script: Path) -> None:
    """dash reads it, its experiment composes for its size, and no value of the recipe stands in it."""
    subprocess.run(["sh", "-n", script], check=True)
    found = CALL.search(script.read_text())
    assert found is not None
    words = found[2].split()
    size = script.parent.name.removeprefix("Qwen3-").lower()
    if found[1] == "train":
        experiment, stage, name = words
        door, overrides = "train", [f"experiment={experiment}", f"stage={stage}", "output=x"]
    else:
        program, experiment, _, name = words
        door, overrides = program.removesuffix(".py"), [f"experiment={experiment}"]
        assert (ROOT / program).exists()
    assert experiment == f"qwen3-{size}"
    assert name == f"Qwen3-{size.upper()}_4layer_8lora_128metalora"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(door, overrides=overrides), resolve=True)
    config = parse(TrainConfig, values) if door == "train" else parse(EvaluationConfig, values)
    assert config.backbone.path == f"models/Qwen3-{size.upper()}"
    assert (config.hypernetwork.rank, config.hypernetwork.meta_rank, config.hypernetwork.m2p.layers) == (8, 128, 4)
    assert "=" not in found[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the scripts need, in a folder of its own."""
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "test.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def small(backbone: str) -> list[str]:
    """Overrides that make the published recipe a matter of seconds."""
    data = [
        "data=worlds",
        "sets=worlds",
        "data.train.worlds.options.count=40",
        "data.test.worlds.options.count=3",
        f"backbone.path={backbone}",
    ]
    return [*data, "backbone.dtype=float32", "backbone.device=cpu", "hypernetwork.rank=2", "hypernetwork.meta_rank=4"]


STEPS = [
    "data.validation.worlds.options.count=4",
    "stage.steps=2",
    "stage.batch_size=4",
    "stage.evaluate_every=0",
    "stage.log_every=1",
]


def surroundings(**more: str) -> dict[str, str]:
    """The environment of a script: our Python first on the path, no accelerator, one thread a rank."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "NAME": "mine", "PYTHONPATH": str(ROOT), "PATH": path, **more}


@pytest.mark.slow
def test_three_stages_chain_by_folder_through_the_scripts(tiny_backbone_folder: str, clone: Path) -> None:
    """Two ranks under torchrun, then the test beside the last stage."""
    folder = clone / "scripts" / "Qwen3-8B"
    for script in ("pretrain_group", "meta_train_parallel_ift_pwc", "meta_train_parallel_ift_c1qa"):
        command = ["sh", str(folder / f"{script}_4layer_8lora_128metalora.sh"), *small(tiny_backbone_folder), *STEPS]
        run = subprocess.run(command, env=surroundings(GPUS="2"), capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
    info = read_info(clone / "checkpoints" / "mine" / "train")
    assert info is not None
    assert info.stages == ("pretrain", "mqa", "1qa")
    command = ["sh", str(folder / "test.sh"), *small(tiny_backbone_folder), "max_new_tokens=4"]
    run = subprocess.run(command, env=surroundings(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (clone / "checkpoints" / "mine" / "train" / "test" / "summary.json").exists()


@pytest.fixture
def one_node(tiny_backbone_folder: str, clone: Path) -> list[float]:
    """The losses of two ranks on one node."""
    command = ["sh", str(clone / PRETRAIN), *small(tiny_backbone_folder), *STEPS]
    subprocess.run(command, env=surroundings(GPUS="2", NAME="one"), check=True, capture_output=True, timeout=300)
    return losses_of(clone / "checkpoints" / "one" / "pretrain")


PRETRAIN = "scripts/Qwen3-8B/pretrain_group_4layer_8lora_128metalora.sh"


def stand_in(folder: Path, name: str, text: str) -> str:
    """A program of this name, for the front of PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("found", "processes"),
    [
        ({"GPUS": "3", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "5"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "4"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 1),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "gpu:a100:8"}, 8),
        ({}, 6),
    ],
)
def test_as_many_processes_as_gpus(found: dict[str, str], processes: int, tmp_path: Path) -> None:
    """On a node of six GPUs; what was given to this job counts before what is there."""
    path = stand_in(tmp_path / "bin", "torchrun", 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $@"')
    stand_in(tmp_path / "bin", "nvidia-smi", "for gpu in 0 1 2 3 4 5; do echo GPU $gpu; done")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_", "GPUS"))}
    command = ["sh", str(ROOT / PRETRAIN), "stage.steps=1"]
    run = subprocess.run(command, env={**clean, "PATH": path, **found}, capture_output=True, text=True, check=True)
    timeout, *options = run.stdout.split()
    assert timeout == "110", "less than the two minutes that SLURM was asked for"
    assert options[:3] == ["--standalone", "--nproc-per-node", str(processes)]
    assert options[-1] == "stage.steps=1"


def test_a_node_without_nvidia_smi_gets_one_process(tmp_path: Path) -> None:
    """And whoever knows how long the ranks may take to save, says so."""
    path = stand_in(tmp_path / "bin", "torchrun", 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $@"')
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_", "GPUS"))}
    environment = {**clean, "PATH": path, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    run = subprocess.run(["sh", str(ROOT / PRETRAIN)], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("600 --standalone --nproc-per-node 1 train.py ")


@pytest.mark.parametrize("way", ["door", "script"])
def test_cfg_job_shows_what_would_run(way: str, clone: Path) -> None:
    """Once, however many ranks it would be; what is printed is a whole configuration, and nothing runs."""
    shown = ["stage.learning_rate=0.125", "--cfg", "job"]
    wanted = ["experiment=qwen3-8b", "stage=pretrain", "resume=auto"]
    command = ["sh", PRETRAIN] if way == "script" else [sys.executable, "train.py", *wanted, "output=checkpoints/mine/pretrain"]
    run = subprocess.run([*command, *shown], env=surroundings(GPUS="8"), cwd=clone, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    config = parse(TrainConfig, yaml.safe_load(run.stdout))
    assert (config.stage.name, config.stage.learning_rate, config.stage.batch_size) == ("pretrain", 0.125, 32)
    assert (config.backbone.path, config.output, config.resume) == ("models/Qwen3-8B", "checkpoints/mine/pretrain", "auto")
    assert {path.name for path in clone.iterdir()} == {"scripts", "configs", "train.py", "test.py"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_sigterm_lets_all_ranks_finish_the_step(number: signal.Signals, tiny_backbone_folder: str, clone: Path) -> None:
    """Two ranks under torchrun, as a scheduler stops them and starts them again: the run ends as one that was left alone.

    SIGKILL reaches the launcher alone, and the ranks notice that it is gone.
    """
    command = ["sh", str(clone / PRETRAIN), *small(tiny_backbone_folder), *STEPS, "stage.steps=30"]

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=surroundings(GPUS="2", NAME=name), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    whole, stopped = (clone / "checkpoints" / name / "pretrain" for name in ("whole", "stopped"))
    with start("whole") as run:
        errors = run.communicate(timeout=300)[1]
    assert run.returncode == 0, errors
    metrics = stopped / METRICS_FILE
    with start("stopped") as run:
        while run.poll() is None and (not metrics.exists() or not metrics.stat().st_size):
            time.sleep(0.01)
        run.send_signal(number)
        errors = run.communicate(timeout=300)[1]
    assert run.returncode != 0
    [directory] = step_directories(stopped)
    assert damage(directory) is None
    state = load_state(directory)
    assert 0 < state.step < 30
    assert len(state.rng) == 2, "both ranks have saved"
    assert len(losses_of(stopped)) == state.step
    why, passed = ("the launcher is gone", signal.SIGHUP) if number == signal.SIGKILL else (number.name, number)
    # Once each, not from every rank.
    assert errors.count(f"{why}: finishing this step and saving") == 1, errors
    assert errors.count(f"{passed.name}: saved after step {state.step:,} and stopped; resume=latest goes on") == 1, errors
    with start("stopped") as run:
        errors = run.communicate(timeout=300)[1]
    assert run.returncode == 0, errors
    assert losses_of(stopped) == losses_of(whole)
    assert (stopped / "final" / WEIGHTS_FILE).read_bytes() == (whole / "final" / WEIGHTS_FILE).read_bytes()


@pytest.mark.slow
def test_two_nodes_train_what_one_does(tiny_backbone_folder: str, clone: Path, one_node: list[float]) -> None:
    """The same script on each of two nodes, here two launchers on loopback, which NNODES, NODE_RANK and MASTER_* bring together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["sh", str(clone / PRETRAIN), *small(tiny_backbone_folder), *STEPS]
    meeting = {"GPUS": "1", "NAME": "two", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [
        subprocess.Popen(command, env=surroundings(**meeting, NODE_RANK=str(n)), stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    output = clone / "checkpoints" / "two" / "pretrain"
    assert losses_of(output) == pytest.approx(one_node, rel=1e-6)
    assert len(list((output / "logs").glob("rank-*.log"))) == 2


SRUN = """#!/bin/sh
# The command after the options, once on each node, as `srun --ntasks-per-node=1` does; fails if one of them does.
echo "srun $*" >> "$SLURM_SUBMIT_DIR/said"
while case $1 in -*) true ;; *) false ;; esac; do shift; done
SLURM_NODEID=1 SLURM_PROCID=1 "$@" &
SLURM_NODEID=0 SLURM_PROCID=0 "$@" && wait $!
"""
SCONTROL = """#!/bin/sh
# `scontrol show hostnames LIST`: one name a line.
[ "$1 $2 $3" = "show hostnames localhost,other" ] && printf 'localhost\nother\n'
"""


@pytest.mark.slow
def test_slurm_nodes_train_what_one_does(tiny_backbone_folder: str, clone: Path, one_node: list[float]) -> None:
    """SLURM runs a copy of the script that lies elsewhere; the nodes and the port follow from its variables."""
    spool = clone / "spool" / "slurm_script"
    spool.parent.mkdir()
    shutil.copy(clone / PRETRAIN, spool)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (spool.parent / name).write_text(text)
        (spool.parent / name).chmod(0o755)
    environment = surroundings(GPUS="1", NAME="slurm", SLURM_SUBMIT_DIR=str(clone), SLURM_NNODES="2", SLURM_JOB_ID="41234567")
    environment |= {"SLURM_JOB_NODELIST": "localhost,other", "PATH": f"{spool.parent}:{environment['PATH']}"}
    command = ["sh", str(spool), *small(tiny_backbone_folder), *STEPS]
    run = subprocess.run(command, env=environment, cwd=spool.parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    said = (clone / "said").read_text()
    assert said.startswith("srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun --nnodes 2 ")
    assert "--rdzv-endpoint localhost:34567 " in said
    assert losses_of(clone / "checkpoints" / "slurm" / "pretrain") == pytest.approx(one_node, rel=1e-6)


@pytest.mark.slow
def test_a_sweep_is_what_the_docs_say(tmp_path: Path) -> None:
    """The documented command, made short: jobs through submitit's local executor, a folder for each learning rate."""
    text = (ROOT / "docs" / "training.md").read_text()
    command = re.search(r"^python (train\.py --multirun(?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    assert "hydra/launcher=submitit_local" in words
    short = ["stage.steps=1", "stage.batch_size=2", "stage.micro_batch_size=2", "data.train.worlds.options.count=20"]
    run = subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:], *short, "stage.evaluate_every=0"],
        cwd=tmp_path,
        env=surroundings(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rates = next(word for word in words if word.startswith("stage.learning_rate=")).partition("=")[2].split(",")
    runs = {float(file.parent.name): json.loads(file.read_text())["config"] for file in (tmp_path / "outputs").glob("*/*/run.json")}
    assert runs.keys() == {float(rate) for rate in rates}
    assert len(runs) > 1
    assert all(config["stage"]["learning_rate"] == rate for rate, config in runs.items())
    assert len(list((tmp_path / "outputs").glob("*/*/final/config.json"))) == len(rates)
    assert len(list((tmp_path / "outputs" / "sweep" / ".submitit").glob("*/*_result.pkl"))) == len(rates)


@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
@pytest.mark.parametrize("experiment", sorted(file.stem for file in (ROOT / "configs" / "experiment").glob("*.yaml")))
def test_every_experiment_goes_once_through(
    experiment: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its own ranks, lengths and recipe; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SHINE_CACHE", str(tmp_path / "cache"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = [
            f"experiment={experiment}",
            f"stage={stage}",
            "output=out",
            "dry_run=true",
            "evaluate_at_end=true",
            "backbone.device=cpu",
        ]
        values: Any = OmegaConf.to_container(compose("train", overrides=overrides), resolve=True)
    config = parse(TrainConfig, values)
    train_and_evaluate(config)
    said = capsys.readouterr().out
    assert "dry run: everything fits together, one step was done" in said
    assert f"{stage} backbone 1/1  loss" in said
    assert "validation/adapter_effective_rank" in said
    assert said.count("so that invented worlds stand in") == (experiment != "cpu_world")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_looks_at_what_it_would_start_from(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that is missing or damaged, one of other task tokens, a step that is not there; its shape is rehearsed."""
    final = train(train_config(tiny_backbone_folder, tmp_path / "first", stage=stage_config("pretrain", steps=1)))
    dry = train_config("no-backbone", tmp_path / "out", dry_run=True, hypernetwork=HypernetworkConfig(), stage=stage_config())
    with pytest.raises(ValueError, match="/no/such/checkpoint: no such checkpoint directory"):
        train(replace(dry, checkpoint="/no/such/checkpoint"))
    with pytest.raises(ValueError, match="step-000001: not a whole step directory"):
        train(replace(dry, resume=str(tmp_path / "step-000001")))
    other = replace(dry.backbone, task_tokens=replace(dry.backbone.task_tokens, reconstruct="<OTHER>"))
    with pytest.raises(ValueError, match=r"trained with other backbone\.task_tokens"):
        train(replace(dry, checkpoint=str(tmp_path / "first"), backbone=other))

    def trained(config: TrainConfig) -> str:
        capsys.readouterr()
        train(config)
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters: ")]
        return line

    shaped = trained(replace(dry, checkpoint=str(tmp_path / "first")))
    assert shaped == trained(replace(dry, hypernetwork=tiny_hypernetwork_config()))
    assert shaped != trained(dry)
    weights = final / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"hypernetwork\.safetensors: cannot be read"):
        train(replace(dry, checkpoint=str(tmp_path / "first")))


def test_a_dry_run_takes_what_data_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says in one line what it made up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    row = {"context": "Zoran works as a baker.", "turns": [{"question": "What is the job of Zoran?", "answers": ["baker"]}]}
    (tmp_path / "mine.jsonl").write_text((json.dumps(row) + "\n") * 3)
    seen: list[set[str]] = []
    real = loop.training_step

    def training_step(model: Any, backbone: Any, samples: list[Sample], **options: Any) -> Any:
        seen.append({sample.id.split(":")[0] for sample in samples})
        return real(model, backbone, samples, **options)

    monkeypatch.setattr(loop, "training_step", training_step)
    mine = SourceConfig(kind="jsonl", path=str(tmp_path / "mine.jsonl"))
    gone = [SourceConfig(kind="jsonl", path=str(tmp_path / f"{name}.jsonl")) for name in ("one", "two")]
    config = train_config("no-backbone", tmp_path / "out", dry_run=True, stage=stage_config())
    train_and_evaluate(replace(config, data=DataConfig(train={"mine": mine}, validation={"one": gone[0], "two": gone[1]})))
    said = capsys.readouterr().out
    assert "3 samples of mine" in said
    [line] = [line for line in said.splitlines() if "invented worlds" in line]
    assert line == (
        "dry run: not on this machine, so that invented worlds stand in: "
        f"data.validation.one ({gone[0].path}), data.validation.two ({gone[1].path})"
    )
    assert len(seen) == 1
    assert not any(name.startswith("world") for name in seen[0])
    train_and_evaluate(replace(config, data=DataConfig(train={"mine": mine}, validation={"mine": mine})))
    assert "invented" not in capsys.readouterr().out
