"""However many questions a context has, it is read once: counted where the backbone reads, over whole evaluations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_tokenizer

from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, save_hypernetwork
from shine.config import BackboneConfig, DataConfig, EvaluationConfig, PromptConfig, SourceConfig, StageConfig
from shine.evaluation.results import PREDICTIONS_FILE, ResultFolder
from shine.evaluation.run import evaluate
from shine.hypernetwork import Hypernetwork

PLACES = ("Rome", "Oslo", "Bonn", "Lyon in the south", "Kiel")
CONTEXTS = [f"Person {n} lives in {place}." for n, place in enumerate(PLACES)]


@pytest.fixture
def config(tiny_backbone_folder: str, tmp_path: Path, make_backbone: Callable[..., Backbone]) -> EvaluationConfig:
    """SHINE on five contexts of five questions each, two contexts a batch."""
    torch.manual_seed(4)
    hypernetwork = tiny_hypernetwork_config()
    info = CheckpointInfo(BackboneConfig(path="x"), hypernetwork)
    save_hypernetwork(tmp_path / "checkpoint", Hypernetwork(hypernetwork, make_backbone()).state_dict(), info)
    turns = [{"question": f"Question {n}?", "answers": ["Rome"]} for n in range(5)]
    rows = [{"id": context, "context": context, "turns": turns} for context in CONTEXTS]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluationConfig(
        backbone=BackboneConfig(path=tiny_backbone_folder, dtype="float32", device="cpu"),
        hypernetwork=hypernetwork,
        stage=StageConfig(name="1qa", context_length=64, conversation_length=64, learning_rate=1.0, warmup_steps=0),
        data=DataConfig(test={"mine": SourceConfig(kind="jsonl", path=str(tmp_path / "mine.jsonl"))}),
        prompts=PromptConfig(),
        output=str(tmp_path / "out"),
        checkpoint=str(tmp_path / "checkpoint"),
        methods=("shine",),
        batch_size=2,
        max_new_tokens=3,
    )


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each context has gone through the backbone under the meta LoRA."""
    counts: Counter[str] = Counter()
    memory_states, tokenizer = Backbone.memory_states, tiny_tokenizer()

    def counting(self: Backbone, ids: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        masks = torch.ones_like(ids) if mask is None else mask
        counts.update(tokenizer.decode(row[real.bool()]) for row, real in zip(ids, masks, strict=True))
        return memory_states(self, ids, mask, **options)

    monkeypatch.setattr(Backbone, "memory_states", counting)
    return counts


@pytest.mark.parametrize("stage", ["1qa", "mqa"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_five_questions_run_one_encoding(stage: Any, batch_size: int, config: EvaluationConfig, read: Counter[str]) -> None:
    """Alone, in batches of contexts, and where each turn comes after the answer to the one before."""
    values = StageConfig(name=stage, context_length=64, conversation_length=64, learning_rate=1.0, warmup_steps=0)
    summary = evaluate(replace(config, stage=values, batch_size=batch_size))
    found = summary["sources"]["mine"]["methods"]["shine"]
    assert (found["questions"], found["contexts_encoded"]) == (25, 5)
    assert read == Counter(CONTEXTS)


@pytest.mark.parametrize("stage", ["1qa", "mqa"])
def test_a_resumed_evaluation_reads_no_context_again(
    stage: Any, config: EvaluationConfig, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first batch; over both runs each context is read once, and the times are those of one run."""
    values = StageConfig(name=stage, context_length=64, conversation_length=64, learning_rate=1.0, warmup_steps=0)
    config = replace(config, stage=values)
    append = ResultFolder.append

    def stopping(self: ResultFolder, *args: Any) -> None:
        append(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultFolder, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    assert 0 < sum(read.values()) < len(CONTEXTS)
    summary = evaluate(config)
    assert read == Counter(CONTEXTS)
    assert summary["sources"]["mine"]["methods"]["shine"]["contexts_encoded"] == 5
    evaluate(config)
    assert read == Counter(CONTEXTS), "a finished evaluation was computed again"
    assert len((Path(config.output) / PREDICTIONS_FILE).read_text().splitlines()) == 25
