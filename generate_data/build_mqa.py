"""Rebuild the multi-turn collection (MQA, ift_pwc.json) from its public parts: all questions of a context are one conversation."""

import sys

from shine.cli.collect import run

if __name__ == "__main__":
    sys.exit(run("mqa", output="data/ift_pwc.json", description=__doc__))
