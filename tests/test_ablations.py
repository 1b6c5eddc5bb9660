"""Each way of `benchmarks/ablations.py` computes what ours does, by other operations."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import ablations
import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_model
from float64 import in_float64
from packing import packed
from subject import Subject, examples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import Ours, gradient

from shine import attention
from shine.backbone import Backbone
from shine.hypernetwork import Hypernetwork
from shine.training.losses import label_losses

LENGTHS = ((40, 24, 10), (25, 36, 12), (31, 30, 29))


class _Counted(TorchDispatchMode):
    """How often each operator runs, by the shapes of what goes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(each.shape) for each in args if isinstance(each, Tensor)]
        self.calls[f"{func} {shapes}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """In float64; Qwen2 has biases, after which an update cannot be added in place to what its linear computed."""
    backbone = Backbone(tiny_model(request.param))
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    for name, parameter in hypernetwork.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.05)
    made = in_float64(Subject("tiny", backbone, hypernetwork, torch.device("cpu"), lambda: tiny_model(request.param)))
    made.backbone.model.set_attn_implementation("blocks")
    return made


def learned(subject: Subject, name: str) -> tuple[float, Tensor, Counter[str]]:
    step = Ours(subject, examples(LENGTHS, vocabulary_size=subject.backbone.vocabulary_size))
    with ablations.ABLATIONS.get(name, nullcontext)(subject), _Counted() as counted:
        step()
    return step.loss, gradient(subject.hypernetwork), counted.calls


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_a_way_learns_what_ours_does_by_other_operations(subject: Subject, name: str) -> None:
    loss, slopes, calls = learned(subject, ablations.OURS)
    other, other_slopes, other_calls = learned(subject, name)
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(other_slopes, slopes, rtol=1e-9, atol=1e-11)
    # Here every label fits into one chunk, and threads are no operation.
    # In float64 attention is in blocks already.
    assert (other_calls == calls) == (name in ("labels at once", "one thread", "blocks of queries"))
    again = learned(subject, ablations.OURS)
    assert again[2] == calls, "something of the way before is left"


def test_blocks_of_queries_are_taken_however_long_the_sequence(subject: Subject) -> None:
    """In float32, where nothing is padded, ours takes the fused kernel then."""
    long = torch.zeros(1, 1, attention.LONG, 4)
    assert attention._fused_is_better(long, None)
    with ablations.blocks_of_queries(subject):
        assert not attention._fused_is_better(long, None)


def test_labels_at_once_and_one_thread_are_what_they_say(subject: Subject) -> None:
    hidden, threads = torch.zeros(100_000, 1), torch.get_num_threads()
    assert len(subject.backbone.label_chunks(hidden)) > 1
    with ablations.labels_at_once(subject):
        assert len(subject.backbone.label_chunks(hidden)) == 1
    torch.set_num_threads(2)
    try:
        with ablations.one_thread(subject):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_rows_are_packed_without_padding(subject: Subject) -> None:
    """What the linears see is as many tokens as there are, memory tokens beside."""
    seen: list[tuple[int, ...]] = []
    linear = subject.backbone.model.get_submodule("model.layers.0.mlp.down_proj")
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    try:
        with packed(subject.backbone):
            Ours(subject, examples(LENGTHS, vocabulary_size=subject.backbone.vocabulary_size))()
    finally:
        handle.remove()
    memory = subject.hypernetwork.memory_tokens.shape[0]
    assert seen == [(1, 40 + 25 + 31 + 3 * memory), (1, 24 + 36 + 30)]


def test_packed_rows_refuse_what_computes_a_layer_again(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.backbone, "activation_checkpointing", True)
    with pytest.raises(ValueError, match="load the backbone without it"), packed(subject.backbone):
        pass


def test_the_command_prints_every_way_and_stops_at_another_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["ablations", "--model", "cpu-world", "--device", "cpu", "--dtype", "float32", "--rounds", "1", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", fixed)
    ablations.main()
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in (ablations.OURS, *ablations.ABLATIONS, ablations.AGAIN))
    assert said.count("times as long, loss 0.00% apart") == len(ablations.ABLATIONS) + 1

    @contextmanager
    def wrong(_subject: Subject) -> Iterator[None]:
        with patch("shine.training.step.label_losses", lambda *args: (label_losses(*args)[0] * 1.1, None)):
            yield

    monkeypatch.setitem(ablations.ABLATIONS, "one thread", wrong)
    monkeypatch.setattr(sys, "argv", [*fixed, "--only", "one thread"])
    with pytest.raises(SystemExit, match="one thread does not compute the same"):
        ablations.main()
