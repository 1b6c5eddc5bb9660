"""What a run says before it starts and shows while it goes on."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import counted_flops, tiny_hypernetwork_config, tiny_tokenizer
from processes import Fault, run_ranks
from runs import WORLDS, stage_config, train_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shine.backbone import Backbone
from shine.data.batching import collate
from shine.data.build import samples_of
from shine.data.examples import Example
from shine.data.sources import read_source
from shine.flops import training_flops
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone
from shine.training import loop, monitor, needs
from shine.training.losses import label_losses
from shine.training.monitor import METRICS_FILE, SAMPLES_FILE, Monitor
from shine.training.stage import train
from shine.training.validation import Validation


def test_a_run_says_what_it_will_need(tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=1)))
    said = capsys.readouterr().out
    for part in ("parameters: 25,376 trained, 48,400 frozen", "memory of each rank: ", "1 steps of about", "TFLOP/s"):
        assert part in said
    assert "parameters: 25,376 trained" in (tmp_path / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_arithmetic_is_what_torch_counts(checkpointing: bool, make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    """Torch's own counter over a real forward and backward pass.

    Attention is written out for it, and then computed on both sides of the diagonal, of which a causal one needs but one.
    """
    stage = stage_config("mqa", batch_size=1, micro_batch_size=1)
    backbone = make_backbone(activation_checkpointing=checkpointing)
    backbone.model.set_attn_implementation("eager")
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    config = train_config("x", tmp_path, stage=stage)
    samples = samples_of(list(read_source(WORLDS))[:1], tiny_tokenizer(), stage, task_tokens=config.backbone.task_tokens, seed=0)
    found = needs.estimate(config, backbone, hypernetwork, samples, steps=10, ranks=1)
    assert samples.tally.samples == 0, "what is only looked at is not drawn"
    sample = samples.sample(0, epoch=0)
    assert sample is not None
    counted = counted_flops(lambda: label_losses(hypernetwork, backbone, collate([sample], pad_id=0))[0].sum().backward())
    read = len(sample.context_ids) + hypernetwork.memory_tokens.shape[0]
    needless = 6 * 3 * 32 * (read**2 + len(sample.input_ids) ** 2) * (4 / 3 if checkpointing else 1)
    assert found.flops_per_step == pytest.approx(counted - needless, rel=0.03)
    assert found.tokens_per_step == sample.tokens
    assert found.trained == sum(parameter.numel() for parameter in hypernetwork.parameters())
    assert found.weights == found.frozen * 4 + found.trained * 16


def test_a_context_that_is_shared_is_read_once(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    """Two to four questions of each of three contexts, in passes of up to two."""
    backbone = make_backbone()
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    examples = [replace(one, turns=(one.turns * 4)[: 2 + n]) for n, one in enumerate(itertools.islice(read_source(WORLDS), 3))]

    def flops(shared: int) -> float:
        stage = stage_config("1qa", batch_size=shared, micro_batch_size=shared, conversations_per_context=shared)
        config = train_config("x", tmp_path, stage=stage)
        samples = samples_of(examples, tiny_tokenizer(), stage, task_tokens=config.backbone.task_tokens, seed=0)
        assert len(samples) == 2 + 3 + 4
        return needs.estimate(config, backbone, hypernetwork, samples, steps=1, ranks=1).flops_per_step / shared

    def encoding(example: Example) -> float:
        read = len(tiny_tokenizer()(example.context, add_special_tokens=False)["input_ids"])
        return training_flops(backbone, hypernetwork, read=read, answered=0, labels=0)

    mean = sum(encoding(one) * n for n, one in zip((2, 3, 4), examples, strict=True)) / 9
    # One, two and two passes for two, three and four questions.
    assert flops(1) - flops(2) == pytest.approx(mean * (1 - 5 / 9), rel=1e-6)


def test_questions_are_watched_of_all_contexts(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Eight worlds of several questions each, of which eight questions are looked at, from nearly all."""
    stage = stage_config("1qa", batch_size=4, evaluate_every=1, evaluation_batches=2)
    config = train_config(tiny_backbone_folder, tmp_path, stage=stage)
    backbone, tokenizer = load_backbone(config.backbone, targets=config.hypernetwork.targets)
    watched = Validation(config, backbone, tokenizer).sets["answers"]
    assert len(watched) == 8
    assert len({tuple(sample.context_ids) for sample in watched}) >= 6


