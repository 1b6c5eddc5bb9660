"""Rebuild the multi-turn collection (MQA, ift_pwc.json) from its public parts: all questions of a context are one conversation."""

import sys
from pathlib import Path

from shine.cli.collect import run

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "collection_mqa.yaml"

if __name__ == "__main__":
    sys.exit(run(CONFIG, output="data/ift_pwc.json", description=__doc__))
