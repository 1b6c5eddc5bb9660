"""Rebuild the single-question collection (1QA, ift_c1qa.json) from its public parts: each question is an item of its own."""

import sys

from shine.cli.collect import run

if __name__ == "__main__":
    sys.exit(run("1qa", output="data/ift_c1qa.json", description=__doc__))
