"""What loading a backbone costs in host memory, by several ranks of one machine."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ranks_load_one_after_the_other(dtype: str, tmp_path: Path) -> None:
    """Measured from outside, over four ranks: what they do not share (private memory) and what they hold in all (PSS, which counts
    a shared page once over those that share it), both beyond what they held before.

    Weights that are stored in the type of the run are pages of the file, one copy for all ranks, however many. Weights that must
    be converted are a rank's own, once: at no time are there two copies of one. On CUDA either goes to the GPU and is gone.
    """
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=20_000,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=128,
        )
    ).bfloat16()
    size = sum(parameter.numel() for parameter in model.parameters()) * {"bfloat16": 2, "float32": 4}[dtype]
    model.save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    del model
    # Pages of a file that are not on the disk yet would count as those of the process that reads them.
    os.sync()
    script = Path(__file__).parent / "loading_ranks.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script)]
    run = subprocess.run([*launch, str(tmp_path), dtype], timeout=500, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    report = {"model": size, **{what: ranks[0][what] for what in ("private", "pss")}}
    print(json.dumps(report))
    copies = {"bfloat16": 0.25, "float32": 4.25}[dtype]
    assert report["private"] < copies * size
    assert report["pss"] < (1.5 if dtype == "bfloat16" else 4.75) * size
    intervals = sorted((rank["began"], rank["ended"]) for rank in ranks)
    assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(intervals))
