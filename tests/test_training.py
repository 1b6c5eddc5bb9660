"""The training loop: golden losses, stages that chain, what is measured and said, bad input."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_tokenizer
from runs import GOLDEN, WORLDS, losses_of, stage_config, train_config
from safetensors.torch import load_file

from shine.backbone import Backbone
from shine.checkpoint import load_hypernetwork, read_info, read_weights
from shine.config import BackboneConfig, DataConfig, HypernetworkConfig, M2PConfig, SourceConfig, TaskTokens, TrainConfig
from shine.data.batching import Batch, collate
from shine.data.build import samples_of
from shine.data.sources import read_source
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone
from shine.parsing import parse
from shine.released import read_released
from shine.training.losses import label_losses, losses_under
from shine.training.monitor import METRICS_FILE
from shine.training.stage import train
from shine.training.start import MEASURED_CONTEXTS
from shine.training.state import step_directories


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
        ({"hypernetwork": tiny_hypernetwork_config(rank=3)}, r"hypernetwork\.rank: 2 -> 3"),
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
    with pytest.raises(ValueError, match=r"holds another run: choose another folder, or delete it$"):
        train(config)
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_qa_stage_without_a_checkpoint_is_refused(tiny_backbone_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: missing; stage mqa .*from_scratch=true"):
        train(train_config(tiny_backbone_folder, tmp_path, from_scratch=False))


def test_other_task_tokens_than_those_of_the_checkpoint_are_refused(tiny_backbone_folder: str, tmp_path: Path) -> None:
    final = train(train_config(tiny_backbone_folder, tmp_path / "first", stage=stage_config(steps=1)))
    swapped = BackboneConfig(path=tiny_backbone_folder, dtype="float32", task_tokens=TaskTokens("<COMP>", "<RECON>", "<NOTHING>"))
    with pytest.raises(ValueError, match=r"was trained on backbone .* with backbone\.task_tokens"):
        train(train_config(tiny_backbone_folder, tmp_path / "second", checkpoint=str(final), backbone=swapped))


def test_stages_chain_and_remember(tiny_backbone_folder: str, tmp_path: Path) -> None:
    short = {"steps": 2, "evaluate_every": 2}
    train(train_config(tiny_backbone_folder, tmp_path / "pretrain", stage=stage_config("pretrain", **short)))
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


def test_a_stage_starts_from_the_weights_of_its_checkpoint(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate of nothing the second stage ends with the weights that the first one ended with."""
    first = train(train_config(tiny_backbone_folder, tmp_path / "first", stage=stage_config("pretrain", steps=2)))
    still = stage_config("mqa", steps=2, learning_rate=1e-30, weight_decay=0.0)
    other = tiny_hypernetwork_config(rank=3)
    start = {"stage": still, "checkpoint": str(tmp_path / "first"), "hypernetwork": other, "from_scratch": False}
    second = train(train_config(tiny_backbone_folder, tmp_path / "second", **start))
    assert (first / "hypernetwork.safetensors").read_bytes() == (second / "hypernetwork.safetensors").read_bytes()
    said = capsys.readouterr().out
    assert f"hypernetwork: {first} (stages: pretrain)" in said
    assert "the hypernetwork is as it was trained, not as configured" in said
    recorded = json.loads((tmp_path / "second" / "run.json").read_text())["config"]
    assert (recorded["checkpoint"], recorded["hypernetwork"]["rank"]) == (str(first), 2)


def test_a_released_directory_is_a_start_like_any_other(tmp_path: Path) -> None:
    """The published three files through a stage of training, into a directory of ours that says where it came from."""
    fixture = Path(__file__).parent / "fixtures" / "tiny_qwen3"
    backbone = shutil.copytree(fixture / "backbone", tmp_path / "backbone")
    # The fixture's embedding has 96 rows.
    tiny_tokenizer(alphabet=[*string.ascii_letters, *"ĠĊ.?_<>|/"]).save_pretrained(backbone)
    released = tmp_path / "checkpoints" / "mine" / "pretrain" / "checkpoint-epoch-1"
    shutil.copytree(fixture / "reference_checkpoint", released)
    shape = HypernetworkConfig(rank=2, meta_rank=4, m2p=M2PConfig(layers=4, heads=4, feed_forward=64))
    values = {"hypernetwork": shape, "stage": stage_config(steps=2, learning_rate=1e-30, weight_decay=0.0), "from_scratch": False}
    final = train(train_config(str(backbone), tmp_path / "out", checkpoint=str(released.parent), **values))
    info = read_info(final)
    assert info is not None
    assert info.stages == ("released", "mqa")
    ours = load_file(final / "hypernetwork.safetensors")
    for name, tensor in read_released(released).items():
        assert torch.equal(ours[name], tensor), name


