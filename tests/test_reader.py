"""The tuned reader: what it sees, that it learns, how it is scored; and learning from an in-context teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config, tiny_tokenizer
from runs import losses_of, stage_config, stage_samples, train_config
from test_evaluation import EXAMPLES, evaluation_config, write_examples
from torch.nn import functional as F

from shine.backbone import Backbone
from shine.chat import IGNORE, Message, encode_conversation, encode_prompt
from shine.cli.main import main
from shine.config import DistillationConfig
from shine.data.batching import collate
from shine.data.samples import Sample
from shine.evaluation.methods import Asked, InContextTuned
from shine.evaluation.run import evaluate, load_methods
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA
from shine.training.distillation import Targets, Teacher, with_rest
from shine.training.losses import label_losses
from shine.training.reader import in_prompt, read_reader, starting_lora
from shine.training.stage import train
from shine.training.tuning import train_reader


def random_lora(backbone: Backbone, *, rank: int = 2, std: float = 0.3) -> LoRA:
    generator = torch.Generator().manual_seed(8)
    lora = starting_lora(backbone, rank=rank, generator=generator)
    return LoRA({path: (a.detach(), torch.randn(b.shape, generator=generator) * std) for path, (a, b) in lora.items()})


def test_the_context_stands_in_a_system_turn() -> None:
    tokenizer = tiny_tokenizer()
    asked = [Message("user", "Who?"), Message("assistant", "Ada")]
    plain = encode_conversation(tokenizer, asked)
    context = encode_conversation(tokenizer, [Message("system", "Ada is red.")]).input_ids
    sample = Sample("a", tokenizer("Ada is red.", add_special_tokens=False)["input_ids"], plain.input_ids, plain.labels)
    shown = in_prompt(sample, tokenizer)
    whole = encode_conversation(tokenizer, [Message("system", "Ada is red."), *asked])
    assert (shown.input_ids, shown.labels) == (whole.input_ids, whole.labels)
    assert shown.labels[: len(context)] == [IGNORE] * len(context)
    assert len(shown.context_ids) == 1


def test_a_lora_that_starts_changes_nothing_and_is_the_seeds(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    first, second, other = (starting_lora(backbone, rank=3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(backbone.hidden(ids, None, lora=first), backbone.hidden(ids, None, lora=None))
    path = next(iter(first))
    assert torch.equal(first[path][0], second[path][0])
    assert not torch.equal(first[path][0], other[path][0])
    assert first[path][0].shape == (1, 32, 3)


def test_it_learns_to_read_and_is_scored(tiny_backbone_folder: str, tmp_path: Path) -> None:
    """Trained on worlds, saved, loaded by the evaluation; what it says depends on the context in the prompt."""
    stage = stage_config("mqa", steps=30, batch_size=4, micro_batch_size=2, learning_rate=2e-2)
    said: list[str] = []
    made = train_reader(train_config(tiny_backbone_folder, tmp_path / "run", stage=stage), rank=4, alpha=8.0, say=said.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in said if line.startswith("reader ")]
    assert losses == pytest.approx(made.losses, rel=1e-3)
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 2
    reader = str(made.lora.save(tmp_path / "reader"))
    write_examples(tmp_path / "mine.jsonl")
    config = evaluation_config(tiny_backbone_folder, tmp_path, methods=("in_context_tuned", "only_question"), reader=reader)
    (method, question) = load_methods(config)
    assert isinstance(method, InContextTuned)
    method.prepare(EXAMPLES)
    asked = Asked(1, "Where?", history=(("Who?", "Bo"),))
    shown = [Message("system", EXAMPLES[1].context), Message("user", "Who?"), Message("assistant", "Bo"), Message("user", "Where?")]
    assert method.prompt(asked) == encode_prompt(method.speaker.tokenizer, shown)
    with torch.no_grad():
        ids = torch.tensor([method.prompt(asked)])
        worn, plain = (method.speaker.backbone.hidden(ids, None, lora=lora) for lora in (method.worn([asked]), None))
    assert not torch.allclose(worn, plain, atol=1e-3)
    summary = evaluate(config)
    scored = summary["sources"]["mine"]["methods"]
    assert set(scored) == {"in_context_tuned", "only_question"}
    assert scored["in_context_tuned"]["questions"] == scored["only_question"]["questions"] == 6
    assert scored["in_context_tuned"]["contexts_encoded"] == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"in_context_tuned", "only_question"}
    assert question.lora is None


def test_what_a_reader_learned_stands_beside_it(tmp_path: Path) -> None:
    """Its data without the paths of the machine, its seed, and a loss for each step."""
    rows = [{"context": f"Bo has {n} cats.", "turns": [{"question": "How many?", "answers": [str(n)]}]} for n in range(4)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["experiment=cpu_world", "stage=mqa", "data=jsonl", f"data.train.mine.path={tmp_path / 'mine.jsonl'}", "seed=5"]
    sizes = ["stage.steps=2", "stage.batch_size=2", "stage.micro_batch_size=2"]
    main(["tune-reader", str(tmp_path / "reader"), *words, *sizes])
    told = json.loads((tmp_path / "reader" / "training.json").read_text())
    assert told["data"]["mine"]["kind"] == "jsonl"
    assert "path" not in told["data"]["mine"]
    assert str(tmp_path) not in json.dumps(told)
    assert (told["seed"], told["stage"]["name"], len(told["losses"])) == (5, "mqa", 2)


def test_another_reader_is_another_plan(tiny_backbone_folder: str, tmp_path: Path, make_backbone: Callable[..., Backbone]) -> None:
    """Predictions of one reader are never taken for those of another in its place."""
    write_examples(tmp_path / "mine.jsonl")
    plans = []
    for std in (0.3, 0.4):
        reader = str(random_lora(make_backbone(), std=std).save(tmp_path / "reader"))
        evaluate(evaluation_config(tiny_backbone_folder, tmp_path, methods=("in_context_tuned",), reader=reader))
        plans.append(json.loads((tmp_path / "out" / "plan.json").read_text())["weights"])
    assert plans[0] != plans[1]


def test_a_reader_that_does_not_fit_is_refused(tiny_backbone_folder: str, tmp_path: Path, make_backbone: Any) -> None:
    write_examples(tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match="needs reader=<folder>: make one with shine tune-reader"):
        evaluation_config(tiny_backbone_folder, tmp_path, methods=("in_context_tuned",))
    lora = random_lora(make_backbone())
    path = next(iter(lora))
    odd = LoRA({**lora.weights, path: (lora[path][0][:, :-1], lora[path][1])})
    odd.save(tmp_path / "odd")
    with pytest.raises(ValueError, match=rf"reader=.*odd: {path} does not fit this backbone"):
        read_reader(str(tmp_path / "odd"), make_backbone())


def test_the_divergence_is_that_of_both_distributions() -> None:
    """Against the sum over the whole vocabulary, which it equals where all tokens are among the most likely ones."""
    generator = torch.Generator().manual_seed(0)
    teacher, model = (torch.randn(5, 9, generator=generator) * 3 for _ in range(2))
    p, q = (logits.softmax(-1) for logits in (teacher, model))
    whole = (p * (p.log() - q.log())).sum(-1)
    logs, ids = teacher.log_softmax(-1).topk(9)
    assert torch.allclose(Targets(ids, with_rest(logs), 1.0).divergence(model), whole, atol=1e-4)
    # Three tokens and the rest: the same sum over four outcomes.
    logs, ids = teacher.log_softmax(-1).topk(3)
    four = [torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1) for x in (p, q)]
    merged = (four[0] * (four[0] / four[1]).log()).sum(1)
    found = Targets(ids, with_rest(logs), 0.25)
    assert torch.allclose(found.divergence(model), merged, atol=1e-5)
    assert bool((merged <= whole + 1e-6).all())
    losses = torch.arange(5.0)
    assert torch.allclose(found.mixed_into(losses, model), 0.75 * losses + 0.25 * merged, atol=1e-5)
    assert torch.allclose(found.divergence(teacher), torch.zeros(5), atol=1e-5)


def test_the_teacher_sees_the_context(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    """Its targets are the plain model's at the answers after context and conversation, with and without a reader."""
    backbone, tokenizer, samples = make_backbone(), tiny_tokenizer(), stage_samples("mqa", 3)
    reader = str(random_lora(backbone).save(tmp_path / "reader"))
    for path in (None, reader):
        found = Teacher(backbone, tokenizer, DistillationConfig(top=4, reader=path)).targets(samples)
        rows = []
        for sample in samples:
            shown = in_prompt(sample, tokenizer)
            lora = None if path is None else LoRA.load(path)
            with torch.no_grad():
                hidden = backbone.hidden(torch.tensor([shown.input_ids]), None, lora=lora)
                logits = backbone.logits(hidden)[0].float().log_softmax(-1)
            rows += [logits[place - 1] for place, label in enumerate(shown.labels) if label != IGNORE]
        top = torch.stack(rows).topk(4)
        assert torch.equal(found.ids, top.indices)
        assert torch.allclose(found.logs[:, :4], top.values, atol=1e-4)
        assert torch.allclose(found.logs.exp().sum(1), torch.ones(len(rows)), atol=1e-5)


