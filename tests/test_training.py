"""The training step and loop: the loss is the same however it is computed, golden losses, resume, ranks, bad input."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_hypernetwork_config, tiny_tokenizer
from torch import Tensor

from shine.backbone import Backbone
from shine.checkpoint import load_hypernetwork, read_info
from shine.config import BackboneConfig, DataConfig, SourceConfig, StageConfig, TaskTokens, TrainConfig, parse
from shine.data.batching import collate
from shine.data.samples import Sample, build_samples
from shine.data.sources import read_source
from shine.hypernetwork import Hypernetwork
from shine.training.distributed import Ranks
from shine.training.guard import NOT_FINITE, Guard
from shine.training.loop import train
from shine.training.monitor import METRICS_FILE
from shine.training.optimizer import build_optimizer, learning_rate
from shine.training.state import step_directories
from shine.training.step import label_losses, training_step

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
WORLDS = SourceConfig(kind="worlds", options={"count": 60, "seed": 5})


def stage_config(name: str = "mqa", **changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": name,
        "context_length": 200,
        "conversation_length": 300,
        "learning_rate": 5e-3,
        "warmup_steps": 3,
        "steps": 20,
        "batch_size": 4,
        "micro_batch_size": 2,
        "log_every": 1,
    }
    return StageConfig(**{**values, **changes})


def train_config(folder: str, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "backbone": BackboneConfig(path=folder, dtype="float32", device="cpu"),
        "hypernetwork": tiny_hypernetwork_config(),
        "stage": stage_config(),
        "data": DataConfig(train={"worlds": WORLDS}, validation={"worlds": replace(WORLDS, options={"count": 8, "seed": 6})}),
        "output": str(output),
        "from_scratch": True,
        "seed": 1,
    }
    return TrainConfig(**{**values, **changes})


def stage_samples(name: str, count: int) -> list[Sample]:
    config = stage_config(name)
    samples = build_samples(read_source(WORLDS), tiny_tokenizer(), config, task_tokens=BackboneConfig(path="x").task_tokens, seed=0)
    found = [samples.sample(index, epoch=0) for index in range(count)]
    return [sample for sample in found if sample is not None]


def gradients_of(
    backbone: Backbone, samples: Sequence[Sample], *, micro_batch_size: int, order: Callable[[Any], Any] = list
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient (clipping far away) of one training step on a fresh hypernetwork."""
    torch.manual_seed(3)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone).to(backbone.dtype)
    for parameter in hypernetwork.meta_lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.SGD(hypernetwork.parameters(), lr=0.0)
    result = training_step(
        hypernetwork,
        backbone,
        order(samples),
        optimizer=optimizer,
        micro_batch_size=micro_batch_size,
        clip=1e9,
        pad_id=0,
        ranks=Ranks(),
        guard=Guard(stage_config()),
    )
    return result.loss, {name: p.grad.clone() for name, p in hypernetwork.named_parameters() if p.grad is not None}


def assert_same(
    first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]], *, tolerance: float = 1e-6
) -> None:
    """Equal up to ``tolerance``: transformers computes norms and rotations in float32 even in a float64 model, and padding
    shifts the positions of a row, so rounding of that size is what equality can mean."""
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert set(first[1]) == set(second[1])
    largest = max(float(gradient.abs().max()) for gradient in first[1].values())
    for name, gradient in first[1].items():
        torch.testing.assert_close(
            gradient, second[1][name], rtol=0.0, atol=tolerance * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
def test_every_parameter_gets_a_gradient(make_backbone: Callable[..., Backbone], stage: str) -> None:
    _, gradients = gradients_of(make_backbone(dtype=torch.float64), stage_samples(stage, 4), micro_batch_size=2)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    assert {"memory_tokens", "m2p.layer_embedding", "meta_lora.layers.0.q_proj.A"} <= set(gradients)


def test_accumulation_changes_nothing(make_backbone: Callable[..., Backbone]) -> None:
    """1 x 6 and 6 x 1 (and 2 x 3): micro-batches of unlike label counts, padded against each other or alone."""
    samples = stage_samples("mqa", 6)
    assert len({sample.label_count for sample in samples}) > 1
    assert len({len(sample.context_ids) for sample in samples}) > 1
    whole = gradients_of(make_backbone(dtype=torch.float64), samples, micro_batch_size=6)
    for micro_batch_size in (1, 2):
        assert_same(whole, gradients_of(make_backbone(dtype=torch.float64), samples, micro_batch_size=micro_batch_size))


def test_padding_changes_nothing(make_backbone: Callable[..., Backbone]) -> None:
    """A sample beside a much longer one, which pads it, gives what it gives alone."""
    short, *others = sorted(stage_samples("mqa", 12), key=lambda sample: sample.tokens)
    long = others[-1]
    backbone = make_backbone(dtype=torch.float64)
    batch = collate([short, long], pad_id=0)
    assert batch.context_mask is not None
    assert batch.input_mask is not None
    alone = [gradients_of(backbone, [sample], micro_batch_size=1) for sample in (short, long)]
    labels = [short.label_count, long.label_count]
    loss, gradients = gradients_of(backbone, [short, long], micro_batch_size=2)
    share = [count / sum(labels) for count in labels]
    expected = {name: share[0] * alone[0][1][name] + share[1] * alone[1][1][name] for name in gradients}
    assert_same((loss, gradients), (share[0] * alone[0][0] + share[1] * alone[1][0], expected), tolerance=1e-5)


def test_activation_checkpointing_changes_nothing(make_backbone: Callable[..., Backbone]) -> None:
    samples = stage_samples("pretrain", 4)
    plain = gradients_of(make_backbone(dtype=torch.float64), samples, micro_batch_size=2)
    recomputed = gradients_of(make_backbone(dtype=torch.float64, activation_checkpointing=True), samples, micro_batch_size=2)
    assert_same(plain, recomputed, tolerance=1e-13)


def test_a_step_is_the_loss_it_says(make_backbone: Callable[..., Backbone]) -> None:
    """The loss is the mean over all labels of the global batch, not the mean of micro-batch means."""
    backbone, samples = make_backbone(), stage_samples("1qa", 4)
    torch.manual_seed(3)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    with torch.no_grad():
        parts = [label_losses(hypernetwork, backbone, collate([sample], pad_id=0))[0] for sample in samples]
    step = training_step(
        hypernetwork,
        backbone,
        samples,
        optimizer=build_optimizer(hypernetwork, stage_config()),
        micro_batch_size=2,
        clip=1.0,
        pad_id=0,
        ranks=Ranks(),
        guard=Guard(stage_config()),
    )
    assert step.loss == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)


