"""The samples of a stage from its configured sources, through the index on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shine.chat import token_counter
from shine.config import SourceConfig, StageConfig, TaskTokens
from shine.data.examples import Example
from shine.data.index import code_fingerprint, data_fingerprint, indexed, tokenizer_fingerprint
from shine.data.samples import AnswerSamples, PretrainSamples, StageSamples
from shine.data.sources import read_named
from shine.data.tally import Tally


def build_samples(
    sources: Mapping[str, SourceConfig],
    place: str,
    tokenizer: PreTrainedTokenizerBase,
    stage: StageConfig,
    *,
    task_tokens: TaskTokens,
    seed: int,
    say: Callable[[str], None] = print,
) -> StageSamples:
    """The samples of a stage, read and tokenised once for each tokenizer, budget and state of the data (see `shine.data.index`).

    Args:
        place: where the sources stand in the configuration, for messages.
        say: told what is built.

    Raises:
        ValueError: a source cannot be read or changes meanwhile, or the sources hold nothing that this stage can use.
    """
    key: dict[str, Any] = {
        "sources": [data_fingerprint(source) for source in sources.values()],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "stage": [stage.name, stage.context_length, stage.conversation_length],
        "task_tokens": asdict(task_tokens) if stage.name == "pretrain" else None,
        "code": code_fingerprint(),
    }

    def build(folder: Path) -> Mapping[str, Any]:
        skipped = Tally()
        examples = read_named(sources, place, tokens=token_counter(tokenizer), tally=skipped)
        samples = samples_of(examples, tokenizer, stage, task_tokens=task_tokens, seed=seed, folder=folder)
        if (changed := [data_fingerprint(source) for source in sources.values()]) != key["sources"]:
            name = next(name for name, one, other in zip(sources, changed, key["sources"], strict=True) if one != other)
            raise ValueError(f"{place}.{name}: its files changed while they were read; start again when nothing writes to them")
        samples.tally.skipped += skipped.skipped
        samples.tally.first_skipped |= skipped.first_skipped
        return {"tally": samples.tally.state(), "fingerprint": samples.fingerprint}

    folder, noted = indexed(key, build, say=say)
    tally = Tally.of(noted["tally"])
    if stage.name == "pretrain":
        return PretrainSamples.open(folder, tally, noted["fingerprint"], tokenizer, task_tokens=task_tokens, seed=seed)
    return AnswerSamples.open(folder, tally, noted["fingerprint"])


def samples_of(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    stage: StageConfig,
    *,
    task_tokens: TaskTokens,
    seed: int,
    folder: Path | None = None,
) -> StageSamples:
    """The samples of a stage from examples at hand, in memory or in ``folder``.

    Raises:
        ValueError: there is none.
    """
    samples: StageSamples
    if stage.name == "pretrain":
        samples = PretrainSamples.build(examples, tokenizer, stage, task_tokens=task_tokens, seed=seed, folder=folder)
    else:
        samples = AnswerSamples.build(examples, tokenizer, stage, folder=folder)
    if not len(samples):
        wanted = "text" if stage.name == "pretrain" else "question"
        raise ValueError(
            f"no sample for stage {stage.name}: the sources are empty, their skip leaves nothing, or they hold no {wanted} "
            f"({samples.tally})"
        )
    return samples