def test_a_run_learns_from_it(tiny_backbone_folder: str, tmp_path: Path, make_backbone: Callable[..., Backbone]) -> None:
    """The first loss is the mixture, computed another way; the loss of validation stays that of the labels."""
    stage = stage_config("mqa", steps=2, batch_size=2, micro_batch_size=1, warmup_steps=0)
    taught = replace(stage, distillation=DistillationConfig(share=0.4, top=5))
    plain = train_config(tiny_backbone_folder, tmp_path / "plain", stage=stage)
    train(plain)
    train(replace(plain, output=str(tmp_path / "taught"), stage=taught))
    first, mixed = (losses_of(tmp_path / name)[0] for name in ("plain", "taught"))
    assert mixed != first
    backbone, tokenizer = make_backbone(), tiny_tokenizer()
    hypernetwork = Hypernetwork(tiny_hypernetwork_config(), backbone)
    samples = stage_samples("mqa", 2)
    batch = collate(samples, pad_id=0)
    targets = Teacher(backbone, tokenizer, DistillationConfig(share=0.4, top=5)).targets(samples)
    with torch.no_grad():
        labels, _ = label_losses(hypernetwork, backbone, batch)
        both, _ = label_losses(hypernetwork, backbone, batch, targets)
        lora = hypernetwork(backbone, batch.context_ids, batch.context_mask)
        logits = backbone.label_logits(batch.input_ids, batch.input_mask, label_positions=batch.label_positions, lora=lora)
    assert torch.allclose(labels, F.cross_entropy(logits, batch.label_ids, reduction="none"))
    assert torch.allclose(both, 0.6 * labels + 0.4 * targets.divergence(logits))
    assert math.isfinite(mixed)
