"""Train one stage of the recipe: ``python train.py experiment=cpu_world stage=pretrain``."""

import hydra
from omegaconf import DictConfig, OmegaConf

from shine.cli.doors import plain_refusals, run_door
from shine.cli.stages import train_and_evaluate
from shine.config import TrainConfig


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Read the configuration, convert it once, train, evaluate where that was asked for."""
    run_door(TrainConfig, OmegaConf.to_container(config, resolve=True), train_and_evaluate)


if __name__ == "__main__":
    with plain_refusals(TrainConfig):
        main()