def test_a_bfloat16_backbone_trains_float32_parameters(make_backbone: Callable[..., Backbone]) -> None:
    samples = stage_samples("mqa", 4)
    exact, _ = gradients_of(make_backbone(), samples, micro_batch_size=4)
    backbone = make_backbone(dtype=torch.bfloat16)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    batch = collate(samples, pad_id=0)
    losses, _ = label_losses(hypernetwork, backbone, batch)
    losses.sum().backward()
    lora = hypernetwork(backbone, batch.context_ids, batch.context_mask)
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in hypernetwork.parameters()} == {torch.float32}
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in hypernetwork.parameters())
    assert {weight.dtype for pair in lora.values() for weight in pair} == {torch.float32}
    assert losses.dtype == torch.float32
    assert float(losses.detach().mean()) == pytest.approx(exact, rel=0.1)


def test_a_gradient_that_is_not_finite_changes_no_parameter(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    hypernetwork.memory_tokens.data[0, 0] = math.nan
    before = {name: parameter.clone() for name, parameter in hypernetwork.named_parameters()}
    step = training_step(
        hypernetwork,
        backbone,
        stage_samples("mqa", 2),
        optimizer=build_optimizer(hypernetwork, stage_config()),
        micro_batch_size=1,
        clip=1.0,
        pad_id=0,
        ranks=Ranks(),
        guard=Guard(stage_config()),
    )
    assert step.skipped == NOT_FINITE
    for name, parameter in hypernetwork.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    stage = stage_config(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(step, stage=stage, total_steps=12) for step in range(13)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])


def test_norms_and_biases_are_not_decayed(make_backbone: Callable[..., Backbone]) -> None:
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), make_backbone())
    optimizer = build_optimizer(hypernetwork, stage_config(weight_decay=0.3))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in hypernetwork.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name


