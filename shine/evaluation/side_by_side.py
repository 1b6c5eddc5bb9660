"""A checkpoint at hand: three methods on it, asked about any contexts, and the trust report."""

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
from shine.data.tally import Tally
from shine.data.worlds import World
from shine.evaluation import qa, trust
from shine.evaluation.methods import Asked, InContext, Method, Shine, Speaker
from shine.evaluation.tables import TITLES
from shine.evaluation.trust_page import write_page
from shine.model import Shine as Model

PROMPTS = PromptConfig(system="Answer with a few words only, without a sentence.", in_context="{context}\n\nQuestion: {question}")


def three_methods(model: Model, *, prompts: PromptConfig = PROMPTS) -> list[Method]:
    """SHINE, In-Context and Only Question on one loaded model."""
    speaker = Speaker(model.backbone, model.tokenizer, prompts, model.config.baseline_prefix)
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


def converse_file(checkpoint: str, file: str, *, backbone: str | None, max_new_tokens: int, output: Path | None) -> None:
    """`converse` about the contexts of a file, shown and, where there is an ``output``, written: a page if it ends in ``.md``.

    Raises:
        ValueError: no question in the file, or no such checkpoint.
    """
    examples = [example for example in read_source(SourceConfig(kind="jsonl", path=file)) if example.turns]
    if not examples:
        raise ValueError(f'{file}: holds no question; give each context its "turns"')
    rows = converse(three_methods(Model.from_pretrained(checkpoint, backbone=backbone)), examples, max_new_tokens=max_new_tokens)
    show_rows(rows)
    if output is not None:
        output_folder(output.parent).mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        output.write_text(rows_as_markdown(rows) if output.suffix == ".md" else lines, encoding="utf-8")


def report_trust(
    checkpoint: str,
    output: Path,
    *,
    backbone: str | None,
    contexts: int,
    sources: Mapping[str, str],
    worlds: bool,
    max_new_tokens: int,
    seed: int,
) -> Path:
    """Examine a checkpoint on invented worlds and on sources (kind to path), write the page and return it.

    Raises:
        ValueError: nothing to examine it on, too few contexts, or no such checkpoint.
    """
    folder = output_folder(output)
    if contexts < 2 or not (worlds or sources):
        raise ValueError("contexts must be at least 2, and there must be worlds or a source: how adapters differ is asked of pairs")
    model = Model.from_pretrained(checkpoint, backbone=backbone)
    sets = [trust.world_set(list(World(seed=seed).examples(contexts)), seed=seed)] if worlds else []
    for kind, path in sources.items():
        source = SourceConfig(kind=kind, path=path, split="validation" if kind == "squad" else "train")
        length = model.context_length
        tally = Tally()
        usable = qa.usable_examples(read_source(source), model.tokenizer, context_length=length, questions=True, tally=tally)
        found = [example for _, example in zip(range(contexts), usable, strict=False)]
        print(f"{path}: {tally}", flush=True)
        if sum(len(example.turns) for example in found) < trust.TURNS + 6 or len(found) < 2:
            raise ValueError(
                f"{path}: {len(found)} contexts hold too few questions for a conversation of {trust.TURNS} turns: "
                "give more, or look at more contexts with --contexts"
            )
        sets.append(trust.passage_set(found, name="SQuAD" if kind == "squad" else Path(path).name))
    methods = three_methods(model)
    assert isinstance(methods[0], Shine)
    asker = trust.Asker.of(methods[0].speaker, methods[0], max_new_tokens=max_new_tokens)
    found_all = []
    for questions in sets:
        print(f"{questions.name}: {len(questions.examples)} contexts", flush=True)
        found_all.append(trust.examine(asker, questions, seed=seed))
    about = f"Hypernetwork `{checkpoint}`, backbone `{model.config.path}`; answers of at most {max_new_tokens} tokens, seed {seed}."
    return write_page(folder, found_all, about=about)
