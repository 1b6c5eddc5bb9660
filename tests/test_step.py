"""One training step: the loss and its gradients are the same however they are computed, bad numbers, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config
from runs import stage_config, stage_samples
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shine.backbone import Backbone
from shine.data.batching import Batch, collate
from shine.data.samples import Sample
from shine.hypernetwork import Hypernetwork
from shine.training import step
from shine.training.distributed import Ranks
from shine.training.guard import NOT_FINITE, Guard
from shine.training.losses import label_losses
from shine.training.optimizer import Optimizers, build_optimizer, learning_rate
from shine.training.parallel import accumulating
from shine.training.step import training_step


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


def assert_same(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> None:
    """Equal up to the rounding of float64."""
    assert first[0] == pytest.approx(second[0], rel=1e-12)
    assert set(first[1]) == set(second[1])
    largest = max(float(gradient.abs().max()) for gradient in first[1].values())
    for name, gradient in first[1].items():
        torch.testing.assert_close(
            gradient, second[1][name], rtol=0.0, atol=1e-12 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
def test_every_parameter_gets_a_gradient(make_backbone: Callable[..., Backbone], stage: str) -> None:
    _, gradients = gradients_of(make_backbone(dtype=torch.float64), stage_samples(stage, 4), micro_batch_size=2)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
    assert {"memory_tokens", "m2p.layer_embedding", "meta_lora.layers.0.q_proj.A"} <= set(gradients)


@pytest.mark.usefixtures("exact_norms")
def test_questions_that_share_a_context_learn_what_each_would_alone(
    make_backbone: Callable[..., Backbone], contexts_read: list[int]
) -> None:
    """Six questions of three contexts in one micro-batch read three; in micro-batches of one they read six."""
    drawn = stage_samples("1qa", 12)
    contexts = list(dict.fromkeys(tuple(sample.context_ids) for sample in drawn))[:3]
    samples = [sample for context in contexts for sample in [s for s in drawn if tuple(s.context_ids) == context][:2]]
    assert len(samples) == 6
    shared = gradients_of(
        make_backbone(dtype=torch.float64), samples, micro_batch_size=6, order=lambda some: some[::2] + some[1::2]
    )
    assert contexts_read == [3]
    alone = gradients_of(make_backbone(dtype=torch.float64), samples, micro_batch_size=1)
    assert contexts_read == [3, *[1] * 6]
    assert_same(shared, alone)


@pytest.mark.usefixtures("exact_norms")
def test_accumulation_changes_nothing(make_backbone: Callable[..., Backbone]) -> None:
    """1 x 6 and 6 x 1 (and 2 x 3): micro-batches of unlike label counts, padded against each other or alone."""
    samples = stage_samples("mqa", 6)
    assert len({sample.label_count for sample in samples}) > 1
    assert len({len(sample.context_ids) for sample in samples}) > 1
    whole = gradients_of(make_backbone(dtype=torch.float64), samples, micro_batch_size=6)
    for micro_batch_size in (1, 2):
        assert_same(whole, gradients_of(make_backbone(dtype=torch.float64), samples, micro_batch_size=micro_batch_size))


@pytest.mark.usefixtures("exact_norms")
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
    assert_same((loss, gradients), (share[0] * alone[0][0] + share[1] * alone[1][0], expected))


def test_contexts_of_like_length_go_together(make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ranks and micro-batches every sample is used once, and none is beside one much longer than need be."""
    lengths = [9, 2, 8, 3, 7, 1, 6, 4]
    samples = [replace(stage_samples("mqa", 1)[0], id=str(n), context_ids=[5] * n) for n in lengths]
    seen: list[list[int]] = []
    real = step.label_losses

    def label_losses(hypernetwork: Any, backbone: Backbone, batch: Batch, *args: Any) -> Any:
        seen.append([int(name) for name in batch.ids])
        return real(hypernetwork, backbone, batch, *args)

    monkeypatch.setattr(step, "label_losses", label_losses)
    backbone = make_backbone()
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    values = {"optimizer": torch.optim.SGD(hypernetwork.parameters(), lr=0.0), "clip": 1.0, "pad_id": 0}
    monkeypatch.setattr(Ranks, "sum", lambda _self, value: value)
    monkeypatch.setattr(Ranks, "of_first", lambda _self, values, device: values)
    for rank in range(2):
        training_step(
            hypernetwork, backbone, samples, micro_batch_size=2, ranks=Ranks(rank, 2), guard=Guard(stage_config()), **values
        )
    assert seen == [[1, 2], [6, 7], [3, 4], [8, 9]]


