"""What loading a backbone costs in host memory, by several ranks of one machine."""

from __future__ import annotations

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
    """Measured from outside, as the sum of what the ranks do not share (``/proc/PID/smaps_rollup``).

    On a CPU each rank ends with a model of its own, which is what the rank was asked for. What must not be there beside them is
    more than one rank's working copies at a time: with N ranks the peak is N models and at most one more, not 2 N. On CUDA the N
    models lie in the GPUs, and what is left in host memory is that one.
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
    script = Path(__file__).parent / "loading_ranks.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(tmp_path), dtype], check=True, env=environment, timeout=500, capture_output=True)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    report = {"model": size, "peak": max(rank["peak"] for rank in ranks), "end": sum(rank["end"] for rank in ranks)}
    print(json.dumps(report))
    assert report["peak"] < 5.2 * size
    intervals = sorted((rank["began"], rank["ended"]) for rank in ranks)
    assert all(ended <= began for (_, ended), (began, _) in zip(intervals, intervals[1:], strict=False))
