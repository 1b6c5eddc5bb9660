"""Rebuild the single-question collection (1QA, ift_c1qa.json) from its public parts: each question is an item of its own."""

import sys
from pathlib import Path

from shine.cli.collect import run

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "collection_1qa.yaml"

if __name__ == "__main__":
    sys.exit(run(CONFIG, output="data/ift_c1qa.json", description=__doc__))