def losses_of(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def cpu_name() -> str:
    """The processor's own name where the system tells it: two with the same instructions may still sum in another order."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def fingerprint() -> dict[str, str]:
    """What exact equality of floating-point sums depends on."""
    return {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {cpu_name()}",
    }


@pytest.fixture(scope="module")
def recorded_now() -> dict[str, Any]:
    """The golden run of today's code, in a process of its own: sums depend on memory alignment, hence on what ran before."""
    script = Path(__file__).parent / "golden" / "record.py"
    output = subprocess.run([sys.executable, str(script), "--print"], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
def test_golden_losses(stage: str, recorded_now: dict[str, Any]) -> None:
    """Twenty steps of each stage; a refactor must reproduce them."""
    golden = json.loads(GOLDEN.read_text())
    assert len(recorded_now[stage]) == 20
    if golden["versions"] == recorded_now["versions"]:
        assert recorded_now[stage] == golden[stage]
    assert recorded_now[stage] == pytest.approx(golden[stage], rel=1e-4)


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_the_run_that_was_not_stopped(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Stopped after step 14, saved at 12, resumed in the same folder: weights and metrics end as if nothing had happened."""
    stage = stage_config(save_every=6, keep=3)
    whole = train(train_config(tiny_backbone_folder, tmp_path / "whole", stage=stage))
    assert [path.name for path in step_directories(tmp_path / "whole")] == ["step-000006", "step-000012", "step-000018"]

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "final")
    shutil.rmtree(stopped / "step-000018")
    lines = (stopped / METRICS_FILE).read_text().splitlines(keepends=True)
    (stopped / METRICS_FILE).write_text("".join(line for line in lines if json.loads(line)["step"] <= 14))
    resumed = train(train_config(tiny_backbone_folder, stopped, stage=stage, resume="latest"))
    assert losses_of(stopped) == losses_of(tmp_path / "whole")
    assert (whole / "hypernetwork.safetensors").read_bytes() == (resumed / "hypernetwork.safetensors").read_bytes()
    assert read_info(resumed) == read_info(whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage": stage_config("1qa", save_every=1, steps=2)}, r"stage\.name: 'mqa' -> '1qa'"),
        ({"stage": stage_config(save_every=1, steps=2, batch_size=2)}, r"stage\.batch_size: 4 -> 2"),
        ({"stage": stage_config(save_every=1, steps=5)}, r"stage\.steps: 2 -> 5"),
        ({"seed": 8}, r"seed: 1 -> 8"),
    ],
)
def test_a_resume_on_other_terms_is_refused(changes: dict[str, Any], named: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    first = {"stage": stage_config(save_every=1, steps=2)}
    train(train_config(tiny_backbone_folder, tmp_path, **first))
    with pytest.raises(ValueError, match=named):
        train(train_config(tiny_backbone_folder, tmp_path, **{**first, **changes, "resume": "latest"}))


def test_a_fresh_run_does_not_mix_with_another(tiny_backbone_folder: str, tmp_path: Path) -> None:
    config = train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=1))
    train(config)
    before = (tmp_path / METRICS_FILE).read_bytes()
    with pytest.raises(ValueError, match=r"holds another run.*resume=latest"):
        train(config)
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_qa_stage_without_a_checkpoint_is_refused(tiny_backbone_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: missing; stage mqa .*from_scratch=true"):
        train(train_config(tiny_backbone_folder, tmp_path, from_scratch=False))


def test_other_task_tokens_than_those_of_the_checkpoint_are_refused(tiny_backbone_folder: str, tmp_path: Path) -> None:
    final = train(train_config(tiny_backbone_folder, tmp_path / "first", stage=stage_config(steps=1)))
    swapped = BackboneConfig(path=tiny_backbone_folder, dtype="float32", task_tokens=TaskTokens("<COMP>", "<RECON>", "<NOTHING>"))
    with pytest.raises(ValueError, match=r"was trained with backbone\.task_tokens"):
        train(train_config(tiny_backbone_folder, tmp_path / "second", checkpoint=str(final), backbone=swapped))


def test_stages_chain_and_remember(tiny_backbone_folder: str, tmp_path: Path) -> None:
    short = {"steps": 2, "evaluate_every": 2}
    first = train(train_config(tiny_backbone_folder, tmp_path / "pretrain", stage=stage_config("pretrain", **short)))
    start = {"stage": stage_config("mqa", **short), "checkpoint": str(tmp_path / "pretrain")}
    second = train(train_config(tiny_backbone_folder, tmp_path / "mqa", **start))
    info = read_info(second)
    assert info is not None
    assert info.stages == ("pretrain", "mqa")
    rows = [json.loads(line) for line in (tmp_path / "pretrain" / METRICS_FILE).read_text().splitlines()]
    measured = next(row for row in rows if "validation/adapter_cosine" in row)
    assert {"validation/reconstruct/perplexity", "validation/complete/perplexity", "validation/adapter_effective_rank"} <= set(
        measured
    )
    assert -1 <= measured["validation/adapter_cosine"] <= 1.0001
    assert list((tmp_path / "pretrain" / "tensorboard").glob("events*"))
    assert first != second


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"checkpoint": "nowhere"}, "nowhere: no such checkpoint directory"),
        ({"resume": "latest"}, "start without resume"),
        ({"resume": "nowhere"}, "not a whole step directory"),
        ({"data": DataConfig(train={})}, "no sample for stage mqa"),
        ({"data": DataConfig(train={"x": SourceConfig(kind="squad", path="nowhere")})}, "nowhere: no such file or folder"),
        ({"hypernetwork": tiny_hypernetwork_config(rank=17)}, "choose a rank up to 16"),
        ({"stage": stage_config(conversation_length=5)}, "raise stage.conversation_length"),
    ],
)
def test_bad_input_names_the_remedy(changes: dict[str, Any], remedy: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=remedy):
        train(train_config(tiny_backbone_folder, tmp_path, **changes))


def test_a_checkpoint_of_other_ranks_is_refused(
    tiny_backbone_folder: str, tmp_path: Path, make_backbone: Callable[..., Backbone]
) -> None:
    final = train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=1)))
    values = json.loads((final / "config.json").read_text())
    values["hypernetwork"]["rank"] = 3
    (final / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"memory_tokens: has shape \[32, 32\], expected") as error:
        load_hypernetwork(final, make_backbone())
    assert f"it was trained on backbone {tiny_backbone_folder}: set backbone=" in str(error.value)


def test_the_written_configuration_parses_again(tiny_backbone_folder: str, tmp_path: Path) -> None:
    config = train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=1))
    train(config)
    assert parse(TrainConfig, json.loads((tmp_path / "run.json").read_text())["config"]) == config
