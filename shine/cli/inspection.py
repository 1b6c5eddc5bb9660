"""What ``shine data inspect`` shows of a source: examples with their labels marked, counts, and lengths."""

from __future__ import annotations

import itertools
import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from shine.chat import IGNORE, prepare_tokenizer, token_counter
from shine.cli.sources import parse_source
from shine.config import StageConfig, StageName, TaskTokens
from shine.data.build import samples_of
from shine.data.examples import Example
from shine.data.histograms import Lengths, draw_lengths
from shine.data.samples import Sample, StageSamples
from shine.data.sources import read_named
from shine.data.tally import Tally
from shine.pretrained import load_tokenizer
from shine.zoo import resolve

ABOUT = 1200
"""Characters of a context that are printed."""


def inspect(
    text: str,
    *,
    stage: StageName | None,
    backbone: str,
    count: int,
    lengths: tuple[int, int],
    histogram: str,
    as_json: bool,
) -> None:
    """Print ``count`` samples of the source and what it holds, and draw its lengths.

    Args:
        text: the source, see `shine.cli.sources`.
        backbone: whose tokenizer counts.
        lengths: most tokens of a context and of a conversation, beyond which is counted as cut.

    Raises:
        ValueError: the source cannot be read, or holds nothing for the stage.
    """
    source = parse_source(text)
    tokenizer = load_tokenizer(resolve(backbone))
    names = TaskTokens()
    # Their ids do not matter here, and no embedding is loaded that could be short of rows.
    prepare_tokenizer(tokenizer, names, embedding_rows=len(tokenizer) + 3)
    skipped = Tally()
    examples = read_named({text: source}, "--source", tokens=token_counter(tokenizer), tally=skipped)
    first = list(itertools.islice(examples, 1))
    chosen: StageName = stage or ("mqa" if any(example.turns for example in first) else "pretrain")
    # Answers are shown whole; texts are grouped to the limits.
    limits = lengths if chosen == "pretrain" else (10**9, 10**9)
    config = StageConfig(chosen, *limits, learning_rate=1.0, warmup_steps=0)
    seen = _Seen(token_counter(tokenizer) if chosen == "pretrain" else None)
    with tempfile.TemporaryDirectory(prefix="shine-inspect-") as folder:
        samples = samples_of(
            seen.watch(itertools.chain(first, examples)), tokenizer, config, task_tokens=names, seed=0, folder=Path(folder)
        )
        shown = [samples.sample(index, epoch=0) for index in range(min(count, len(samples)))]
        measured, labels = _measure(samples)
    samples.tally.skipped += skipped.skipped
    figures: dict[str, Any] = {"source": text, "stage": chosen, **seen.figures(), **_figures(measured, labels, lengths)}
    draw_lengths({"": measured}, histogram, title=f"{text} ({chosen})", limits=lengths, what="samples")
    if as_json:
        print(json.dumps({**figures, "skipped": samples.tally.skipped, "histogram": histogram}, indent=2, ensure_ascii=False))
        return
    console = Console()
    for sample in shown:
        console.print(Rule(f"{sample.id}: {len(sample.context_ids):,} + {len(sample.input_ids):,} tokens", align="left"))
        context = str(tokenizer.decode(sample.context_ids))
        console.print(Text(context[:ABOUT] + (" …" if len(context) > ABOUT else ""), style="dim"))
        console.print(_marked(sample, tokenizer, colors=console.is_terminal and not console.no_color))
    console.print(Rule(style="none"))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):24}{f'{value:,}' if isinstance(value, int) else value}")
    for reason, number in samples.tally.skipped.items():
        print(f"{'skipped':24}{number:,} ({reason})")
    print(f"{'lengths drawn in':24}{histogram}")


class _Seen:
    """What a source holds, counted as it is read: contexts and questions, or texts with their lengths before they are grouped."""

    def __init__(self, tokens: Callable[[str], int] | None) -> None:
        self.tokens, self.contexts, self.questions = tokens, 0, 0
        self.lengths = array("L")

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The same examples."""
        for example in examples:
            self.contexts += bool(example.context.strip())
            self.questions += sum(bool(turn.answers) for turn in example.turns)
            if self.tokens is not None and example.context.strip():
                self.lengths.append(self.tokens(example.context))
            yield example

    def figures(self) -> dict[str, Any]:
        if self.tokens is None:
            return {"contexts": self.contexts, "questions": self.questions}
        return {"texts": self.contexts, "text_mean": round(sum(self.lengths) / self.contexts, 1), "text_max": max(self.lengths)}


def _measure(samples: StageSamples) -> tuple[Lengths, np.ndarray]:
    """Lengths and numbers of labels of every sample."""
    found = np.empty((3, len(samples)), dtype=np.int64)
    for index in range(len(samples)):
        sample = samples.sample(index, epoch=0)
        found[:, index] = len(sample.context_ids), len(sample.input_ids), sample.label_count
    return Lengths(found[0], found[1]), found[2]


def _figures(measured: Lengths, labels: np.ndarray, lengths: tuple[int, int]) -> dict[str, Any]:
    return {
        "samples": len(measured.context),
        "context_mean": round(float(measured.context.mean()), 1),
        "context_max": int(measured.context.max()),
        "conversation_mean": round(float(measured.conversation.mean()), 1),
        "conversation_max": int(measured.conversation.max()),
        "labels_mean": round(float(labels.mean()), 1),
        "contexts_cut": int((measured.context > lengths[0]).sum()),
        "conversations_cut": int((measured.conversation > lengths[1]).sum()),
    }


def _marked(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, colors: bool) -> Text:
    """The conversation, its labels green and bold, or in brackets."""
    text = Text()
    begin = 0
    for end in range(1, len(sample.labels) + 1):
        if end == len(sample.labels) or (sample.labels[end] == IGNORE) != (sample.labels[begin] == IGNORE):
            piece = str(tokenizer.decode(sample.input_ids[begin:end]))
            if sample.labels[begin] == IGNORE:
                text.append(piece)
            else:
                # The newline after an answer is a label too: shown, so that the bracket closes on the answer's own line.
                said = piece.removesuffix("\n")
                text.append(piece if colors else f"⟦{said}{'⏎' if said != piece else ''}⟧\n", style="bold green")
            begin = end
    return text
