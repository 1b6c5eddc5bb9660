"""Draw the lengths that ``train_step.py`` measures real questions at, from RACE and SQuAD (scripts/download_data.sh race squad).

    python benchmarks/lengths.py                   # writes mqa_lengths.json again

They are drawn from the passages of both sets together, each with all its questions, tokenised for SmolLM2-135M as the stage mqa
does it, with the paper's budgets of 1,150 tokens each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from machine import configured
from train_step import MQA_LENGTHS

from shine.config import TrainConfig
from shine.data.build import samples_of
from shine.data.samples import Sample
from shine.data.sources import read_source
from shine.pretrained import load_tokenizer
from shine.zoo import resolve

DRAWN = 64
SETTINGS = (
    "experiment=smollm2",
    "data=passages/mqa",
    "stage=mqa",
    "stage.context_length=1150",
    "stage.conversation_length=1150",
    "data.train.race.limit=null",
    "output=none",
)


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="where the data is: data.train.race.path=… data.train.squad.path=…")
    config = configured(TrainConfig, "train", [*SETTINGS, *parser.parse_intermixed_args().overrides])
    tokenizer = load_tokenizer(resolve(config.backbone.path))
    passages = itertools.chain.from_iterable(read_source(config.data.train[name]) for name in ("race", "squad"))
    samples = samples_of(passages, tokenizer, config.stage, task_tokens=config.backbone.task_tokens, seed=config.seed)
    drawn = [samples.sample(index, epoch=0) for index in random.Random(0).sample(range(len(samples)), DRAWN)]
    write(MQA_LENGTHS, lengths(drawn))
    print(f"wrote {MQA_LENGTHS}")


def lengths(samples: Sequence[Sample]) -> list[tuple[int, int, int]]:
    """Context, conversation and label tokens of each, from short to long."""
    found = [(len(sample.context_ids), len(sample.input_ids), sample.label_count) for sample in samples]
    return sorted(found, key=lambda each: (each[0] + each[1], each))


def write(path: Path, rows: Sequence[tuple[int, int, int]]) -> None:
    """Eight samples a line."""
    texts = [json.dumps(row) for row in rows]
    lines = [", ".join(texts[start : start + 8]) for start in range(0, len(texts), 8)]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
