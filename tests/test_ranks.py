"""Several gloo ranks train what one process trains, and agree on what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sharded_memory
import torch
from conftest import tiny_hypernetwork_config
from processes import (
    Fault,
    call_on_ranks,
    error_file,
    free_port,
    run_ranks,
    start_ranks,
    wait_for_a_directory_being_written,
    wait_for_progress,
)
from runs import WORLDS, losses_of, stage_config, train_config
from safetensors.torch import load_file

from shine.checkpoint import WEIGHTS_FILE
from shine.config import BackboneConfig, DataConfig, M2PConfig, PromptConfig, ScoringConfig
from shine.manifest import damage
from shine.training.distributed import join_ranks
from shine.training.monitor import METRICS_FILE
from shine.training.stage import train
from shine.training.state import load_state, step_directories


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", 1e-9), ("float32", 1e-5)],
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_train_what_one_trains(size: int, dtype: Any, tolerance: float, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Twenty steps; every rank draws random weights of its own and must end with those of rank 0 all the same."""
    values = {
        "backbone": BackboneConfig(path=tiny_backbone_folder, dtype=dtype, device="cpu"),
        # Each rank measures states under random weights of its own.
        "hypernetwork": tiny_hypernetwork_config(m2p=M2PConfig(layers=2, heads=2, standardise=True)),
        # Put together by length too: the order is the same for any number of ranks. At five times the rate Adam turns the
        # rounding of one gradient near zero into 1.2e-5 of a float32 weight.
        "stage": stage_config("mqa", micro_batch_size=1, save_every=10, check_every=5, length_window=4, learning_rate=1e-3),
    }
    assert run_ranks(size, tiny_backbone_folder, tmp_path / "many", own_seeds=True, exact=True, **values) == [0] * size
    train(train_config(tiny_backbone_folder, tmp_path / "one", **values))
    assert losses_of(tmp_path / "many") == pytest.approx(losses_of(tmp_path / "one"), rel=tolerance)
    assert_same_weights(tmp_path / "many", tmp_path / "one", tolerance=tolerance)


@pytest.mark.usefixtures("exact_norms")
def test_sharded_trainables_train_what_whole_ones_do(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """FSDP2: the same losses and weights; what two sharding ranks saved, one rank without sharding goes on from."""
    values = {
        "backbone": BackboneConfig(path=tiny_backbone_folder, dtype="float64", device="cpu", activation_checkpointing=True),
        "hypernetwork": tiny_hypernetwork_config(m2p=M2PConfig(layers=2, heads=2, standardise=True)),
        "stage": stage_config("mqa", micro_batch_size=1, save_every=10, evaluate_every=5),
    }
    train(train_config(tiny_backbone_folder, tmp_path / "one", **values))
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "parts", own_seeds=True, engine="fsdp", exact=True, **values) == [0, 0]
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-9)
    assert_same_weights(tmp_path / "parts", tmp_path / "one", tolerance=1e-9)
    (tmp_path / "parts" / "final" / WEIGHTS_FILE).unlink()
    train(train_config(tiny_backbone_folder, tmp_path / "parts", resume="latest", **values))
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-9)
    assert_same_weights(tmp_path / "parts", tmp_path / "one", tolerance=1e-9)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_sharded_backbone_trains_what_a_whole_one_does(
    engine: str, checkpointing: bool, tiny_backbone_folder: str, tmp_path: Path
) -> None:
    """Passes for training, for validation and for the answers that are shown."""
    held = BackboneConfig(path=tiny_backbone_folder, dtype="float64", device="cpu", activation_checkpointing=checkpointing)
    stage = stage_config("mqa", micro_batch_size=1, steps=6, evaluate_every=3, evaluation_batches=1)
    train(train_config(tiny_backbone_folder, tmp_path / "one", backbone=held, stage=stage))
    parts = {"backbone": replace(held, shard=True), "stage": stage, "engine": engine}
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "parts", exact=True, **parts) == [0, 0]
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-9)
    assert_same_weights(tmp_path / "parts", tmp_path / "one", tolerance=1e-9)
    assert (tmp_path / "parts" / "samples.jsonl").read_text() == (tmp_path / "one" / "samples.jsonl").read_text()


