"""Three methods over the same examples: what each sees, one encoding a context, scores, files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_tokenizer
from torch.nn import functional as F

from shine.backbone import Backbone
from shine.chat import Message, encode_conversation, encode_prompt, token_ids
from shine.checkpoint import CheckpointInfo, save_hypernetwork
from shine.config import BackboneConfig, DataConfig, EvaluationConfig, PromptConfig, SourceConfig, StageConfig
from shine.data.batching import chunks
from shine.data.examples import Example, Turn
from shine.data.tally import Tally
from shine.evaluation import pretraining, qa
from shine.evaluation.methods import Asked, Method, Shine
from shine.evaluation.plots import smooth
from shine.evaluation.results import PREDICTIONS_FILE, SUMMARY_FILE
from shine.evaluation.run import TestSet as ContextSet
from shine.evaluation.run import evaluate, load_methods
from shine.evaluation.scores import bucket, summarise_recall
from shine.hypernetwork import Hypernetwork

PROMPTS = PromptConfig(system="Be brief.", in_context="Text: {context}\nQuestion: {question}")
EXAMPLES = [
    Example("a", "Ada is red.", (Turn("Who?", ("Ada",)), Turn("What color?", ("red", "Red")), Turn("Why?", ("so",)))),
    Example("b", "Bo lives in a very long street of Rome.", (Turn("Where?", ("Rome",)), Turn("Who?", ("Bo",)))),
    Example("c", "Cy eats.", (Turn("What does Cy do all day long?", ("eat",)),)),
]


def evaluation_config(folder: str, output: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "backbone": BackboneConfig(path=folder, dtype="float32", device="cpu"),
        "hypernetwork": tiny_hypernetwork_config(),
        "stage": StageConfig(name="1qa", context_length=64, conversation_length=64, learning_rate=1.0, warmup_steps=0),
        "data": DataConfig(test={"mine": SourceConfig(kind="jsonl", path=str(output / "mine.jsonl"))}),
        "prompts": PROMPTS,
        "output": str(output / "out"),
        "batch_size": 2,
        "max_new_tokens": 6,
        "lengths": (10, 20, 40),
    }
    return EvaluationConfig(**{**values, **changes})


@pytest.fixture
def checkpoint(tmp_path: Path, make_backbone: Callable[..., Backbone]) -> str:
    torch.manual_seed(4)
    config = tiny_hypernetwork_config()
    save_hypernetwork(
        tmp_path / "checkpoint",
        Hypernetwork(config, make_backbone()).state_dict(),
        CheckpointInfo(BackboneConfig(path="x"), config),
    )
    return str(tmp_path / "checkpoint")


@pytest.fixture
def methods(tiny_backbone_folder: str, checkpoint: str, tmp_path: Path) -> dict[str, Method]:
    return {
        method.name: method for method in load_methods(evaluation_config(tiny_backbone_folder, tmp_path, checkpoint=checkpoint))
    }


def predict(method: Method, examples: list[Example], config: EvaluationConfig, *, conversations: bool) -> list[qa.Prediction]:
    """Batches of ``config.batch_size`` contexts, in the order given."""
    groups = chunks(examples, config.batch_size)
    values = {"kind": "jsonl", "conversations": conversations, "clock": qa.Clock()}
    return [found for group in groups for found in qa.predict(method, "s", group, config, **values)]


def recall(method: Method, config: EvaluationConfig) -> list[pretraining.Recall]:
    """Both tasks on all examples."""
    groups = [(task, group) for task in pretraining.TASKS for group in chunks(EXAMPLES, config.batch_size)]
    return [r for task, group in groups for r in pretraining.recall(method, "s", group, config, task=task, clock=qa.Clock())]


def write_examples(path: Path) -> None:
    rows = [
        {"id": e.id, "context": e.context, "turns": [{"question": t.question, "answers": list(t.answers)} for t in e.turns]}
        for e in EXAMPLES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_each_method_shows_the_backbone(methods: dict[str, Method]) -> None:
    asked = Asked(0, "Why?", history=(("Who?", "Ada"),))
    tail = [Message("assistant", "Ada"), Message("user", "Why?")]
    for method in methods.values():
        method.prepare([Example("a", "Ada is red.")])
    assert methods["shine"].messages(asked) == [Message("user", "Who?"), *tail]
    assert methods["only_question"].messages(asked) == [Message("system", "Be brief."), Message("user", "Who?"), *tail]
    opening = Message("user", "Text: Ada is red.\nQuestion: Who?")
    assert methods["in_context"].messages(asked) == [Message("system", "Be brief."), opening, *tail]


def test_the_control_answers_under_the_adapter_of_another_context(
    tiny_backbone_folder: str, checkpoint: str, tmp_path: Path
) -> None:
    """It says of one context what SHINE would say if it had read the other one."""
    config = evaluation_config(
        tiny_backbone_folder, tmp_path, checkpoint=checkpoint, methods=("shine", "shine_other"), batch_size=3
    )
    ours, other = load_methods(config)
    assert isinstance(ours, Shine)
    assert isinstance(other, Shine)
    assert ours.hypernetwork is other.hypernetwork
    found = predict(other, EXAMPLES, config, conversations=False)
    turned = [replace(e, context=EXAMPLES[(n + 1) % len(EXAMPLES)].context) for n, e in enumerate(EXAMPLES)]
    expected = predict(ours, turned, config, conversations=False)
    assert [each.prediction for each in found] == [each.prediction for each in expected]
    assert [each.prediction for each in found] != [each.prediction for each in predict(ours, EXAMPLES, config, conversations=False)]
    write_examples(tmp_path / "mine.jsonl")
    summary = evaluate(config)
    assert set(summary["sources"]["mine"]["differences"]) == {"shine - shine_other"}
    with pytest.raises(ValueError, match="needs another context beside each: give two contexts at least, and batch_size=3"):
        evaluate(replace(config, batch_size=1))
    with pytest.raises(ValueError, match="checkpoint: missing"):
        evaluate(replace(config, checkpoint=None, methods=("shine_other",)))


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(81, 16, [13, 14, 13, 14, 13, 14]), (5, 3, [2, 3]), (4, 3, [2, 2]), (2, 9, [2])]
)
def test_batches_are_of_like_size(count: int, size: int, sizes: list[int]) -> None:
    examples = tuple(Example(f"{n:02}", "x" * (n % 7), ()) for n in range(count))
    batches = ContextSet("jsonl", examples, "").batches(size, lambda example: len(example.context))
    assert [len(batch) for batch in batches] == sizes
    together = [example for batch in batches for example in batch]
    assert together == sorted(examples, key=lambda example: (len(example.context), example.id))


def test_shine_wears_an_adapter_and_the_baselines_get_the_prefix(
    tiny_backbone_folder: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = BackboneConfig(path=tiny_backbone_folder, dtype="float32", device="cpu", baseline_prefix="<think></think>")
    read: list[str] = []
    generate = Backbone.generate

    def spy(self: Backbone, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        read.extend(method.speaker.tokenizer.batch_decode(ids))
        return generate(self, ids, mask, **options)

    monkeypatch.setattr(Backbone, "generate", spy)
    for method in load_methods(evaluation_config(tiny_backbone_folder, tmp_path, checkpoint=checkpoint, backbone=backbone)):
        method.prepare([Example("a", "Ada is red.")])
        assert (method.worn([Asked(0, "Who?")]) is not None) == (method.name == "shine")
        method.answer([Asked(0, "Who?")], max_new_tokens=2, batch_size=2)
        assert read.pop().endswith("<|im_start|>assistant\n" + ("" if method.name == "shine" else "<think></think>"))


@pytest.mark.parametrize("conversations", [False, True], ids=["single", "turns"])
@pytest.mark.parametrize("name", ["shine", "in_context", "only_question"])
def test_batched_answers_are_those_of_one_by_one(
    methods: dict[str, Method], name: str, conversations: bool, tiny_backbone_folder: str, tmp_path: Path
) -> None:
    """Contexts of unlike length, questions of unlike number, batches of two: as if each were alone."""
    method = methods[name]
    two = evaluation_config(tiny_backbone_folder, tmp_path)
    together = predict(method, EXAMPLES, two, conversations=conversations)
    one = evaluation_config(tiny_backbone_folder, tmp_path, batch_size=1)
    alone = [prediction for example in EXAMPLES for prediction in predict(method, [example], one, conversations=conversations)]
    assert together == alone
    assert [(p.id, p.turn) for p in together] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("c", 0)]
    assert all(prediction.prediction for prediction in together)


def test_a_context_with_several_questions_is_encoded_once(
    methods: dict[str, Method], monkeypatch: pytest.MonkeyPatch, tiny_backbone_folder: str, tmp_path: Path
) -> None:
    method = methods["shine"]
    contexts: list[int] = []
    read = Backbone.memory_states

    def counting(self: Backbone, ids: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        contexts.append(len(ids))
        return read(self, ids, mask, **options)

    monkeypatch.setattr(Backbone, "memory_states", counting)
    config = evaluation_config(tiny_backbone_folder, tmp_path)
    predictions = predict(method, EXAMPLES, config, conversations=False)
    assert len(predictions) == 6
    assert contexts == [2, 1]
    assert method.encoded == 3


@pytest.mark.parametrize("history", ["own", "gold"])
def test_a_conversation_feeds_earlier_answers_back(
    history: str, methods: dict[str, Method], monkeypatch: pytest.MonkeyPatch, tiny_backbone_folder: str, tmp_path: Path
) -> None:
    seen: list[Asked] = []
    answer = Method.answer

    def recording(self: Method, asked: list[Asked], *, max_new_tokens: int, batch_size: int) -> list[str]:
        seen.extend(asked)
        return answer(self, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)

    monkeypatch.setattr(Method, "answer", recording)
    config = evaluation_config(tiny_backbone_folder, tmp_path, history=history)
    predictions = predict(methods["only_question"], EXAMPLES[:1], config, conversations=True)
    said = [p.prediction for p in predictions] if history == "own" else ["Ada", "red", "so"]
    assert [asked.history for asked in seen] == [(), (("Who?", said[0]),), (("Who?", said[0]), ("What color?", said[1]))]


def test_the_bytes_of_an_adapter_are_those_of_its_factors(methods: dict[str, Method]) -> None:
    """Four for each value of float32: rank 2 times what goes in and comes out of each linear that it is for."""
    for method in methods.values():
        method.prepare(EXAMPLES)
    model, lora = methods["shine"].speaker.backbone.model, methods["shine"].lora
    assert lora is not None
    linears: list[Any] = [model.get_submodule(path) for path in lora]
    assert methods["shine"].adapter_bytes == sum(4 * 2 * (linear.in_features + linear.out_features) for linear in linears)
    assert methods["in_context"].adapter_bytes == methods["only_question"].adapter_bytes == 0


def test_recall_loss_is_that_of_the_text_and_its_end(methods: dict[str, Method], tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Against a forward pass written out by hand, for SHINE and both tasks."""
    method = methods["shine"]
    config = evaluation_config(tiny_backbone_folder, tmp_path)
    results = {(r.id, r.task): r for r in recall(method, config)}
    assert set(results) == {(example.id, task) for example in EXAMPLES for task in pretraining.TASKS}
    tokenizer = tiny_tokenizer()
    for example in EXAMPLES:
        method.prepare([example])
        messages = [Message("user", "<RECON>"), Message("assistant", example.context)]
        encoded = encode_conversation(tokenizer, messages)
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            logits = method.speaker.backbone.logits(method.speaker.backbone.hidden(ids, None, lora=method.lora))[0]
        # The newline after the end token is a label in training; what counts here is the text and its end.
        labels = torch.tensor(encoded.labels)[1:-1]
        expected = F.cross_entropy(logits[:-2], labels, reduction="mean")
        result = results[example.id, "reconstruct"]
        assert result.loss == pytest.approx(float(expected), rel=1e-4)
        assert result.context_tokens == len(token_ids(tokenizer, example.context))
        assert bucket(result.context_tokens, (10, 20, 40)) == min(b for b in (10, 20, 40) if b >= result.context_tokens)
        assert result.tokens == result.context_tokens + 1


