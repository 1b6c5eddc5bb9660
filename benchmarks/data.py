"""How fast data comes: texts grouped, and batches against the training step that eats them.

    python benchmarks/data.py --race data/race/all --squad data/squad
    python benchmarks/data.py --texts 1000000
    python benchmarks/data.py --pretrain data/pretrain_text

Every figure is of an index made anew, in a folder that is gone afterwards. Tokens are useful ones: padding is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from shine.config import BackboneConfig, HypernetworkConfig, SourceConfig, StageConfig, TaskTokens
from shine.data.batching import SampleStream, collate
from shine.data.build import build_samples
from shine.data.samples import StageSamples
from shine.data.worlds import World
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone
from shine.pretrained import load_tokenizer
from shine.training.distributed import Ranks
from shine.training.guard import Guard
from shine.training.optimizer import build_optimizer
from shine.training.step import training_step
from shine.zoo import resolve

TASKS = TaskTokens(reconstruct="<filename>", complete="<repo_name>", nothing="<empty_output>")
STEPS = 20


def main() -> None:
    """Measure what the arguments ask for and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--race", help="a folder of RACE")
    parser.add_argument("--squad", help="a folder of SQuAD")
    parser.add_argument("--texts", type=int, help="group so many invented texts of about 200 tokens")
    parser.add_argument("--pretrain", help="a folder of texts, as `transmla` lays them out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shine-benchmark-") as folder:
        backbone = resolve("smollm2-135m")
        os.environ["SHINE_CACHE"] = folder
        tokenizer = load_tokenizer(backbone)
        if args.texts:
            group(args.texts, tokenizer, Path(folder))
        if args.pretrain:
            stream_texts(args.pretrain, tokenizer)
        if args.race and args.squad:
            stream_and_train(args.race, args.squad, tokenizer, backbone)


def group(count: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Tokenise and group ``count`` texts to the published budget, from a file."""
    file = folder / "train.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for text in _texts(count):
            lines.write(json.dumps({"text": text}) + "\n")
    stage = StageConfig("pretrain", 1141, 1150, learning_rate=1e-4, warmup_steps=0)
    started = time.perf_counter()
    samples = build_samples({"texts": SourceConfig("text", str(file))}, "texts", tokenizer, stage, task_tokens=TASKS, seed=0)
    seconds = time.perf_counter() - started
    tokens = int(samples.lengths.sum()) // 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{count:,} texts ({file.stat().st_size / 1e6:,.0f} MB, {tokens:,} tokens) in {len(samples):,} groups, "
        f"{tokens / len(samples):,.0f} of 1,141 tokens each: {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s, peak {peak:.2f} GB"
    )


def _texts(count: int) -> Iterator[str]:
    """Invented facts, two to fifty sentences a text."""
    world = World(facts=(16, 20), people=(4, 6), seed=1)
    stories = [world.example(index).context for index in range(2000)]
    for number in range(count):
        size = 1 + number * 2654435761 % 5
        yield " ".join(stories[(number * 31 + 7 * part) % len(stories)] for part in range(size))[: 100 + number * 48271 % 1800]


def stream_texts(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pretraining batches of the published size: how fast one core makes them, and how long a step waits for the next one."""
    stage = StageConfig("pretrain", 1141, 1150, learning_rate=1e-4, warmup_steps=0, batch_size=32, length_window=16)
    sources = {"texts": SourceConfig("text", folder, limit=1000)}
    samples = build_samples(sources, "sources", tokenizer, stage, task_tokens=TASKS, seed=0)
    stream = SampleStream(samples, stage.batch_size, seed=0, window=stage.length_window)
    tokens, started = 0, time.process_time()
    for _ in range(STEPS):
        tokens += collate(next(stream), pad_id=tokenizer.pad_token_id or 0).tokens
    seconds = time.process_time() - started
    print(f"pretraining, batches of {stage.batch_size}: {tokens / seconds:,.0f} tokens/s of one core, {seconds / STEPS:.2f} s each")
    waits = [_waited(samples, stage, ahead=ahead) for ahead in (True, False)]
    print(f"a step of 1 s on another device waits {waits[0]:.4f} s for its batch ({waits[1]:.4f} s were it not made ahead)")


def _waited(samples: StageSamples, stage: StageConfig, *, ahead: bool) -> float:
    """Mean seconds that a step of one second, which leaves the processor alone, waits for its batch."""
    stream = SampleStream(samples, stage.batch_size, seed=0, window=stage.length_window, ahead=ahead)
    next(stream)
    waited = 0.0
    for _ in range(STEPS):
        time.sleep(1)
        started = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - started
    return waited / STEPS


def stream_and_train(race: str, squad: str, tokenizer: PreTrainedTokenizerBase, backbone_folder: str) -> None:
    """RACE's and SQuAD's questions as batches, and the step that learns them."""
    stage = StageConfig("1qa", 1150, 1150, learning_rate=1e-4, warmup_steps=0, batch_size=8, micro_batch_size=8, length_window=16)
    sources = {"race": SourceConfig("race", race), "squad": SourceConfig("squad", squad)}
    started = time.perf_counter()
    samples = build_samples(sources, "sources", tokenizer, stage, task_tokens=TASKS, seed=0)
    seconds = time.perf_counter() - started
    print(f"{len(samples):,} questions read and tokenised: {seconds:.0f} s, {int(samples.lengths.sum()) / seconds:,.0f} tokens/s")
    stream = SampleStream(samples, stage.batch_size, seed=0, window=stage.length_window)
    tokens, cells, started = 0, 0, time.perf_counter()
    for _ in range(1000):
        batch = collate(next(stream), pad_id=tokenizer.pad_token_id or 0)
        tokens += batch.tokens
        cells += batch.context_ids.numel() + batch.input_ids.numel()
    rate = tokens / (time.perf_counter() - started)
    print(f"batches of {stage.batch_size}: {rate:,.0f} tokens/s, {1 - tokens / cells:.1%} padding")
    backbone, _ = load_backbone(
        BackboneConfig(backbone_folder, device="cpu", task_tokens=TASKS), targets=HypernetworkConfig().targets
    )
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(HypernetworkConfig(rank=6, meta_rank=32), backbone)
    optimizer = build_optimizer(hypernetwork, stage)
    ranks, guard = Ranks(), Guard(stage)
    steps = []
    for _ in range(4):
        chosen, began = next(stream), time.perf_counter()
        result = training_step(
            hypernetwork,
            backbone,
            chosen,
            optimizer=optimizer,
            micro_batch_size=stage.micro_batch_size,
            clip=stage.clip,
            pad_id=tokenizer.pad_token_id or 0,
            ranks=ranks,
            guard=guard,
        )
        steps.append((result.tokens, time.perf_counter() - began))
    # The first one allocates.
    eaten = sum(count for count, _ in steps[1:]) / sum(spent for _, spent in steps[1:])
    print(f"a training step of SmolLM2-135M: {eaten:,.0f} tokens/s, so data comes {rate / eaten:,.0f} times faster")


if __name__ == "__main__":
    main()
