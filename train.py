"""Train one stage of the recipe: ``python train.py experiment=cpu_world stage=pretrain``."""

import hydra
from omegaconf import DictConfig, OmegaConf

from shine.cli.doors import plain_refusals, run_door
from shine.config import TrainConfig
from shine.training.loop import train


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> None:
    """Read the configuration, convert it once, train."""
    run_door(TrainConfig, OmegaConf.to_container(config, resolve=True), train)


if __name__ == "__main__":
    with plain_refusals(TrainConfig):
        main()