def test_what_a_sharded_backbone_takes_is_what_was_said(tmp_path: Path) -> None:
    """The bytes of FSDP2's own tensors, at rest and at most in both passes, on each of two ranks."""
    assert call_on_ranks(2, sharded_memory.count, tmp_path) == [0, 0]
    for rank in range(2):
        row = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert row["said"]["rest"] == pytest.approx(row["counted"]["rest"], rel=0.01)
        assert row["said"]["most"] == pytest.approx(row["counted"]["most"], rel=0.05)
        assert row["said"]["most"] - row["said"]["rest"] == 2 * row["layer"]
        assert row["counted"]["most"] < row["whole"]


def test_two_ranks_rehearse_what_they_would_train(tmp_path: Path) -> None:
    """Each on its own tiny backbone, with the trainables in parts."""
    assert run_ranks(2, "no-backbone", tmp_path / "run", dry_run=True, engine="fsdp") == [0, 0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("where", "engine"), [("loss", "ddp"), ("gradient", "ddp"), ("loss", "fsdp")])
def test_a_bad_number_on_one_rank_skips_the_step_on_both(
    where: Any, engine: str, tiny_backbone_folder: str, tmp_path: Path
) -> None:
    """Two micro-batches a rank and step: the third of rank 1 belongs to step 2. The next steps go on as if it had not been."""
    changes = {"stage": stage_config("mqa", micro_batch_size=1, steps=5), "engine": engine}
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "bad", fault=Fault(where, call=3), **changes) == [0, 0]
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "good", **changes) == [0, 0]
    bad, good = losses_of(tmp_path / "bad"), losses_of(tmp_path / "good")
    assert [index for index, loss in enumerate(bad) if not math.isfinite(loss)] == ([1] if where == "loss" else [])
    # float32: sums depend on where tensors lie in memory.
    assert bad[0] == pytest.approx(good[0], rel=1e-6)
    assert all(math.isfinite(loss) for loss in bad[2:])
    row = (tmp_path / "bad" / "bad_steps.jsonl").read_text()
    assert '"step": 2' in row
    assert '"samples": ["world-' in row
    assert not (tmp_path / "good" / "bad_steps.jsonl").exists()


