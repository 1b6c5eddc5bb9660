"""What a GPU computes is what the CPU computes: adapters, losses and gradients, answers, training, evaluation.

The CPU attends in blocks (`shine.attention`), CUDA by PyTorch's fused kernels; all else differs by the order of sums alone.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, tiny_hypernetwork_config, tiny_model, tiny_tokenizer
from runs import losses_of, stage_config, stage_samples, train_config
from test_evaluation import evaluation_config, write_examples
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shine import LoRA, Shine, attention
from shine import backbone as backbones
from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, read_weights, save_hypernetwork
from shine.config import BackboneConfig, DistillationConfig, TrainConfig
from shine.data.batching import collate, pad_left
from shine.data.samples import Sample
from shine.evaluation.results import PREDICTIONS_FILE
from shine.evaluation.run import evaluate
from shine.hypernetwork import Hypernetwork
from shine.prompt_cache import PromptCache
from shine.training.distillation import Teacher
from shine.training.distributed import Ranks
from shine.training.guard import Guard
from shine.training.monitor import METRICS_FILE
from shine.training.muon import orthogonalised
from shine.training.optimizer import build_optimizer
from shine.training.stage import train
from shine.training.step import training_step

DEVICE = "cuda"
PLACES = ("cpu", DEVICE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10}
"""What another order of sums may change, relative to the largest value."""
CONTEXTS = [list(range(40, 40 + count)) for count in (61, 17, 38, 5)]
QUESTIONS = [list(range(100, 100 + count)) for count in (9, 4, 12, 7)]

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
    # In float64 norms and rotations too; in float32 it changes nothing.
    pytest.mark.usefixtures("exact_norms", "float32_products"),
]


@pytest.fixture
def float32_products() -> Iterator[None]:
    """No TF32, whatever is set elsewhere."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def pair(device: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Backbone, Hypernetwork]:
    """The same weights on any device, as a run holds them there; the meta LoRA changes something."""
    model = tiny_model(dtype=dtype)
    if device != "cpu":
        model.set_attn_implementation(attention.FUSED)
    backbone = Backbone(model, **options)
    torch.manual_seed(3)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    for parameter in hypernetwork.meta_lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to(device)
    return backbone, hypernetwork.to(device)


@torch.no_grad()
def adapters(backbone: Backbone, hypernetwork: Hypernetwork, contexts: Sequence[Sequence[int]] = CONTEXTS) -> LoRA:
    ids, mask = pad_left(contexts, value=0)
    return hypernetwork(backbone, ids.to(backbone.device), None if mask is None else mask.to(backbone.device))


def step(
    backbone: Backbone, hypernetwork: Hypernetwork, samples: Sequence[Sample], *, taught: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step, clipping far away, two samples at a time."""
    optimizer = build_optimizer(hypernetwork, stage_config())
    values: dict[str, Any] = {"micro_batch_size": 2, "clip": 1e9, "pad_id": 0, "ranks": Ranks(), "guard": Guard(stage_config())}
    if taught:
        values["teacher"] = Teacher(backbone, tiny_tokenizer(), DistillationConfig(share=0.4, top=5))
    result = training_step(hypernetwork, backbone, samples, optimizer=optimizer, **values)
    assert result.skipped is None
    return result.loss, {name: p.grad.cpu() for name, p in hypernetwork.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], *, away: float) -> None:
    """Every value within ``away`` of the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        furthest = float((found[name].cpu() - tensor.cpu()).abs().max()) / largest
        assert furthest <= away, f"{name}: {furthest:.2e} of the largest value away"


def updates(lora: LoRA) -> dict[str, Tensor]:
    return {path: a @ b for path, (a, b) in lora.items()}


# --- one pass --------------------------------------------------------------------------------------------------------------


@DTYPES
def test_adapters_are_the_cpus(dtype: torch.dtype) -> None:
    """Contexts padded beside each other, and one alone, which takes the kernel without a mask."""
    expected, found = (pair(device, dtype=dtype) for device in PLACES)
    for contexts in (CONTEXTS, CONTEXTS[:1]):
        lora = adapters(*found, contexts)
        assert {tensor.device.type for both in lora.values() for tensor in both} == {DEVICE}
        assert_near(updates(lora), updates(adapters(*expected, contexts)), away=ROUNDING[dtype])


@DTYPES
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
def test_a_step_is_the_cpus(stage: str, checkpointing: bool, dtype: torch.dtype) -> None:
    samples = stage_samples(stage, 8)[::2]
    together = [collate(samples[start : start + 2], pad_id=0) for start in (0, 2)]
    assert any(batch.input_mask is not None for batch in together)
    assert stage == "1qa" or any(batch.context_mask is not None for batch in together)
    loss, gradients = step(*pair("cpu", dtype=dtype), samples)
    found, there = step(*pair(DEVICE, dtype=dtype, activation_checkpointing=checkpointing), samples)
    assert found == pytest.approx(loss, rel=ROUNDING[dtype])
    assert_near(there, gradients, away=ROUNDING[dtype])


def test_labels_in_several_chunks_are_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = stage_samples("mqa", 4)
    loss, gradients = step(*pair("cpu"), samples)
    # Three labels at a time.
    monkeypatch.setitem(backbones.CHUNK_BYTES, "cuda", 3 * 4 * VOCABULARY)
    found, there = step(*pair(DEVICE), samples)
    assert found == pytest.approx(loss, rel=1e-4)
    assert_near(there, gradients, away=1e-4)


def test_a_distilled_step_is_the_cpus() -> None:
    samples = stage_samples("mqa", 4)
    (loss, gradients), (found, there) = (step(*pair(device), samples, taught=True) for device in PLACES)
    assert loss != pytest.approx(step(*pair("cpu"), samples)[0], rel=1e-3)
    assert found == pytest.approx(loss, rel=1e-4)
    assert_near(there, gradients, away=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_muon_orthogonalises_as_on_the_cpu(dtype: torch.dtype) -> None:
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix.to(DEVICE), dtype=dtype).float().cpu()
    away = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, orthogonalised(matrix, dtype=torch.float32), rtol=0, atol=away)