def test_hours_follow_from_rate_and_ranks() -> None:
    found = needs.Needs(1, 2, "bfloat16", 3, 4, tokens_per_step=100.0, flops_per_step=1e12, steps=3600)
    assert found.hours(rate=1e12, ranks=1, device_type="cuda") == pytest.approx(1 / 0.1)
    assert found.hours(rate=1e12, ranks=8, device_type="cuda") == pytest.approx(1 / 0.8)
    assert found.flops_per_token == pytest.approx(1e10)
    assert "about 10.0 h on 1 x 1 TFLOP/s, if a step reaches 10%" in found.describe(rate=1e12, ranks=1, device_type="cuda")


@pytest.mark.parametrize(
    ("ranks", "engine", "ways"),
    [
        (1, "ddp", "stage.micro_batch_size below 2, more ranks with engine=fsdp and backbone.shard=true"),
        (2, "ddp", "stage.micro_batch_size below 2, engine=fsdp, backbone.shard=true"),
        (2, "fsdp", "stage.micro_batch_size below 2, backbone.shard=true"),
    ],
)
def test_what_will_not_fit_is_said_with_what_would(ranks: int, engine: str, ways: str, tmp_path: Path) -> None:
    found = needs.Needs(
        1, 2, "float32", weights=60 * 10**9, activations=30 * 10**9, tokens_per_step=1.0, flops_per_step=1.0, steps=1
    )
    config = train_config("x", tmp_path, engine=engine)
    config = replace(config, backbone=replace(config.backbone, activation_checkpointing=True))
    assert found.warning(room=90 * 10**9, config=config, ranks=ranks) is None
    said = "this may not fit: 90.0 GB for each rank, and 80.0 GB is there; less is needed with "
    assert found.warning(room=80 * 10**9, config=config, ranks=ranks) == said + ways


def test_a_run_warns_before_it_starts(
    tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is a tenth of a megabyte, less than the frozen weights; in this machine's memory a tiny model fits."""
    train(train_config(tiny_backbone_folder, tmp_path / "fits", stage=stage_config(steps=1)))
    assert "may not fit" not in capsys.readouterr().out
    monkeypatch.setattr(loop, "room", lambda *_args, **_options: 10**5)
    train(train_config(tiny_backbone_folder, tmp_path / "tight", stage=stage_config(steps=1)))
    assert "less is needed with backbone.activation_checkpointing=true" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "1qa"])
def test_answers_are_shown_at_every_evaluation(stage: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(stage, steps=4, evaluate_every=2)))
    rows = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4}
    sets = {"reconstruct", "complete"} if stage == "pretrain" else {"answers"}
    assert {row["set"] for row in rows} == sets
    for row in rows:
        assert row["right"] not in row["question"] or stage == "pretrain"
        assert row["question"].startswith("user")
        assert row["question"].endswith("assistant")
        assert row["right"]
        assert "<|im_end|>" not in row["right"] + row["answer"]


def test_a_terminal_shows_a_line_for_each_log_step_above_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Monitor(tmp_path, start=0, total=2, title="mqa tiny", rank=0) as shown:
        assert not shown.bar.disable
        shown.advance(tokens=10, loss=1.5)
        shown.record({"loss": 1.5})
    assert "mqa tiny 1/2  loss 1.5  " in capsys.readouterr().out


