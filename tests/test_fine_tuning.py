"""Fine-tuning a LoRA on each context: what it may learn, that it learns, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluation import EXAMPLES, evaluation_config, write_examples

from shine.config import EvaluationConfig, FineTuningConfig, SourceConfig, StageConfig
from shine.data.examples import Example
from shine.evaluation.fine_tuning import FineTuned
from shine.evaluation.methods import Asked
from shine.evaluation.results import TIMINGS_FILE, read_jsonl
from shine.evaluation.run import evaluate, load_methods
from shine.training.reader import starting_lora

SINGLE = Example("single", "Dee is blue.", EXAMPLES[2].turns)


@pytest.fixture
def config(tiny_backbone_folder: str, tmp_path: Path) -> EvaluationConfig:
    write_examples(tmp_path / "mine.jsonl")
    tuning = FineTuningConfig(conversations=(1,), epochs=(2,), rank=2)
    return evaluation_config(tiny_backbone_folder, tmp_path, methods=("fine_tuning",), fine_tuning=tuning)


def tuned(config: EvaluationConfig, **changes: Any) -> FineTuned:
    (method,) = load_methods(replace(config, fine_tuning=replace(config.fine_tuning, **changes)))
    assert isinstance(method, FineTuned)
    return method


def read(method: FineTuned, example: Example, fold: int) -> str:
    """Everything that a LoRA is shown, as text."""
    return "".join(str(method.speaker.tokenizer.decode(sample.input_ids)) for sample in method.samples(example, fold))


def test_the_question_that_is_asked_is_never_learned(config: EvaluationConfig) -> None:
    """Turn by turn: the adapter that answers it was shown the text and other questions, not this one."""
    method = tuned(config, conversations=(9,))
    method.prepare(EXAMPLES)
    made = [(example, fold) for example in EXAMPLES for fold in method.folds(example)]
    for context, example in enumerate(EXAMPLES):
        for number, turn in enumerate(example.turns):
            owner, fold = made[method.place(Asked(context, turn.question, turn=number))]
            assert owner == example
            shown = read(method, example, fold)
            assert example.context in shown
            assert turn.question not in shown
            others = [other.question for n, other in enumerate(example.turns) if (n - number) % 2]
            assert all(question in shown for question in others)


def test_the_loss_falls_and_the_adapter_changes_what_is_said(config: EvaluationConfig) -> None:
    method = tuned(config, epochs=(40,), learning_rate=1e-2)
    samples = method.samples(EXAMPLES[0], 0)
    with torch.no_grad():
        before = float(method._loss(starting_lora(method.speaker.backbone, rank=2, generator=torch.Generator()), samples))
        after = float(method._loss(method._train(EXAMPLES[0], 0), samples))
    assert after < 0.6 * before
    asked = [Asked(0, "Who?")]
    method.prepare(EXAMPLES[:1])
    answers = method.answer_ids(asked, max_new_tokens=8, batch_size=1)
    method.lora = None
    assert method.answer_ids(asked, max_new_tokens=8, batch_size=1) != answers


def test_only_the_adapters_that_are_asked_are_trained(config: EvaluationConfig) -> None:
    """Two for contexts of several questions, one for the context of one; and one each where nothing but the text is learned."""
    summary = evaluate(config)["sources"]["mine"]["methods"]["fine_tuning:1x2"]
    assert (summary["contexts_encoded"], summary["adapters_made"]) == (3, 5)
    seconds = sum(row["encode"] for row in read_jsonl(Path(config.output) / TIMINGS_FILE))
    assert summary["seconds"]["encode_adapter"] == pytest.approx(seconds / 5)
    assert summary["seconds"]["encode_context"] == pytest.approx(seconds / 3)
    method = tuned(config, conversations=(0,))
    method.prepare(EXAMPLES)
    assert (method.made, method.encoded) == (3, 3)
    assert [method.place(Asked(context, "", turn=1)) for context in range(3)] == [0, 1, 2]


def test_a_name_that_promises_more_than_there_is_to_learn(config: EvaluationConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """The number that was really learned is in the summary and said; a set of single questions is refused."""
    config = replace(config, fine_tuning=replace(config.fine_tuning, conversations=(4,)))
    found = evaluate(config)["sources"]["mine"]["methods"]["fine_tuning:4x2"]["conversations_learned"]
    # a: one and two of its three turns; b: one and one; c: nothing beside its only question.
    assert found == {"wanted": 4, "fewest": 0, "mean": (1 + 2 + 1 + 1 + 0) / 5}
    assert "mine: fine_tuning:4x2 learns 1.0 conversations an adapter, for there are no more" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no context of single has a second question .* fine_tuning\.conversations=\[0\]"):
        tuned(config).learned("single", [SINGLE])
    assert tuned(config, conversations=(0,)).learned("single", [SINGLE]) == {"wanted": 0, "fewest": 0, "mean": 0}


def test_conversations_of_a_source_are_found_by_the_text(config: EvaluationConfig, tmp_path: Path) -> None:
    """Whatever their ids are, with blanks around the text; one adapter a context, which may learn from all of them."""
    turns = [{"question": "How is Ada?", "answers": ["red"]}]
    rows = [{"id": f"other {n}", "context": f" {example.context}\n", "turns": turns} for n, example in enumerate(EXAMPLES)]
    file = tmp_path / "lessons.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(kind="jsonl", path=str(file))
    method = tuned(config, source=source)
    assert [list(method.folds(example)) for example in EXAMPLES] == [[0]] * 3
    shown = read(method, EXAMPLES[0], 0)
    assert "How is Ada?" in shown
    assert not any(turn.question in shown for turn in EXAMPLES[0].turns)
    file.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"fine_tuning\.source holds no conversation about context b: .*fine_tuning\.source=null"):
        evaluate(replace(config, fine_tuning=replace(config.fine_tuning, source=source)))


def test_texts_given_back_are_learned_alone(config: EvaluationConfig) -> None:
    """A conversation about the whole text would tell the end that a completion hides."""
    stage = StageConfig(name="pretrain", context_length=64, conversation_length=64, learning_rate=1.0, warmup_steps=0)
    with pytest.raises(ValueError, match=r"set fine_tuning\.conversations=\[0\]"):
        evaluate(replace(config, stage=stage))
    source = SourceConfig(kind="jsonl", path=str(Path(config.output).parent / "mine.jsonl"))
    tuning = replace(config.fine_tuning, conversations=(0,), source=source)
    found = evaluate(replace(config, stage=stage, fine_tuning=tuning))["sources"]["mine"]["methods"]["fine_tuning:0x2"]
    assert found["complete"]["texts"] == found["reconstruct"]["texts"] == 3
    assert found["adapters_made"] == 6
