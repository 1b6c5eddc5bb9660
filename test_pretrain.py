"""Score reconstruction and completion by context length: ``python test_pretrain.py experiment=cpu_world checkpoint=...``."""

import hydra
from omegaconf import DictConfig, OmegaConf

from shine.cli.doors import plain_refusals, run_door
from shine.config import EvaluationConfig
from shine.evaluation.run import evaluate


@hydra.main(version_base="1.3", config_path="configs", config_name="test_pretrain")
def main(config: DictConfig) -> None:
    """Read the configuration, convert it once, evaluate."""
    run_door(EvaluationConfig, OmegaConf.to_container(config, resolve=True), evaluate)


if __name__ == "__main__":
    with plain_refusals(EvaluationConfig):
        main()