def test_the_logits_of_one_text_at_a_time_are_held(
    methods: dict[str, Method], tiny_backbone_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three texts side by side: those of all at once would not fit beside a large vocabulary."""
    method, rows, logits = methods["in_context"], [], Backbone.logits

    def counting(self: Backbone, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[:-1].numel())
        return logits(self, hidden)

    monkeypatch.setattr(Backbone, "logits", counting)
    method.prepare(EXAMPLES)
    pretraining._losses(method, [Asked(n, "Again!") for n in range(3)], EXAMPLES)
    assert rows == [len(token_ids(tiny_tokenizer(), example.context)) + 1 for example in EXAMPLES]


def test_exact_prefix_of_generation_is_that_of_teacher_forcing(
    methods: dict[str, Method], tiny_backbone_folder: str, tmp_path: Path
) -> None:
    method = methods["in_context"]
    config = evaluation_config(tiny_backbone_folder, tmp_path)
    for result in recall(method, config):
        example = next(e for e in EXAMPLES if e.id == result.id)
        visible = pretraining._visible(example, result.task, config.seed)
        method.prepare([replace(example, context=visible)])
        question = PROMPTS.repeat if result.task == "reconstruct" else PROMPTS.complete
        prompt = encode_prompt(method.speaker.tokenizer, method.messages(Asked(0, question)))
        target = token_ids(method.speaker.tokenizer, example.context)
        with torch.no_grad():
            logits = method.speaker.backbone.logits(
                method.speaker.backbone.hidden(torch.tensor([prompt + target]), None, lora=None)
            )[0]
        right = (logits[len(prompt) - 1 : -1].argmax(-1) == torch.tensor(target)).tolist()
        assert result.exact_prefix == pytest.approx((right.index(False) if False in right else len(right)) / len(target))


def test_summaries_weigh_tokens_and_texts() -> None:
    first = pretraining.Recall("s", "shine", "x", "reconstruct", 3, 4, 1.0, 0.5, 0.0, 0.2, "")
    other = pretraining.Recall("s", "shine", "y", "reconstruct", 11, 12, 3.0, 1.0, 1.0, 1.0, "")
    completions = [pretraining.Recall("s", "shine", "x", "complete", 3, 4, 2.0, 0.0, 0.0, 0.0, "")]
    summary: Any = summarise_recall([asdict(row) for row in (first, other, *completions)], bounds=(10, 20))
    assert summary["reconstruct"]["perplexity"] == pytest.approx(math.exp((1.0 * 4 + 3.0 * 12) / 16))
    assert summary["reconstruct"]["exact_prefix"] == 75.0
    assert summary["reconstruct"]["lengths"]["20"]["em"] == 100.0
    assert summary["complete"]["perplexity"] == pytest.approx(math.exp(2.0))
    assert summary["texts"] == 2


@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
def test_an_evaluation_writes_every_prediction_and_a_summary(
    stage: Any, tiny_backbone_folder: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_examples(tmp_path / "mine.jsonl")
    stage_values = StageConfig(name=stage, context_length=20, conversation_length=64, learning_rate=1.0, warmup_steps=0)
    evaluate(evaluation_config(tiny_backbone_folder, tmp_path, checkpoint=checkpoint, stage=stage_values))
    rows = [json.loads(line) for line in (tmp_path / "out" / PREDICTIONS_FILE).read_text().splitlines()]
    assert len(rows) == 3 * 6
    summary = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    found = summary["sources"]["mine"]
    assert "1 contexts cut (19 tokens)" in found["tally"]
    for name in ("shine", "in_context", "only_question"):
        mine = [row for row in rows if row["method"] == name]
        assert found["methods"][name]["em"] == pytest.approx(100 * sum(row["em"] for row in mine) / len(mine))
        assert found["methods"][name]["f1"] == pytest.approx(100 * sum(row["f1"] for row in mine) / len(mine))
    assert found["methods"]["shine"]["contexts_encoded"] == (6 if stage == "pretrain" else 3)
    table = capsys.readouterr().out
    assert all(title in table for title in ("SHINE", "In-Context", "Only Question", "F1"))


def test_bad_input_names_the_remedy(tiny_backbone_folder: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"context": "Ada is red."}\n')
    with pytest.raises(ValueError, match="set checkpoint=<directory>, or leave SHINE out"):
        evaluate(evaluation_config(tiny_backbone_folder, tmp_path))
    with pytest.raises(ValueError, match=r"data\.test\.mine: nothing to ask"):
        evaluate(evaluation_config(tiny_backbone_folder, tmp_path, methods=("only_question",)))


@pytest.mark.parametrize("stage", ["pretrain", "mqa", "1qa"])
def test_each_stage_asks_in_its_own_way(
    stage: Any, tiny_backbone_folder: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations remember, single questions do not, and a text may be given back to its last token."""
    write_examples(tmp_path / "mine.jsonl")
    asked: list[Asked] = []
    most: list[int] = []
    answer_ids = Method.answer_ids

    def spy(self: Method, questions: list[Asked], *, max_new_tokens: int, batch_size: int) -> list[list[int]]:
        asked.extend(questions)
        most.append(max_new_tokens)
        return answer_ids(self, questions, max_new_tokens=max_new_tokens, batch_size=batch_size)

    monkeypatch.setattr(Method, "answer_ids", spy)
    values = StageConfig(name=stage, context_length=200, conversation_length=64, learning_rate=1.0, warmup_steps=0)
    evaluate(evaluation_config(tiny_backbone_folder, tmp_path, checkpoint=checkpoint, stage=values, methods=("shine",)))
    turns = sorted(len(question.history) for question in asked)
    assert turns == ([0, 0, 0, 1, 1, 2] if stage == "mqa" else [0] * 6)
    if stage == "pretrain":
        assert {question.question for question in asked} == {"<RECON>", "<COMP>"}
        assert max(most) >= max(len(example.context.encode()) for example in EXAMPLES)


def test_answers_that_had_not_ended_are_counted(tiny_backbone_folder: str, checkpoint: str, tmp_path: Path) -> None:
    write_examples(tmp_path / "mine.jsonl")
    stage = StageConfig(name="1qa", context_length=200, conversation_length=64, learning_rate=1.0, warmup_steps=0)
    config = evaluation_config(tiny_backbone_folder, tmp_path, checkpoint=checkpoint, stage=stage, max_new_tokens=1)
    found = evaluate(config)["sources"]["mine"]["methods"]
    rows = [json.loads(line) for line in (tmp_path / "out" / PREDICTIONS_FILE).read_text().splitlines()]
    for name, scores in found.items():
        assert scores["cut"] == sum(row["cut"] for row in rows if row["method"] == name)
    assert any(row["cut"] for row in rows), "random weights do not end an answer after one token"


def test_a_context_is_cut_between_characters(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Four bytes, hence four tokens a character: a limit of six leaves one whole character."""
    tally = Tally()
    example = Example("x", "🙂🙃🙂", (Turn("Who?", ("Ada",)),))
    kept = list(qa.usable_examples([example], tiny_tokenizer(), context_length=6, questions=True, tally=tally))
    assert [found.context for found in kept] == ["🙂"]
    assert (tally.contexts_cut, tally.context_tokens_dropped) == (1, 6)


def test_the_record_holds_what_was_scored(
    tiny_backbone_folder: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configured rank that is not the checkpoint's is said, and the summary has the checkpoint's."""
    write_examples(tmp_path / "mine.jsonl")
    run = Path(checkpoint).parent
    other = tiny_hypernetwork_config(rank=3)
    summary = evaluate(evaluation_config(tiny_backbone_folder, tmp_path, checkpoint=str(run), hypernetwork=other))
    assert summary["config"]["hypernetwork"]["rank"] == 2
    assert summary["config"]["checkpoint"] == checkpoint
    said = capsys.readouterr().out
    assert f"hypernetwork: {checkpoint}" in said
    assert "as it was trained, not as configured" in said


def test_smoothing_looks_to_both_sides_as_far_as_there_is() -> None:
    assert smooth([4.0, 2.0, 0.0, 4.0], 1) == [3.0, 2.0, 2.0, 2.0]
    assert smooth([1.0, 5.0], 0) == [1.0, 5.0]