def test_ranks_evaluate_what_they_trained(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Training and evaluation in one process of each rank: they meet once."""
    data = DataConfig(train={"worlds": WORLDS}, test={"worlds": replace(WORLDS, options={"count": 3, "seed": 7})})
    stage = stage_config("1qa", micro_batch_size=1, steps=2)
    scoring = ScoringConfig(prompts=PromptConfig(system="Be brief.", in_context="{context}\n{question}"), max_new_tokens=2)
    changes = {"stage": stage, "data": data, "evaluate_at_end": True, "scoring": scoring}
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "run", **changes) == [0, 0]
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert set(summary["sources"]) == {"worlds"}
    # Started again after a death in the evaluation, the run is not trained again and is evaluated to its end.
    (tmp_path / "run" / "evaluation" / "summary.json").unlink()
    before = (tmp_path / "run" / METRICS_FILE).read_bytes()
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "run", resume="auto", **changes) == [0, 0]
    assert json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())["sources"] == summary["sources"]
    assert (tmp_path / "run" / METRICS_FILE).read_bytes() == before


@pytest.mark.parametrize("where", ["validation", "norm"])
def test_what_one_rank_measures_otherwise_parts_none(where: Any, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Which checkpoint is the best, and which step is a spike, is rank 0's to say: the runs with and without are the same."""
    stage = stage_config(
        "mqa", micro_batch_size=1, steps=8, evaluate_every=2, evaluation_batches=1, check_every=1, spike_factor=50.0, spike_window=2
    )
    changes = {"stage": stage, "engine": "fsdp" if where == "validation" else "ddp"}
    for name, fault in (("odd", Fault(where, call=2)), ("even", None)):
        assert run_ranks(2, tiny_backbone_folder, tmp_path / name, fault=fault, **changes) == [0, 0]
    odd, even = tmp_path / "odd", tmp_path / "even"
    assert losses_of(odd) == losses_of(even)
    assert len({best.name for best in even.glob("best-*")}) == 1
    assert [best.name for best in odd.glob("best-*")] == [best.name for best in even.glob("best-*")]
    assert_same_weights(odd, even, tolerance=0.0)


def take_turns(output: Path, machines: list[list[int]], failing: int | None) -> None:
    """A rank on one of several machines goes through a block of its own."""
    rank = int(os.environ["RANK"])
    [mine] = [machine for machine in machines if rank in machine]
    os.environ |= {"LOCAL_RANK": str(mine.index(rank)), "LOCAL_WORLD_SIZE": str(len(mine))}
    with join_ranks("cpu") as ranks:
        try:
            with ranks.one_by_one():
                began = time.monotonic()
                if rank == failing:
                    raise ValueError(f"rank {rank} has no backbone")
                time.sleep(0.1)
        except ValueError as error:
            (output / f"rank-{rank}.err").write_text(str(error))
            raise
        (output / f"rank-{rank}.json").write_text(json.dumps(began))


def test_machines_of_unequal_size_take_turns(tmp_path: Path) -> None:
    """Three ranks on one, one on another: nobody waits for ever, and on one machine no two are in the block at once."""
    machines = [[0, 1, 2], [3]]
    assert call_on_ranks(4, take_turns, tmp_path, machines, None) == [0] * 4
    entered = sorted(json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in machines[0])
    assert all(later - earlier >= 0.1 for earlier, later in itertools.pairwise(entered))


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_what_one_rank_is_refused_in_its_turn_ends_all(failing: int, tmp_path: Path) -> None:
    assert call_on_ranks(4, take_turns, tmp_path, [[0, 1, 2], [3]], failing) == [1] * 4
    assert [file.read_text() for file in tmp_path.glob("rank-*.err")] == [f"rank {failing} has no backbone"] * 4


def leave_early(way: str) -> None:
    """Rank 1 dies of an error while rank 0 waits for it in a collective."""
    with join_ranks("cpu") as ranks:
        if ranks.rank == 1:
            raise MemoryError(way)
        ranks.wait()


def test_a_rank_with_an_error_leaves_at_once() -> None:
    started = time.monotonic()
    assert call_on_ranks(2, leave_early, "gone") == [1, 1]
    assert time.monotonic() - started < 30


def test_what_the_first_rank_refuses_all_refuse(tiny_backbone_folder: str, tmp_path: Path) -> None:
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "run", from_scratch=False) == [1, 1]
    for rank in range(2):
        error = error_file(tmp_path / "run", rank).read_text().strip().splitlines()[-1]
        assert error.startswith(
            "shine.training.distributed.SharedRefusalError: checkpoint: missing; stage mqa starts from the stage before it"
        ), error


