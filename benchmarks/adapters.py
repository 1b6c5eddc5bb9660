"""How large an adapter is, how long encoding takes and what memory it needs, by backbone and rank: the table of docs/adapters.md.

    python benchmarks/adapters.py            every row
    python benchmarks/adapters.py --computed only what follows from shapes

The CPU world, SmolLM2-135M and the shape of Qwen3-0.6B are run, each row in a process of its own on one thread. SmolLM2's
hypernetworks are untrained and Qwen3's weights random, which changes neither time nor memory. The other sizes of Qwen3 are computed
from their published shapes, without weights: exact for sizes, a lower bound for memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from qwen3 import SHAPES, qwen3_config
from transformers import Qwen3ForCausalLM

from shine.backbone import Backbone
from shine.config import BackboneConfig, HypernetworkConfig, TaskTokens
from shine.flops import adapter_parameters
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone
from shine.model import Shine

TOKENS = 1024
RUN = [("cpu-world", 2), *(("smollm2-135m", rank) for rank in (3, 6, 12)), ("Qwen3-0.6B", 8)]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        values: of the adapter.
        weights: bytes of the backbone as it is held, and of the hypernetwork in float32.
        seconds: to encode ``tokens``, the median of five.
        peak: bytes of the whole process, most at any time.
    """

    backbone: str
    rank: int
    values: int
    weights: int
    tokens: int | None = None
    seconds: float | None = None
    peak: int | None = None


def computed(name: str, rank: int) -> Row:
    """Of a Qwen3 without weights, bfloat16."""
    with torch.device("meta"):
        backbone = Backbone(Qwen3ForCausalLM(qwen3_config(name)))
        hypernetwork = Hypernetwork(HypernetworkConfig(rank=rank), backbone)
    return Row(name, rank, adapter_parameters(backbone, rank), _held(backbone, hypernetwork))


@torch.no_grad()
def random(name: str, rank: int) -> Row:
    """Run here with random weights, which change neither time nor memory: bfloat16, the second of two runs."""
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(qwen3_config(name)).eval()
    torch.set_default_dtype(torch.float32)
    backbone = Backbone(model)
    hypernetwork = Hypernetwork(HypernetworkConfig(rank=rank), backbone).eval()
    ids = torch.randint(0, 150_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        started = time.perf_counter()
        lora = hypernetwork(backbone, ids, None)
        seconds = time.perf_counter() - started
    values = sum(a.numel() + b.numel() for a, b in lora.values())
    assert values == adapter_parameters(backbone, rank)
    return Row(name, rank, values, _held(backbone, hypernetwork), TOKENS, seconds, _peak())


def measured(name: str, rank: int) -> Row:
    """Run here, in this process."""
    if name == "cpu-world":
        shine = Shine.from_pretrained(name, device="cpu")
    else:
        tokens = TaskTokens("<filename>", "<repo_name>", "<empty_output>")
        config = BackboneConfig(path=name, dtype="bfloat16", device="cpu", task_tokens=tokens)
        shape = HypernetworkConfig(rank=rank, meta_rank=32)
        backbone, tokenizer = load_backbone(config, targets=shape.targets)
        shine = Shine(backbone, tokenizer, Hypernetwork(shape, backbone).eval().requires_grad_(False), config, name, TOKENS)
    length = shine.context_length
    ids = torch.randint(0, 40, (1, length), generator=torch.Generator().manual_seed(0)).tolist()[0]
    text = shine.tokenizer.decode([100 + token for token in ids])
    times = []
    for _ in range(6):
        started = time.perf_counter()
        lora = shine.encode(text, long="cut")
        times.append(time.perf_counter() - started)
    values = sum(a.numel() + b.numel() for a, b in lora.values())
    assert values == adapter_parameters(shine.backbone, rank)
    weights = _held(shine.backbone, shine.hypernetwork)
    # The first encodes on cold caches.
    return Row(name, rank, values, weights, lora.provenance[0][0].context.read, statistics.median(times[1:]), _peak())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _held(backbone: Backbone, hypernetwork: Hypernetwork) -> int:
    """Bytes of both, a backbone without weights in bfloat16."""
    width = 2 if backbone.device.type == "meta" else backbone.dtype.itemsize
    return width * _count(backbone.model) + 4 * _count(hypernetwork)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| backbone | rank | values | bfloat16 | float32 | weights held | tokens | encoding | peak of the process | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        run = ("—", "—", "—", "computed")
        if row.tokens is not None and row.seconds is not None and row.peak is not None:
            run = (f"{row.tokens:,}", f"{row.seconds:.3g} s", _bytes(row.peak), "run")
        sizes = (f"{row.values:,}", _bytes(2 * row.values), _bytes(4 * row.values), _bytes(row.weights))
        lines.append(f"| {' | '.join((row.backbone, str(row.rank), *sizes, *run))} |")
    return "\n".join(lines)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1e3:,.3g} kB"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--computed", action="store_true", help="only what follows from shapes")
    parser.add_argument("--row", nargs=2, metavar=("BACKBONE", "RANK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        torch.set_num_threads(1)
        run = random if args.row[0] in SHAPES else measured
        print(json.dumps(vars(run(args.row[0], int(args.row[1])))))
        return
    rows = []
    for name, rank in [] if args.computed else RUN:
        command = [sys.executable, __file__, "--row", name, str(rank)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(Row(**json.loads(done.stdout)))
    done_before = {(row.backbone, row.rank) for row in rows}
    rows += [computed(name, rank) for name in SHAPES for rank in (4, 8, 16) if (name, rank) not in done_before]
    print(table(rows))


if __name__ == "__main__":
    main()
