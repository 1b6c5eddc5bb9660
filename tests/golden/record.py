"""Write the golden losses anew, after a numeric change that is meant: ``python tests/golden/record.py``.

With ``--print`` the losses go to the last line of the output instead, for the test that compares them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import tiny_model, tiny_tokenizer
from runs import GOLDEN, fingerprint, losses_of, stage_config, train_config

from shine.training.stage import train


def main() -> None:
    torch.set_num_threads(1)
    golden: dict[str, object] = {"versions": fingerprint()}
    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder) / "backbone"
        tiny_model().save_pretrained(backbone)
        tiny_tokenizer().save_pretrained(backbone)
        for stage in ("pretrain", "mqa", "1qa"):
            output = Path(folder) / stage
            train(train_config(str(backbone), output, stage=stage_config(stage)))
            golden[stage] = losses_of(output)
    if "--print" in sys.argv:
        print(json.dumps(golden))
    else:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