@pytest.mark.parametrize(
    "where", ["look_into", "effective_config", "load_backbone", "build_samples", "Validation", "load_state", "Monitor"]
)
def test_what_one_rank_refuses_all_refuse(where: Any, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Wherever rank 1 alone meets it while the run is set up: neither waits, and both end with the one message."""
    stage = stage_config(micro_batch_size=1, steps=2, save_every=1)
    if where == "load_state":
        assert run_ranks(2, tiny_backbone_folder, tmp_path / "run", stage=stage) == [0, 0]
    resume = "latest" if where == "load_state" else None
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "run", stage=stage, resume=resume, fault=Fault(where)) == [1, 1]
    errors = [error_file(tmp_path / "run", rank).read_text().strip().splitlines()[-1] for rank in range(2)]
    assert errors == [f"shine.training.distributed.SharedRefusalError: rank 1 has no {where}"] * 2


def test_a_spoilt_backbone_is_one_message_on_all_ranks(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Met in its turn by the first rank of the machine, through the training itself."""
    spoilt = shutil.copytree(tiny_backbone_folder, tmp_path / "spoilt")
    [weights] = spoilt.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run_ranks(2, str(spoilt), tmp_path / "run") == [1, 1]
    first, second = (error_file(tmp_path / "run", rank).read_text().strip().splitlines()[-1] for rank in range(2))
    assert first.startswith(f"shine.training.distributed.SharedRefusalError: cannot load backbone {spoilt}: ")
    assert second == first


def test_ranks_that_drift_apart_are_noticed(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config("mqa", micro_batch_size=1, check_every=2)
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "run", stage=stage, fault=Fault("weight", call=5)) == [1, 1]
    for rank in range(2):
        error = error_file(tmp_path / "run", rank).read_text()
        assert "after step 4 the ranks hold different values of 1 parameters, memory_tokens among them" in error


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_ranks(before: int, after: int, tiny_backbone_folder: str, tmp_path: Path) -> None:
    values = {
        "backbone": BackboneConfig(path=tiny_backbone_folder, dtype="float64", device="cpu"),
        "stage": stage_config("mqa", micro_batch_size=1, save_every=8),
    }
    train(train_config(tiny_backbone_folder, tmp_path / "whole", **values))
    assert run_ranks(before, tiny_backbone_folder, tmp_path / "parts", exact=True, **values) == [0] * before
    go_back_to_a_save(tmp_path / "parts", step=8)
    resumed = {"resume": "latest", "own_seeds": True, "exact": True, **values}
    assert run_ranks(after, tiny_backbone_folder, tmp_path / "parts", **resumed) == [0] * after
    assert f"changed: ranks: {before} -> {after}" in (tmp_path / "parts" / "logs" / "rank-0.log").read_text()
    assert len(load_state(tmp_path / "parts" / "step-000016").rng) == after
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-9)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole", tolerance=1e-9)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("before", ["ddp", "fsdp"])
def test_sharded_trainables_go_on_from_a_save(before: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"stage": stage_config("mqa", micro_batch_size=1, save_every=8)}
    values["backbone"] = BackboneConfig(path=tiny_backbone_folder, dtype="float64", device="cpu")
    train(train_config(tiny_backbone_folder, tmp_path / "whole", **values))
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "parts", engine=before, exact=True, **values) == [0, 0]
    go_back_to_a_save(tmp_path / "parts", step=8)
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "parts", resume="latest", engine="fsdp", exact=True, **values) == [0, 0]
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-9)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole", tolerance=1e-9)


