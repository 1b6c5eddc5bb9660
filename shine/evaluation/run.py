"""An evaluation from a configuration to files: predictions as JSONL, a summary as JSON, a table on the console."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from shine.backbone import Backbone
from shine.chat import token_counter
from shine.checkpoint import check_backbone, effective_config, find_checkpoint, introduce, load_hypernetwork, output_folder
from shine.config import EvaluationConfig, MethodName, StageName
from shine.data.examples import Example
from shine.data.sources import look_into, read_named
from shine.data.tally import Tally
from shine.evaluation import pretraining, qa
from shine.evaluation.methods import Method
from shine.evaluation.tables import answer_table, recall_table, show
from shine.fingerprint import fingerprint
from shine.zoo import load_backbone

PREDICTIONS_FILE, SUMMARY_FILE = "predictions.jsonl", "summary.json"


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Score every method on every test source the way the stage asks for, and return the summary that was written.

    Stage ``pretrain`` gives texts back, ``mqa`` holds conversations, ``1qa`` asks single questions.

    Raises:
        ValueError: SHINE is to be scored and there is no checkpoint, a source is missing or has nothing to ask.
    """
    stage = config.stage.name
    output = output_folder(config.output)
    look_into(config.data.test, "data.test")
    config = with_checkpoint(config)
    output.mkdir(parents=True, exist_ok=True)
    methods = load_methods(config)
    if (output / SUMMARY_FILE).exists():
        print(f"replaces the evaluation in {output}", flush=True)
        # Before anything else: a run that fails leaves no old summary beside new predictions.
        (output / SUMMARY_FILE).unlink()
    summary: dict[str, Any] = {"stage": stage, "config": asdict(config), "sources": {}}
    with (output / PREDICTIONS_FILE).open("w", encoding="utf-8") as lines:
        for name, source in config.data.test.items():
            tally = Tally()
            examples = list(
                qa.usable_examples(
                    read_named({name: source}, "data.test", tokens=token_counter(methods[0].tokenizer), tally=tally),
                    methods[0].tokenizer,
                    context_length=config.stage.context_length,
                    questions=stage != "pretrain",
                    tally=tally,
                )
            )
            if not examples:
                wanted = "texts" if stage == "pretrain" else "questions"
                raise ValueError(f"data.test.{name}: nothing to ask ({tally}); give a source that holds {wanted}")
            print(f"{name}: {tally}", flush=True)
            scored = {m.name: _score(m, name, examples, config, stage=stage, write=_writer(lines.write)) for m in methods}
            summary["sources"][name] = {"tally": str(tally), "methods": scored}
    (output / SUMMARY_FILE).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show(recall_table(summary) if stage == "pretrain" else answer_table(summary))
    print(f"every prediction: {output / PREDICTIONS_FILE}\nsummary: {output / SUMMARY_FILE}", flush=True)
    return summary


def with_checkpoint(config: EvaluationConfig) -> EvaluationConfig:
    """The configuration with the directory that its checkpoint means and the hypernetwork that lies there, both said."""
    if "shine" not in config.methods:
        return config
    if config.checkpoint is None:
        raise ValueError("checkpoint: missing; set checkpoint=<directory>, or leave SHINE out: methods=[in_context,only_question]")
    directory = find_checkpoint(config.checkpoint)
    for line in introduce(directory, config.hypernetwork):
        print(line, flush=True)
    return replace(config, checkpoint=str(directory), hypernetwork=effective_config(directory, config.hypernetwork))


def load_methods(config: EvaluationConfig) -> list[Method]:
    """The methods of an evaluation (see `with_checkpoint`), sharing one backbone."""
    backbone, tokenizer = load_backbone(config.backbone, targets=config.hypernetwork.targets)
    return [_method(name, config, backbone, tokenizer) for name in config.methods]


def _method(name: MethodName, config: EvaluationConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Method:
    if name != "shine":
        return Method(name, backbone, tokenizer, config.prompts, assistant_prefix=config.backbone.baseline_prefix)
    assert config.checkpoint is not None
    hypernetwork = load_hypernetwork(config.checkpoint, backbone, config=config.hypernetwork)
    check_backbone(config.checkpoint, config=config.backbone, found=fingerprint(backbone.model, tokenizer))
    return Method(name, backbone, tokenizer, config.prompts, hypernetwork=hypernetwork.eval())


def _score(
    method: Method,
    source: str,
    examples: list[Example],
    config: EvaluationConfig,
    *,
    stage: StageName,
    write: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    clock = qa.Clock()
    started = time.perf_counter()
    results: list[Any] = []
    predictions: Iterator[Any]
    if stage == "pretrain":
        predictions = pretraining.recall(method, source, examples, config, clock=clock)
    else:
        predictions = qa.predict(method, source, examples, config, conversations=stage == "mqa", clock=clock)
    before = method.encoded
    for result in predictions:
        write(asdict(result))
        results.append(result)
    scores = pretraining.summarise(results) if stage == "pretrain" else qa.summarise(results)
    seconds = {"total": time.perf_counter() - started, "encode": clock.encode, "answer": clock.answer}
    return {**scores, "contexts_encoded": method.encoded - before, "seconds": {k: round(v, 3) for k, v in seconds.items()}}


def _writer(write: Callable[[str], Any]) -> Callable[[Mapping[str, Any]], None]:
    return lambda row: write(json.dumps(row, ensure_ascii=False) + "\n")
