"""An evaluation from a configuration to files: predictions as JSONL, a summary as JSON, a table on the console."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from shine.chat import token_counter, token_ids
from shine.checkpoint import (
    check_backbone,
    effective_config,
    find_checkpoint,
    introduce,
    load_hypernetwork,
    output_folder,
    read_weights,
)
from shine.config import EvaluationConfig, MethodName
from shine.data.batching import even_chunks
from shine.data.examples import Example
from shine.data.sources import look_into, read_named
from shine.data.tally import Tally
from shine.evaluation import pretraining, qa, scores
from shine.evaluation.fine_tuning import FineTuned, Lessons
from shine.evaluation.methods import InContext, InContextTuned, Method, Shine, ShineOther, Speaker
from shine.evaluation.results import PREDICTIONS_FILE, SUMMARY_FILE, Key, ResultFolder, Row, Unit
from shine.evaluation.tables import answer_table, recall_table, show, way_table
from shine.files import file_written_beside
from shine.fingerprint import fingerprint
from shine.host_memory import keep_freed_memory
from shine.hypernetwork import Hypernetwork
from shine.loading import load_backbone, with_dtype
from shine.lora import LoRA
from shine.training.distributed import Ranks, join_ranks
from shine.training.provenance import versions
from shine.training.reader import read_reader

_PACKAGE = Path(__file__).resolve().parent.parent
CODE = tuple(
    _PACKAGE / f"{name}.py"
    for name in (
        *("attention", "backbone", "chat", "hypernetwork", "lora", "m2p", "metrics", "norms", "prompt_cache", "wearing"),
        *("loading", "pretrained", "zoo"),
        *(f"data/{part}" for part in ("batching", "pieces", "samples")),
        *(f"evaluation/{part}" for part in ("fine_tuning", "methods", "pretraining", "qa", "run")),
        "training/reader",
    )
)
"""What predictions and their scores follow from beside the plan's values: a folder that other code has begun is begun again."""
LIBRARIES = ("torch", "transformers", "tokenizers", "rouge")
"""Whose versions count likewise."""
HYPERNETWORK_METHODS: Mapping[MethodName, type[Shine]] = {"shine": Shine, "shine_other": ShineOther}
"""Those that need a checkpoint."""
SAY_EVERY = 30.0
"""Seconds between two lines about how far it is."""


