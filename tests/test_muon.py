"""Muon beside AdamW: who trains what, how far a step goes, several ranks, and runs that change the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from runs import losses_of, stage_config, train_config
from test_ranks import assert_same_weights, go_back_to_a_save
from torch import nn

from shine.backbone import Backbone
from shine.config import BackboneConfig
from shine.hypernetwork import Hypernetwork
from shine.training.muon import Muon, orthogonalised
from shine.training.optimizer import build_optimizer
from shine.training.stage import train


def test_muon_takes_the_matrices_of_the_m2p_transformer_and_adamw_the_rest(make_backbone: Callable[..., Backbone]) -> None:
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), make_backbone())
    muon, adamw = build_optimizer(hypernetwork, stage_config(optimizer="muon", weight_decay=0.3)).parts
    assert isinstance(muon, Muon)
    names = {id(parameter): name for name, parameter in hypernetwork.named_parameters()}
    of_muon, of_adamw = ({names[id(p)] for group in part.param_groups for p in group["params"]} for part in (muon, adamw))
    assert of_muon == {
        name for name in names.values() if name.startswith("m2p.layers.") and name.endswith("weight") and "norm" not in name
    }
    assert of_muon.isdisjoint(of_adamw)
    assert of_muon | of_adamw == set(names.values())
    assert [group["weight_decay"] for group in muon.param_groups] == [0.3]


def test_a_step_of_muon_moves_a_matrix_as_far_as_one_of_adamw() -> None:
    """As far as AdamW settles at, a root mean square of 0.2 of the rate, so that both take the same one."""
    moved = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        linear = nn.Linear(64, 32, bias=False)
        before = linear.weight.detach().clone()
        optimizer = build_optimizer(linear, stage_config(optimizer=name, weight_decay=0.0))
        optimizer.set_rate(0.01)
        (linear(torch.randn(256, 64)) ** 2).sum().backward()
        optimizer.step()
        moved[name] = (linear.weight.detach() - before) / 0.01
    assert float(moved["muon"].square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)
    assert float(moved["adamw"].square().mean().sqrt()) == pytest.approx(1.0, rel=0.01)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has one first")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)], ids=str)
def test_steps_are_those_of_torchs_own(shape: tuple[int, int]) -> None:
    """Which always computes in bfloat16; the last bit of a weight is its order of adding up."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(5, *shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.3, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    ]
    for gradient in gradients:
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
    assert (ours - start).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_an_update_keeps_the_directions_of_a_matrix_and_levels_their_sizes(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    levelled = left.T @ orthogonalised(matrix, dtype=torch.float64) @ right.T
    kept = sizes / sizes.norm() > 0.02
    assert torch.allclose(levelled, levelled.diagonal().diag(), atol=1e-9)
    assert ((levelled.diagonal()[kept] > 0.5) & (levelled.diagonal()[kept] < 1.3)).all()


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalised(torch.zeros(3, 5), dtype=torch.bfloat16).any()


def test_a_module_without_linears_is_trained_by_adamw_alone() -> None:
    [part] = build_optimizer(nn.LayerNorm(4), stage_config(optimizer="muon")).parts
    assert isinstance(part, torch.optim.AdamW)


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_muon_on_two_ranks_is_muon_on_one(engine: str, tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Also from a save on, by the other engine."""
    values: dict[str, Any] = {"stage": stage_config("mqa", micro_batch_size=1, steps=12, save_every=6, optimizer="muon")}
    values["backbone"] = BackboneConfig(path=tiny_backbone_folder, dtype="float64", device="cpu")
    train(train_config(tiny_backbone_folder, tmp_path / "one", **values))
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "parts", engine=engine, exact=True, **values) == [0, 0]
    go_back_to_a_save(tmp_path / "parts", step=6)
    other = {"ddp": "fsdp", "fsdp": "ddp"}[engine]
    assert run_ranks(2, tiny_backbone_folder, tmp_path / "parts", resume="latest", engine=other, exact=True, **values) == [0, 0]
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-9)
    assert_same_weights(tmp_path / "parts", tmp_path / "one", tolerance=1e-7)


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_may_change_its_optimizer_when_told(
    before: str, after: str, tiny_backbone_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The moments of one mean nothing to the other: they begin anew, and the run says so."""
    values = {name: {"stage": stage_config(steps=8, save_every=4, optimizer=name)} for name in (before, after)}
    train(train_config(tiny_backbone_folder, tmp_path, **values[before]))
    go_back_to_a_save(tmp_path, step=4)
    with pytest.raises(ValueError, match=f"stage.optimizer: '{before}' -> '{after}'"):
        train(train_config(tiny_backbone_folder, tmp_path, **values[after], resume="latest"))
    train(train_config(tiny_backbone_folder, tmp_path, **values[after], resume="latest", allow_changes=True))
    assert len(losses_of(tmp_path)) == 8
    assert "the moments of the optimizer begin anew" in capsys.readouterr().out
