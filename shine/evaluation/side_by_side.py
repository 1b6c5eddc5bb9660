"""SHINE, In-Context and Only Question side by side on one loaded model, asked about any contexts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from shine.checkpoint import output_folder
from shine.config import PromptConfig, SourceConfig
from shine.data.batching import chunks
from shine.data.examples import Example
from shine.data.sources import read_source
from shine.evaluation.methods import Asked, InContext, Method, Shine, Speaker
from shine.evaluation.tables import TITLES
from shine.model import Shine as Model


def three_methods(model: Model, *, prompts: PromptConfig | None = None) -> list[Method]:
    """SHINE, In-Context and Only Question on one loaded model; without ``prompts`` the baselines see the default ones."""
    speaker = Speaker(model.backbone, model.tokenizer, prompts or PromptConfig(), model.config.baseline_prefix)
    return [
        Shine("shine", speaker, model.hypernetwork),
        InContext("in_context", speaker),
        Method("only_question", speaker),
    ]


def converse(methods: Sequence[Method], examples: Sequence[Example], *, max_new_tokens: int = 48) -> list[dict[str, Any]]:
    """Every method's answers to the turns of each example, which follow each other: a row a question.

    Each method sees its own earlier answers.
    """
    rows = [
        {"id": example.id, "context": example.context, "question": turn.question, "answers": list(turn.answers)}
        for example in examples
        for turn in example.turns
    ]
    for method in methods:
        said: list[str] = []
        for group in chunks(examples, 16):
            method.prepare(group)
            histories: list[list[tuple[str, str]]] = [[] for _ in group]
            for turn in range(max(len(example.turns) for example in group)):
                places = [n for n, example in enumerate(group) if turn < len(example.turns)]
                asked = [Asked(n, group[n].turns[turn].question, tuple(histories[n]), turn) for n in places]
                answers = method.answer(asked, max_new_tokens=max_new_tokens, batch_size=16)
                for n, question, answer in zip(places, asked, answers, strict=True):
                    histories[n].append((question.question, answer.text))
            said += [text for history in histories for _, text in history]
        for row, text in zip(rows, said, strict=True):
            row[method.name] = text
    return rows


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what the methods said, context by context."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    context = None
    for row in rows:
        if row["context"] != context:
            context = row["context"]
            console.print(Text(f"\n{context}", style="bold"))
        expected = f"   (right: {row['answers'][0]})" if row["answers"] else ""
        console.print(Text(f"  {row['question']}").append(expected, style="dim"))
        for name, title in TITLES.items():
            if name in row:
                console.print(
                    Text(f"    {title + ':':<15} ", style="cyan").append(" ".join(row[name].split()) or "(nothing)", style="")
                )


def rows_as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `converse` as a page: each context with a table of its questions, a column for each method."""
    methods = [name for name in TITLES if name in rows[0]]
    columns = ["question", "right", *(TITLES[name] for name in methods)]
    right = any(row["answers"] for row in rows)
    lines: list[str] = []
    before = None
    for row in rows:
        if row["id"] != before:
            quoted = "\n".join(f"> {line}".rstrip() for line in row["context"].splitlines())
            lines += ["", quoted, "", _cells(columns, right=right), _cells(["---"] * len(columns), right=right)]
            before = row["id"]
        lines.append(_cells([row["question"], *(row["answers"] or [""])[:1], *(row[name] for name in methods)], right=right))
    return "\n".join(lines[1:]) + "\n"


def _cells(texts: Sequence[str], *, right: bool) -> str:
    """A row of a table, without its second column where no right answer is known."""
    shown = [" ".join(text.split()).replace("|", "\\|") for text in (texts if right else [texts[0], *texts[2:]])]
    return "| " + " | ".join(shown) + " |"


def converse_file(
    checkpoint: str, file: str, *, backbone: str | None, allow_variant: bool, max_new_tokens: int, output: Path | None
) -> None:
    """`converse` about the contexts of a file, shown and, where there is an ``output``, written: a page if it ends in ``.md``.

    Raises:
        ValueError: no question in the file, or no such checkpoint.
    """
    examples = [example for example in read_source(SourceConfig(kind="jsonl", path=file)) if example.turns]
    if not examples:
        raise ValueError(f'{file}: holds no question; give each context its "turns"')
    model = Model.from_pretrained(checkpoint, backbone=backbone, allow_variant=allow_variant)
    rows = converse(three_methods(model), examples, max_new_tokens=max_new_tokens)
    show_rows(rows)
    if output is not None:
        output_folder(output.parent).mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        output.write_text(rows_as_markdown(rows) if output.suffix == ".md" else lines, encoding="utf-8")