def test_activation_checkpointing_changes_nothing(make_backbone: Callable[..., Backbone]) -> None:
    samples = stage_samples("pretrain", 4)
    plain = gradients_of(make_backbone(dtype=torch.float64), samples, micro_batch_size=2)
    recomputed = gradients_of(make_backbone(dtype=torch.float64, activation_checkpointing=True), samples, micro_batch_size=2)
    assert_same(plain, recomputed)


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
    assert step.tokens == sum(len(sample.context_ids) + len(sample.input_ids) for sample in samples)


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


def test_the_m2p_multiplies_in_the_type_of_the_backbone(make_backbone: Callable[..., Backbone]) -> None:
    """Its matrix products run in bfloat16 under a bfloat16 backbone; the stream between its layers stays float32."""
    for dtype in (torch.bfloat16, torch.float32):
        backbone = make_backbone(dtype=dtype)
        hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
        seen: list[torch.dtype] = []
        hypernetwork.m2p.layers[0].qkv.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output.dtype))
        hypernetwork.m2p.layers[0].register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output.dtype))
        hypernetwork(backbone, torch.tensor([[7, 8, 9]]), None)
        assert seen == [dtype, torch.float32]


def done(value: Tensor) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(value)
    return future


def test_ranks_talk_in_the_last_micro_batch_only(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(2, 1))
        reduced: list[int] = []

        # A lambda: DDP reads the hook's annotations and wants them evaluated.
        model.register_comm_hook(None, lambda _, bucket: (reduced.append(bucket.index()), done(bucket.buffer()))[1])
        for last in (False, False, True):
            assert not reduced
            with accumulating(model, last=last):
                model(torch.ones(1, 2)).sum().backward()
        assert reduced
    finally:
        torch.distributed.destroy_process_group()


def test_a_step_talks_once(make_backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real step of three micro-batches: every gradient is reduced after the third forward pass, none before."""
    from shine.training import step

    backbone, forwards, reduced = make_backbone(), [0], []
    real = step.label_losses

    def label_losses(*args: Any) -> Any:
        forwards[0] += 1
        return real(*args)

    monkeypatch.setattr(step, "label_losses", label_losses)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
        model = DistributedDataParallel(hypernetwork)
        model.register_comm_hook(
            None, lambda _, bucket: (reduced.append((forwards[0], bucket.buffer().numel())), done(bucket.buffer()))[1]
        )
        training_step(
            model,
            backbone,
            stage_samples("mqa", 3),
            optimizer=Optimizers(torch.optim.SGD(hypernetwork.parameters(), lr=0.0)),
            micro_batch_size=1,
            clip=1.0,
            pad_id=0,
            ranks=Ranks(),
            guard=Guard(stage_config()),
        )
    finally:
        torch.distributed.destroy_process_group()
    assert {after for after, _ in reduced} == {3}
    assert sum(count for _, count in reduced) == sum(parameter.numel() for parameter in hypernetwork.parameters())


def test_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    stage = stage_config(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(step, stage=stage, total_steps=12) for step in range(13)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])


def test_a_constant_schedule_stays_at_its_peak() -> None:
    stage = stage_config(learning_rate=1.0, warmup_steps=4, schedule="constant")
    rates = [learning_rate(step, stage=stage, total_steps=total) for total in (8, 800) for step in range(8)]
    assert rates == pytest.approx(2 * [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_norms_and_biases_are_not_decayed(make_backbone: Callable[..., Backbone]) -> None:
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), make_backbone())
    optimizer = build_optimizer(hypernetwork, stage_config(weight_decay=0.3))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in hypernetwork.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name


def test_an_adapter_in_the_backbones_type_is_the_same_rounded_later(make_backbone: Callable[..., Backbone]) -> None:
    """What is only worn is rounded once, before it is cut; gradients reach the parameters in float32 all the same."""
    backbone = make_backbone(dtype=torch.bfloat16)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    ids = torch.arange(40, 52)[None]
    kept, worn = hypernetwork(backbone, ids, None), hypernetwork(backbone, ids, None, dtype=backbone.dtype)
    for path, pair in worn.items():
        for value, whole in zip(pair, kept[path], strict=True):
            assert (value.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
            assert torch.equal(value, whole.bfloat16())
    torch.stack([value.float().square().sum() for pair in worn.values() for value in pair]).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in hypernetwork.parameters())