def test_every_log_step_has_its_scalars(tiny_backbone_folder: str, tmp_path: Path) -> None:
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=3)))
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    wanted = {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_gb", "mfu", "skipped_steps"}
    assert [set(row) for row in rows] == [wanted] * 3
    assert all(0 < row["mfu"] < 1 and row["memory_gb"] > 0.01 for row in rows)


def test_speed_is_that_of_training_alone(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: a step takes a second, an evaluation a hundred, answers ten, a save a thousand."""
    now, tokens = [0.0], [0]

    def lasting(seconds: float, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            now[0] += seconds
            tokens[0] += getattr(result, "tokens", 0)
            return result

        return call

    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "training_step", lasting(1, loop.training_step))
    monkeypatch.setattr(loop, "save_state", lasting(1000, loop.save_state))
    monkeypatch.setattr(loop, "matrix_rate", lasting(50, lambda *_: 1e9))
    monkeypatch.setattr(Validation, "measure", lasting(100, Validation.measure))
    monkeypatch.setattr(Validation, "answers", lasting(10, Validation.answers))
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=6, evaluate_every=2, save_every=3)))
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert now[0] == 6 + 3 * 110 + 1000 + 50
    assert rows[-1]["tokens_per_second"] == pytest.approx(tokens[0] / 6)
    assert {row["step"] for row in rows if "validation/answers/loss" in row} == {2, 4, 6}
    steps = {row["step"]: row for row in rows if "mfu" in row}
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(steps[row["step"]]["tokens_per_second"])
    ratios = [row["mfu"] / row["tokens_per_second"] for row in steps.values()]
    assert ratios == pytest.approx([ratios[0]] * 6)


@pytest.mark.parametrize("stage", ["pretrain", "mqa"])
def test_tensorboard_holds_every_scalar_and_the_answers(stage: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Read back by TensorBoard itself, and equal to the lines of metrics.jsonl, after a resume too."""
    values = {"stage": stage_config(stage, steps=4, evaluate_every=2, evaluation_batches=2, save_every=1, keep=3)}
    train(train_config(tiny_backbone_folder, tmp_path, **values))
    # Done again from the third step on: no step is lost, and none is there twice.
    train(train_config(tiny_backbone_folder, tmp_path, resume=str(tmp_path / "step-000002"), **values))
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    sets = ("reconstruct", "complete") if stage == "pretrain" else ("answers",)
    each_step = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_gb", "mfu", "skipped_steps"}
    each_evaluation = {f"validation/{name}/{what}" for name in sets for what in ("loss", "perplexity", "accuracy")}
    each_evaluation |= {"validation/adapter_gap", "validation/adapter_cosine", "validation/adapter_effective_rank"}
    assert set(board.Tags()["scalars"]) == each_step | each_evaluation
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    for name in each_step | each_evaluation:
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert [event.step for event in board.Scalars(name)] == [step for step, _ in wanted]
        assert [event.value for event in board.Scalars(name)] == pytest.approx([value for _, value in wanted], rel=1e-6)
    assert {event.step for event in board.Scalars("validation/adapter_cosine")} == {2, 4}
    texts = board.Tensors("answers/text_summary")
    # TensorBoard forgets the scalars of steps that are done again, and keeps their texts twice.
    assert sorted({event.step for event in texts}) == [2, 4]
    shown = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    for event in texts:
        table = event.tensor_proto.string_val[0].decode()
        assert table.startswith("| set | id | question | answer | right |")
        assert all(f"| {row['set']} | {row['id']} |" in table for row in shown if row["step"] == event.step)


def test_a_line_says_where_the_run_stands_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor(tmp_path, start=2, total=6, title="mqa x", rank=0) as shown:
        for _ in range(2):
            shown.advance(tokens=100, loss=1.5)
        shown.started -= 10
        shown.record({"loss": 1.5})
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("mqa x 4/6  loss 1.5  ")
    assert line.endswith("10 s left")


def test_every_rank_logs_what_it_dies_of(tiny_backbone_folder: str, tmp_path: Path) -> None:
    stage = stage_config("mqa", micro_batch_size=1, steps=4)
    codes = run_ranks(2, tiny_backbone_folder, tmp_path / "run", stage=stage, fault=Fault("death", call=3))
    assert codes[1] == 1
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert "[rank 1] ended after step 1" in log
    assert "MemoryError: rank 1 has run out of memory" in log
    assert "rank 1 on" in log
    assert "[rank 0]" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert not list((tmp_path / "run").glob("*rank-1*"))


def test_other_ranks_show_nothing_write_a_log_and_leave_no_handler_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, start=0, total=1, title="x", rank=3) as shown:
        shown.say("quiet")
        shown.advance(tokens=1, loss=1.0)
        shown.record({"loss": 1.0})
        shown.record_bad({"reason": "x"})
        shown.show_answers([{"question": "x"}])
        log: Any = shown.log
    assert log.handlers == []
    assert "quiet" in (tmp_path / "logs" / "rank-3.log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("shine.training.rank3") is log