def test_bfloat16_is_near_float32() -> None:
    """Loss, and the direction of all gradients together; parameters and their gradients are float32."""
    samples = stage_samples("mqa", 4)
    (loss, exact), (found, rounded) = (step(*pair(DEVICE, dtype=dtype), samples) for dtype in (torch.float32, torch.bfloat16))
    assert {gradient.dtype for gradient in rounded.values()} == {torch.float32}
    assert found == pytest.approx(loss, rel=0.02)
    one, other = (torch.cat([gradients[name].flatten() for name in exact]) for gradients in (exact, rounded))
    assert float(F.cosine_similarity(one, other, dim=0)) > 0.97


def test_padding_of_any_length_leaves_no_gradient_without_a_number() -> None:
    """Under transformers' own ``sdpa`` one batch in eighteen of real questions had some on an H100 (torch 2.11)."""
    backbone, hypernetwork = pair(DEVICE, dtype=torch.bfloat16)
    for width in range(17, 81):
        ids, mask = pad_left([list(range(40, 40 + count)) for count in (width, width // 2, 3)], value=0)
        batch = ids.to(DEVICE), None if mask is None else mask.to(DEVICE)
        hypernetwork.zero_grad()
        lora = hypernetwork(backbone, *batch)
        logits = backbone.label_logits(*batch, label_positions=torch.tensor([width - 1, 3 * width - 1], device=DEVICE), lora=lora)
        logits.logsumexp(-1).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in hypernetwork.parameters()), width


def test_the_measures_of_adapters_are_the_cpus() -> None:
    lora = adapters(*pair(DEVICE))
    here = lora.to("cpu")
    torch.testing.assert_close(lora.cosine().cpu(), here.cosine(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lora.effective_rank().cpu(), here.effective_rank(), rtol=1e-4, atol=1e-4)
    assert lora.select([1]).distance(here.select([1])) < 1e-3
    (smaller, share), (expected, kept) = (value.select([2]).reduce(1) for value in (lora, here))
    assert share == pytest.approx(kept, rel=1e-4)
    assert_near(updates(smaller), updates(expected), away=1e-3)


# --- answers ---------------------------------------------------------------------------------------------------------------


def answers(backbone: Backbone, lora: LoRA, which: Sequence[int]) -> list[list[int]]:
    ids, mask = pad_left([QUESTIONS[index] for index in which], value=0)
    seen = torch.ones_like(ids) if mask is None else mask
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "stop_ids": None, "pad_id": 0}
    given = backbone.generate(ids.to(backbone.device), seen.to(backbone.device), lora=lora.select(which), **options)
    return [list(row) for row in given.tolist()]


def test_answers_side_by_side_are_those_one_by_one_and_the_cpus() -> None:
    """Four contexts with a question each, greedily; their adapters really say different things."""
    every = range(len(CONTEXTS))
    found = {}
    for device in PLACES:
        backbone, hypernetwork = pair(device)
        lora = adapters(backbone, hypernetwork)
        found[device, "together"] = answers(backbone, lora, every)
        found[device, "alone"] = [answers(backbone, lora, [index])[0] for index in every]
    expected = found["cpu", "alone"]
    assert len({tuple(row) for row in expected}) == len(CONTEXTS)
    assert all(rows == expected for rows in found.values())


def test_a_merged_adapter_answers_as_a_worn_one() -> None:
    backbone, hypernetwork = pair(DEVICE)
    lora = adapters(backbone, hypernetwork, CONTEXTS[:1])
    merged = backbone.merged(lora)
    assert merged.device.type == DEVICE
    ids = torch.tensor([QUESTIONS[0]], device=DEVICE)
    with torch.no_grad():
        worn = backbone.logits(backbone.hidden(ids, None, lora=lora))
        torch.testing.assert_close(merged.logits(merged.hidden(ids, None, lora=None)), worn, rtol=1e-3, atol=1e-3)
    options: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": None, "pad_id": 0}
    wanted = backbone.generate(ids, torch.ones_like(ids), lora=lora, **options)
    assert torch.equal(merged.generate(ids, torch.ones_like(ids), lora=None, **options), wanted)


def test_the_shipped_model_answers_as_on_the_cpu(tmp_path: Path) -> None:
    """Encoded, saved, read again, asked; and a conversation whose prompt is kept, in the thread of a stream."""
    shine = Shine.from_pretrained("cpu-world", device=DEVICE)
    assert shine.backbone.device.type == DEVICE
    lora = shine.encode(["Zoran works as a baker. Umar lives in Selkirk.", "Zoran works as a tailor."])
    assert [shine.chat(lora.select([index]), "What is the job of Zoran?") for index in range(2)] == ["baker", "tailor"]
    read = LoRA.load(lora.select([0]).save(tmp_path / "adapter"))
    kept = PromptCache()
    for _ in range(2):
        pieces = shine.stream(read, "Where does Umar live?", kept=kept)
        assert "".join(pieces).strip() == "Selkirk"


# --- runs ------------------------------------------------------------------------------------------------------------------


def run_on(device: str, folder: str, output: Path, **changes: Any) -> TrainConfig:
    return train_config(folder, output, backbone=BackboneConfig(path=folder, dtype="float32", device=device), **changes)


@pytest.mark.parametrize("stage", ["pretrain", "mqa"])
def test_training_is_the_cpus(stage: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Two steps with a validation after them: its losses, its adapters' measures, its answers."""
    changes = {"stage": stage_config(stage, steps=2, evaluate_every=2, evaluation_batches=1)}
    rows = []
    for name, device in zip(("here", "there"), PLACES, strict=True):
        train(run_on(device, tiny_backbone_folder, tmp_path / name, **changes))
        rows.append([json.loads(line) for line in (tmp_path / name / METRICS_FILE).read_text().splitlines()])
    assert losses_of(tmp_path / "there") == pytest.approx(losses_of(tmp_path / "here"), rel=1e-3)
    expected, found = (next(row for row in lines if "validation/adapter_cosine" in row) for lines in rows)
    measures = [name for name in expected if name.startswith("validation/") and not name.endswith("accuracy")]
    assert {name: found[name] for name in measures} == pytest.approx(
        {name: expected[name] for name in measures}, rel=0.01, abs=0.01
    )


def test_a_resumed_run_is_the_run_that_was_not_stopped(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """To the last bit, where attention does not sum in an order of its own each time."""
    stage = stage_config(steps=4, save_every=2)
    with sdpa_kernel(SDPBackend.MATH):
        whole = train(run_on(DEVICE, tiny_backbone_folder, tmp_path / "whole", stage=stage))
        stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
        shutil.rmtree(stopped / "final")
        resumed = train(run_on(DEVICE, tiny_backbone_folder, stopped, stage=stage, resume=str(stopped / "step-000002")))
    assert losses_of(stopped) == losses_of(tmp_path / "whole")
    expected, found = read_weights(whole), read_weights(resumed)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(("stage", "methods"), [("1qa", ("shine", "in_context", "only_question")), ("mqa", ("shine",))])
def test_an_evaluation_is_the_cpus(stage: str, methods: tuple[str, ...], tiny_backbone_folder: str, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine.jsonl")
    _, hypernetwork = pair("cpu")
    info = CheckpointInfo(BackboneConfig(path="x"), hypernetwork.config)
    save_hypernetwork(tmp_path / "checkpoint", hypernetwork.state_dict(), info)
    config = evaluation_config(tiny_backbone_folder, tmp_path, checkpoint=str(tmp_path / "checkpoint"), methods=methods)
    config = replace(config, stage=replace(config.stage, name=stage))
    predicted = []
    for name, device in zip(("here", "there"), PLACES, strict=True):
        evaluate(replace(config, backbone=replace(config.backbone, device=device), output=str(tmp_path / name)))
        lines = (tmp_path / name / PREDICTIONS_FILE).read_text().splitlines()
        predicted.append([json.loads(line) for line in lines])
    assert predicted[0] == predicted[1]
    assert any(a["prediction"] != b["prediction"] for a, b in itertools.pairwise(predicted[0]))