def test_epochs_count_the_data(tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seven conversations in batches of two, two and a half times: 8.75 steps, rounded up."""
    data = DataConfig(train={"worlds": replace(WORLDS, options={"count": 7, "seed": 5})})
    stage = stage_config(steps=None, epochs=2.5, batch_size=2)
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage, data=data))
    assert len(losses_of(tmp_path)) == 9
    said = capsys.readouterr()
    assert "7 samples of worlds (2.57 passes over them)" in said.out + said.err


def test_what_was_cut_is_said_while_and_after_training(
    tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token a byte: what is cut can be counted from the text."""
    row = {"context": "Ada is red.", "turns": [{"question": "Who?", "answers": ["Ada"]}]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(train={"mine": SourceConfig(kind="jsonl", path=str(tmp_path / "mine.jsonl"))})
    stage = stage_config(steps=3, batch_size=2, save_every=2, context_length=8, conversation_length=24)
    train(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage, data=data))
    said = capsys.readouterr()
    # <|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAda<|im_end|>\n, marks and bytes one token each.
    dropped = (1 + 5 + 4 + 2) + (1 + 10 + 3 + 2) - 24
    for drawn in (4, 6):
        report = (
            f"mqa, samples drawn: {drawn} samples: {drawn} contexts cut ({drawn * 3} tokens), {drawn} conversations cut "
            f"({drawn * dropped} tokens)"
        )
        assert report in said.out + said.err


def test_validation_measures_what_it_says(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Loss, accuracy and cosine of two sources, each sample alone, against those of the batched measurement."""
    other = SourceConfig(kind="worlds", options={"count": 30, "seed": 7})
    data = DataConfig(train={"worlds": WORLDS}, validation={"first": WORLDS, "second": other})
    stage = stage_config(steps=1, evaluate_every=1, evaluation_batches=3)
    config = train_config(tiny_backbone_folder, tmp_path, stage=stage, data=data, from_scratch=True)
    final = train(config)
    measured = next(
        row for row in map(json.loads, (tmp_path / METRICS_FILE).read_text().splitlines()) if "validation/answers/loss" in row
    )

    backbone, tokenizer = load_backbone(config.backbone, targets=config.hypernetwork.targets)
    hypernetwork = load_hypernetwork(final, backbone)
    mixed = [example for pair in zip(read_source(WORLDS), read_source(other), strict=False) for example in pair][:12]
    samples = samples_of(mixed, tokenizer, stage, task_tokens=TaskTokens(), seed=0)
    losses, right, adapters, batches, loras = [], [], [], [], []
    with torch.no_grad():
        for index in range(12):
            sample = samples.sample(index, epoch=0)
            assert sample is not None
            batch = collate([sample], pad_id=0)
            loss, correct = label_losses(hypernetwork, backbone, batch)
            losses.append(loss)
            right.append(correct)
            lora = hypernetwork(backbone, batch.context_ids, None)
            adapters.append(torch.cat([(a @ b).flatten() for a, b in lora.values()]))
            batches.append(batch)
            loras.append(lora)
        under_another = [losses_under(loras[(index + 1) % 12], backbone, batches[index])[0] for index in range(12)]
    expected = float(torch.cat(losses).mean())
    cosines = [float(torch.cosine_similarity(x, y, dim=0)) for x, y in itertools.combinations(adapters, 2)]
    assert measured["validation/answers/loss"] == pytest.approx(expected, rel=1e-4)
    assert measured["validation/answers/perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert measured["validation/answers/accuracy"] == pytest.approx(float(torch.cat(right).float().mean()), abs=1e-6)
    assert measured["validation/adapter_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    gap = float(torch.cat(under_another).mean()) - expected
    assert abs(gap) > 1e-4
    assert measured["validation/adapter_gap"] == pytest.approx(gap, abs=1e-5)


def test_a_standardising_hypernetwork_measures_its_first_contexts(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """By hand, from the run's own samples; the stage after it goes on with the same measures."""
    shape = tiny_hypernetwork_config(m2p=M2PConfig(layers=2, heads=2, standardise=True))
    config = train_config(
        tiny_backbone_folder, tmp_path / "one", hypernetwork=shape, stage=stage_config(steps=1, learning_rate=1e-12)
    )
    final = train(config)
    backbone, tokenizer = load_backbone(config.backbone, targets=shape.targets)
    torch.manual_seed(config.seed)
    start = Hypernetwork(shape, backbone)
    samples = samples_of(read_source(WORLDS), tokenizer, config.stage, task_tokens=TaskTokens(), seed=0)
    assert len(samples) < MEASURED_CONTEXTS
    with torch.no_grad():
        found = [collate([samples.sample(index, epoch=0)], pad_id=0) for index in range(len(samples))]
        states = torch.cat([start.memory_states(backbone, batch.context_ids, None) for batch in found])
    standard = load_hypernetwork(final, backbone).m2p.standard
    assert standard is not None
    torch.testing.assert_close(standard.mean, states.mean(0), rtol=1e-3, atol=1e-5)
    spread = states.var(0, correction=0).mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(standard.gain, 1 / spread, rtol=1e-3, atol=0)

    second = train(train_config(tiny_backbone_folder, tmp_path / "two", checkpoint=str(final), stage=stage_config("1qa", steps=1)))
    later, earlier = read_weights(second), read_weights(final)
    for name in ("m2p.standard.mean", "m2p.standard.gain"):
        assert torch.equal(later[name], earlier[name])


def test_lengths_are_padded_as_the_stage_says(tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding the same losses, from fewer different shapes."""
    from shine.training import step

    widths: list[int] = []
    real = step.label_losses

    def label_losses(hypernetwork: Any, backbone: Backbone, batch: Batch, *args: Any) -> Any:
        widths.extend((batch.context_ids.shape[1], batch.input_ids.shape[1]))
        return real(hypernetwork, backbone, batch, *args)

    monkeypatch.setattr(step, "label_losses", label_losses)
    train(train_config(tiny_backbone_folder, tmp_path / "tight", stage=stage_config(steps=3)))
    tight = widths.copy()
    widths.clear()
    train(train_config(tiny_backbone_folder, tmp_path / "padded", stage=stage_config(steps=3, pad_to_multiple=64)))
    assert widths == [-(-width // 64) * 64 for width in tight]
    assert losses_of(tmp_path / "padded") == pytest.approx(losses_of(tmp_path / "tight"), rel=1e-5)


def test_a_run_that_never_got_anywhere_does_not_lock_its_folder(tiny_backbone_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"raise stage\.conversation_length"):
        train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(conversation_length=5)))
    train(train_config(tiny_backbone_folder, tmp_path, stage=stage_config(steps=1)))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"checkpoint": "nowhere"}, "nowhere: no such checkpoint directory"),
        ({"resume": "latest"}, "start afresh with resume=auto"),
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


def test_a_run_reads_a_context_once_for_the_questions_that_share_it(
    tiny_backbone_folder: str, tmp_path: Path, contexts_read: list[int]
) -> None:
    for shared in (1, 4):
        contexts_read.clear()
        stage = stage_config("1qa", steps=6, batch_size=4, micro_batch_size=4, conversations_per_context=shared)
        train(train_config(tiny_backbone_folder, tmp_path / str(shared), stage=stage))
        # Invented worlds have more than four questions, and a batch is one context's but at the end of an example.
        assert len(contexts_read) == 6
        assert sum(contexts_read) > 6 * 3 if shared == 1 else sum(contexts_read) < 6 * 2.5, contexts_read