def test_every_rank_goes_on_with_its_own_random_numbers(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Ranks of different seeds, the second of which draws in every pass: after a resume each stands where it would have stood."""
    values: dict[str, Any] = {"stage": stage_config("mqa", micro_batch_size=1, save_every=8, keep=3)}
    values |= {"own_seeds": True, "fault": Fault("draws", call=1)}
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "whole", **values) == [0, 0]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    go_back_to_a_save(tmp_path / "parts", step=8)
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "parts", resume="latest", **values) == [0, 0]
    earlier, whole, parts = (
        load_state(tmp_path / run).rng for run in ("whole/step-000008", "whole/step-000016", "parts/step-000016")
    )
    for rank in range(2):
        assert whole[rank]["python"] == parts[rank]["python"]
        assert torch.equal(whole[rank]["torch"], parts[rank]["torch"])
        assert torch.equal(whole[rank]["torch"], earlier[rank]["torch"]) == (rank == 0)
    assert whole[0]["python"] != whole[1]["python"]
    assert not torch.equal(whole[0]["torch"], whole[1]["torch"])


def go_back_to_a_save(output: Path, *, step: int) -> None:
    """Make a run look as if it had been killed after this save and before the next."""
    shutil.rmtree(output / "final")
    for directory in step_directories(output):
        if int(directory.name.removeprefix("step-")) > step:
            shutil.rmtree(directory)
    assert step_directories(output)[-1].name == f"step-{step:06d}"


@pytest.mark.slow
def test_two_ranks_killed_again_and_again_train_what_they_would_have(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """SIGKILL to one rank, the other, or both, every second time while rank 0 is saving; what is left goes down by itself."""
    rng = random.Random(6)
    stage = stage_config(micro_batch_size=1, steps=150, save_every=3, length_window=4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_ranks(2, tiny_backbone_folder, whole, stage=stage) == [0, 0]
    for number in range(6):
        ranks = start_ranks(2, tiny_backbone_folder, killed, stage=stage, resume="auto")
        wait_for_progress(killed, ranks[0])
        if number % 2:
            wait_for_a_directory_being_written(killed, ranks[0])
        else:
            time.sleep(rng.uniform(0, 0.5))
        assert all(process.is_alive() for process in ranks), "the run was over before it could be killed: give it more steps"
        for process in ([ranks[0]], [ranks[1]], ranks)[number // 2]:
            process.kill()
        for process in ranks:
            process.join(timeout=60)
        assert all(process.exitcode not in (None, 0) for process in ranks), "a rank goes on alone"
        assert [damage(directory) for directory in step_directories(killed)] == [None] * len(step_directories(killed))
    assert run_ranks(2, tiny_backbone_folder, killed, stage=stage, resume="auto") == [0, 0]
    assert losses_of(killed) == losses_of(whole)
    assert (killed / "final" / WEIGHTS_FILE).read_bytes() == (whole / "final" / WEIGHTS_FILE).read_bytes()


def assert_same_weights(first: Path, second: Path, *, tolerance: float) -> None:
    """The final checkpoints of two runs agree to what summation order leaves open."""
    two, one = (load_file(run / "final" / WEIGHTS_FILE) for run in (first, second))
    for name, tensor in one.items():
        if name.endswith("qkv.bias") and tensor.element_size() == 4:
            # The gradient of a key bias is zero in exact arithmetic; Adam turns its rounding into steps.
            third = tensor.shape[0] // 3
            tensor[third : 2 * third] = two[name][third : 2 * third]
        largest = float(tensor.abs().max())
        assert float((tensor - two[name]).abs().max()) <= tolerance * max(largest, 1.0), name


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    """Before a backbone is looked for."""
    stage = stage_config(batch_size=3, micro_batch_size=1)
    assert run_ranks(2, "nowhere", tmp_path / "run", stage=stage) == [1, 1]
    assert "must be a multiple of ranks x micro_batch_size = 2 x 1" in error_file(tmp_path / "run", 0).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["raise", "kill"])
def test_a_rank_that_dies_takes_the_others_down(way: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Under torchrun, as users start it: within a minute, with the error of the rank that died."""
    script = Path(__file__).parent / "dying_rank.py"
    started = time.monotonic()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run([*launch, tiny_backbone_folder, str(tmp_path), way], capture_output=True, text=True, timeout=150)
    died = float((tmp_path / "died").read_text())
    assert run.returncode != 0
    assert time.monotonic() - started - died < 60
    assert ("rank 1 has run out of memory" if way == "raise" else "SIGKILL") in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "stay"])
def test_a_rank_that_dies_takes_the_other_node_down(way: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Two launchers, as on two nodes, with a rank each: the rank of the second is killed, or the second launcher itself.

    A rank whose launcher is gone stops as at a signal: both save.
    """
    script = str(Path(__file__).parent / "dying_rank.py")
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = []
    for number in range(2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--node-rank", str(number), *meeting]
        command = [*launch, script, tiny_backbone_folder, str(tmp_path), way]
        nodes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    while not (tmp_path / "died").exists() and nodes[1].poll() is None:
        time.sleep(0.05)
    died = time.monotonic()
    if way == "stay":
        nodes[1].kill()
    errors = [node.communicate(timeout=60)[1] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert time.monotonic() - died < 60
    assert "SIGKILL" in errors[1] or way == "stay"
    assert len(step_directories(tmp_path / "run")) == (way == "stay")
