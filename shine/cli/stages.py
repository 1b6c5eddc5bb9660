"""What ``train.py`` does: train a stage, then score it where that was asked for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from shine.config import EvaluationConfig, TrainConfig
from shine.evaluation.run import evaluate
from shine.training.distributed import join_ranks
from shine.training.stage import train


def train_and_evaluate(config: TrainConfig) -> Path:
    """Train, and with ``evaluate_at_end`` evaluate what came out; the directory of the final checkpoint."""
    with join_ranks(config.backbone.device):
        final = train(config)
        if config.evaluate_at_end and not config.dry_run:
            evaluate(evaluation_of(config, final))
        return final


def evaluation_of(config: TrainConfig, checkpoint: Path) -> EvaluationConfig:
    """The evaluation of a training run's end: the stage's own, on the run's ``data.test``."""
    assert config.scoring is not None
    return EvaluationConfig(
        **{field.name: getattr(config.scoring, field.name) for field in fields(config.scoring)},
        backbone=config.backbone,
        hypernetwork=config.hypernetwork,
        stage=config.stage,
        data=config.data,
        output=str(Path(config.output).expanduser() / "evaluation"),
        checkpoint=str(checkpoint),
        seed=config.seed,
    )