@dataclass(frozen=True)
class TestSet:
    """One source as it is asked about: its examples in their own order, and what was cut or skipped."""

    kind: str
    examples: tuple[Example, ...]
    tally: str

    def digest(self, more: str = "") -> str:
        """What tells these examples, in this order, from others; ``more`` is what else the predictions' inputs follow from."""
        return hashlib.sha256(repr((self.kind, self.examples, more)).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def batches(self, size: int, length: Callable[[Example], int]) -> list[Sequence[Example]]:
        """Contexts of one length together, so that little is padded, at most ``size``; as many in each, so that none is alone."""
        return even_chunks(sorted(self.examples, key=lambda example: (length(example), example.id)), size)


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Score every method on every test source the way the stage asks for, and return the summary that was written.

    Stage ``pretrain`` gives texts back, ``mqa`` holds conversations, ``1qa`` asks single questions. An evaluation that was killed
    goes on where it stopped; under ``torchrun`` the ranks share the work.

    Raises:
        ValueError: SHINE is to be scored and there is no checkpoint, a source is missing or has nothing to ask.
    """
    with join_ranks(config.backbone.device) as ranks:
        say: Callable[[str], None] = (lambda text: print(text, flush=True)) if ranks.first else (lambda text: None)
        output = output_folder(config.output)
        look_into(config.data.test, "data.test")
        config = with_checkpoint(config, say=say)
        # One type for all answers, whatever the machines of the ranks are good at.
        backbone = ranks.ask_first(lambda: with_dtype(config.backbone, ranks=ranks.local_size))
        config = replace(config, backbone=backbone)
        with ranks.one_by_one():
            methods = load_methods(config)
        sets = read_sets(config, methods[0].speaker, say=say)
        _check_lessons(config, methods, sets, say=say)
        folder = ResultFolder(output, *_plan(config, methods, sets))
        try:
            return _Evaluation(config, methods, sets, folder, ranks, say).run()
        finally:
            folder.release()


def with_checkpoint(config: EvaluationConfig, *, say: Callable[[str], None]) -> EvaluationConfig:
    """The configuration with the directory that its checkpoint means and the hypernetwork that lies there, both said."""
    if not _needs_checkpoint(config):
        return config
    if config.checkpoint is None:
        raise ValueError("checkpoint: missing; set checkpoint=<directory>, or leave SHINE out: methods=[in_context,only_question]")
    directory = find_checkpoint(config.checkpoint)
    for line in introduce(directory, config.hypernetwork):
        say(line)
    return replace(config, checkpoint=str(directory), hypernetwork=effective_config(directory, config.hypernetwork))


def load_methods(config: EvaluationConfig) -> list[Method]:
    """The methods of an evaluation (see `with_checkpoint`), sharing one backbone."""
    backbone, tokenizer = load_backbone(config.backbone, targets=config.hypernetwork.targets)
    keep_freed_memory(backbone.device)
    speaker = Speaker(backbone, tokenizer, config.prompts, config.backbone.baseline_prefix)
    # One for both methods that have it.
    hypernetwork = functools.cache(lambda: _hypernetwork(config, speaker))
    return [method for name in config.methods for method in _methods(name, config, speaker, hypernetwork)]


def _needs_checkpoint(config: EvaluationConfig) -> bool:
    return not HYPERNETWORK_METHODS.keys().isdisjoint(config.methods)


def _hypernetwork(config: EvaluationConfig, speaker: Speaker) -> Hypernetwork:
    assert config.checkpoint is not None
    hypernetwork = load_hypernetwork(config.checkpoint, speaker.backbone, config=config.hypernetwork)
    check_backbone(config.checkpoint, config=config.backbone, found=fingerprint(speaker.backbone.model, speaker.tokenizer))
    return hypernetwork


def _methods(
    name: MethodName, config: EvaluationConfig, speaker: Speaker, hypernetwork: Callable[[], Hypernetwork]
) -> Iterator[Method]:
    if name in HYPERNETWORK_METHODS:
        yield HYPERNETWORK_METHODS[name](name, speaker, hypernetwork())
    elif name == "in_context":
        yield InContext(name, speaker)
    elif name == "in_context_tuned":
        assert config.reader is not None
        yield InContextTuned(name, speaker, read_reader(config.reader, speaker.backbone))
    elif name == "only_question":
        yield Method(name, speaker)
    else:
        tuning = config.fine_tuning
        lessons = Lessons() if tuning.source is None else Lessons.read(read_named({"source": tuning.source}, "fine_tuning"))
        for count, epochs in product(tuning.conversations, tuning.epochs):
            label = f"{name}:{count}x{epochs}"
            yield FineTuned(label, speaker, tuning, count=count, epochs=epochs, lessons=lessons)


def read_sets(config: EvaluationConfig, speaker: Speaker, *, say: Callable[[str], None]) -> dict[str, TestSet]:
    """Every test source, cut to the context length."""
    sets: dict[str, TestSet] = {}
    asks = config.stage.name != "pretrain"
    for name, source in config.data.test.items():
        tally = Tally()
        found = read_named({name: source}, "data.test", tokens=token_counter(speaker.tokenizer), tally=tally)
        try:
            examples = tuple(
                qa.usable_examples(
                    found, speaker.tokenizer, context_length=config.stage.context_length, questions=asks, tally=tally
                )
            )
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith("data.test") else f"data.test.{name}: {error}") from None
        if not examples:
            wanted = "questions" if asks else "texts"
            raise ValueError(f"data.test.{name}: nothing to ask ({tally}); give a source that holds {wanted}")
        told = "; ".join(filter(None, (str(tally), qa.golds_left_out(source) if asks else "")))
        say(f"{name}: {told}")
        sets[name] = TestSet(source.kind, examples, told)
    return sets


def _check_lessons(
    config: EvaluationConfig, methods: Sequence[Method], sets: Mapping[str, TestSet], *, say: Callable[[str], None]
) -> None:
    """Before anything is computed: is there what fine-tuning is to learn? Where there is less, it is said."""
    tuned = [method for method in methods if isinstance(method, FineTuned)]
    if config.stage.name == "pretrain" and any(method.count for method in tuned):
        raise ValueError(
            "fine_tuning.conversations: a text that is to be given back is learned alone, for conversations would tell the "
            "end that a completion hides; set fine_tuning.conversations=[0]"
        )
    for (source, found), method in product(sets.items(), tuned):
        learned = method.learned(source, found.examples)
        if learned["fewest"] < method.count:
            say(f"{source}: {method.name} learns {learned['mean']:.1f} conversations an adapter, for there are no more")


def _plan(
    config: EvaluationConfig, methods: Sequence[Method], sets: Mapping[str, TestSet]
) -> tuple[list[Unit], list[Key], dict[str, Any]]:
    """The units of work, the order of all predictions, and what these follow from."""
    tokenizer = methods[0].speaker.tokenizer
    tasks = pretraining.TASKS if config.stage.name == "pretrain" else ("",)
    units: list[Unit] = []
    order: list[Key] = []
    digest = hashlib.sha256()
    for source, found in sets.items():
        lengths = {example.id: len(token_ids(tokenizer, example.context)) for example in found.examples}
        batches = found.batches(config.batch_size, lambda example, lengths=lengths: lengths[example.id])  # type: ignore[misc]
        for method, task in product(methods, tasks):
            units += [Unit(len(units) + n, source, method.name, tuple(batch), task) for n, batch in enumerate(batches)]
            order += Unit(0, source, method.name, found.examples, task).predictions()
        digest.update(repr((source, found)).encode("utf-8", "surrogatepass"))
    # All fine-tuned methods learn from the same.
    lessons = [method.lessons for method in methods if isinstance(method, FineTuned)][:1]
    digest.update(repr(lessons).encode("utf-8", "surrogatepass"))
    scored = config.checkpoint if _needs_checkpoint(config) else None
    weights = weights_digest(scored, [method.reader for method in methods if isinstance(method, InContextTuned)])
    values = asdict(config)
    for key in ("output", "checkpoint", "reader", "data", "resume"):
        values.pop(key)
    model = str(fingerprint(methods[0].speaker.backbone.model, tokenizer))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in CODE)).hexdigest()[:16]
    plan = {"config": values, "examples": digest.hexdigest()[:16], "weights": weights, "backbone": model}
    return units, order, {**plan, "code": code, "libraries": {name: version(name) for name in LIBRARIES}}


def weights_digest(checkpoint: str | Path | None, readers: Iterable[LoRA]) -> str:
    """What tells the trained weights of an evaluation from others: those of a checkpoint, and readers as they are worn."""
    digest = hashlib.sha256()
    if checkpoint is not None:
        _add_tensors(digest, read_weights(checkpoint))
    for reader in readers:
        for index in range(2):
            _add_tensors(digest, {path: pair[index] for path, pair in reader.items()})
    return digest.hexdigest()[:16]


def _add_tensors(digest: hashlib._Hash, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def spread(lora: LoRA) -> dict[str, Any]:
    """Of the adapters of one batch: the cosine of every two, as `LoRA.pair_cosines` has them, and the sum of effective ranks."""
    return {
        "cosines": [round(value, 5) for value in lora.pair_cosines().tolist()],
        "effective_ranks": float(lora.effective_rank()) * lora.batch,
        "adapters": lora.batch,
    }


class _Evaluation:
    """One evaluation on one rank."""

    def __init__(
        self,
        config: EvaluationConfig,
        methods: Sequence[Method],
        sets: Mapping[str, TestSet],
        folder: ResultFolder,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.sets, self.folder, self.ranks, self.say = config, sets, folder, ranks, say
        self.methods = {method.name: method for method in methods}

    def run(self) -> dict[str, Any]:
        """Compute what is missing, a share on each rank, and let the first rank sum it up."""
        done, note = self.ranks.ask_first(lambda: self.folder.open(resume=self.config.resume))
        if note:
            self.say(note)
        todo = [unit for unit in self.folder.units if unit.number not in done]
        device = next(iter(self.methods.values())).speaker.backbone.device
        said = time.perf_counter()
        for start in range(0, len(todo), self.ranks.size):
            if start + self.ranks.rank < len(todo):
                self._compute(todo[start + self.ranks.rank])
            # In step, so that no rank waits at the end for longer than ranks may wait for each other.
            self.ranks.largest(0, device=device)
            if time.perf_counter() - said > SAY_EVERY:
                said = time.perf_counter()
                self.say(f"{min(start + self.ranks.size, len(todo))} of {len(todo)} batches")
        return self.ranks.gather(self._finish() if self.ranks.first else None)[0] or {}

    def _compute(self, unit: Unit) -> None:
        method, config, clock = self.methods[unit.method], self.config, qa.Clock()
        encoded, made = method.encoded, method.made
        rows: Sequence[pretraining.Recall | qa.Prediction]
        if unit.task:
            rows = pretraining.recall(method, unit.source, unit.examples, config, task=unit.task, clock=clock)
        else:
            kind, talk = self.sets[unit.source].kind, config.stage.name == "mqa"
            rows = qa.predict(method, unit.source, unit.examples, config, kind=kind, conversations=talk, clock=clock)
        timing = {
            "encode": clock.encode,
            "answer": clock.answer,
            "encoded": method.encoded - encoded,
            "made": method.made - made,
            "asked": len(rows),
            "adapter_bytes": method.adapter_bytes,
        }
        if isinstance(method, Shine) and method.lora is not None:
            timing |= spread(method.lora)
        self.folder.append(self.ranks.rank, unit, [asdict(row) for row in rows], timing)

    def _finish(self) -> dict[str, Any]:
        rows, output, config = self.folder.close(), self.folder.folder, self.config
        summary = {
            "stage": config.stage.name,
            "config": asdict(config),
            "backbone": self.folder.plan["backbone"],
            "versions": versions(),
            "sources": {name: self._summarise(name, found, rows) for name, found in self.sets.items()},
        }
        with file_written_beside(output / SUMMARY_FILE) as file:
            file.write((json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
        if config.stage.name == "pretrain":
            show(recall_table(summary))
        else:
            show(answer_table(summary))
            if (gone := way_table(summary)) is not None:
                show(gone)
        print(f"every prediction: {output / PREDICTIONS_FILE}\nsummary: {output / SUMMARY_FILE}", flush=True)
        return summary

    def _summarise(self, source: str, found: TestSet, rows: Sequence[Row]) -> dict[str, Any]:
        bounds = sorted({*self.config.lengths, self.config.stage.context_length})
        recalled = self.config.stage.name == "pretrain"
        summarise = scores.summarise_recall if recalled else scores.summarise_answers
        timings = [row for row in self.folder.timings() if row["source"] == source]
        methods: dict[str, Any] = {}
        mine: dict[str, list[Row]] = {}
        for name, method in self.methods.items():
            mine[name] = [row for row in rows if (row["source"], row["method"]) == (source, name)]
            result = summarise(mine[name], bounds=bounds)
            mine_timed = [row for row in timings if row["method"] == name]
            methods[name] = {**result, **scores.summarise_times(mine_timed, result), **scores.summarise_adapters(mine_timed)}
            if isinstance(method, FineTuned):
                methods[name]["conversations_learned"] = method.learned(source, found.examples)
        compared = scores.compare_recall(mine) if recalled else scores.compare_methods(mine, methods)
        # What a completion hides follows from the seed.
        data = found.digest(str(self.config.seed) if recalled else "")
        return {"kind": found.kind, "tally": found.tally, "examples": data, "methods": methods, **compared}
