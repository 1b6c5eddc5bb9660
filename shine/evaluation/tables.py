"""Summaries as tables on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from shine.evaluation.statistics import Estimate

TITLES = {
    "shine": "SHINE",
    "shine_other": "SHINE, another context",
    "in_context": "In-Context",
    "in_context_tuned": "In-Context, tuned",
    "only_question": "Only Question",
}


def title_of(method: str) -> str:
    """A method's name as a reader knows it."""
    kind, _, sweep = method.partition(":")
    if kind != "fine_tuning":
        return TITLES[method]
    count, _, epochs = sweep.partition("x")
    return f"Fine-tuned, {'text' if count == '0' else f'{count} conv.'} × {epochs}"


def answer_table(summary: Mapping[str, Any]) -> Table:
    """Scores of every method on every source with half the width of their 95 % interval.

    ``right`` and ``wrong`` are the shares of answers with F1 1 and 0; ``cut`` counts answers that had not ended after
    ``max_new_tokens``.
    """
    stage = "conversations" if summary["stage"] == "mqa" else "single questions"
    columns = ["EM", "F1", "ROUGE-L", "right", "wrong", "questions", "cut", "encode s", "answer s"]
    table = _table(f"Answers to {stage}, percent, ± half the 95 % interval", columns)
    for source, found in summary["sources"].items():
        for method, scores in found["methods"].items():
            seconds = scores["seconds"]
            table.add_row(
                source,
                title_of(method),
                *(with_interval(scores, name) for name in ("em", "f1", "rouge_l")),
                f"{scores['right']:.1f}",
                f"{scores['wrong']:.1f}",
                f"{scores['questions']:,}",
                f"{scores['cut']:,}",
                f"{seconds['encode']:.1f}",
                f"{seconds['answer']:.1f}",
            )
        table.add_section()
    return table


def way_table(summary: Mapping[str, Any]) -> Table | None:
    """How far each method goes from Only Question to the context in the prompt (see `shine.evaluation.scores.ways`); ``None`` where
    nothing asked has both ends."""
    table = _table("How far from Only Question, percent", ["to", "EM [95 %]", "F1 [95 %]"])
    for source, found in summary["sources"].items():
        for method, ceilings in found["ways"].items():
            for ceiling, scores in ceilings.items():
                table.add_row(source, title_of(method), title_of(ceiling), *(shown_way(scores[name]) for name in ("em", "f1")))
    return table if table.row_count else None


def shown_way(gone: Mapping[str, float] | None) -> str:
    """A way with its interval, or that there is none: the other end is not above Only Question beyond chance."""
    return f"{Estimate(**gone):.0f}" if gone else "none to go"


def with_interval(scores: Mapping[str, Any], name: str) -> str:
    """A score and half the width of its interval."""
    low, high = scores["intervals"][name]
    return f"{scores[name]:.1f} ±{(high - low) / 2:.1f}"


def recall_table(summary: Mapping[str, Any]) -> Table:
    """Perplexity, exact-prefix ratio, EM and F1 of every method, task and length bucket."""
    table = _table("Texts given back", ["task", "tokens up to", "texts", "perplexity", "exact prefix %", "EM %", "F1 %"])
    for source, found in summary["sources"].items():
        for method, scores in found["methods"].items():
            for task in ("reconstruct", "complete"):
                rows = {"all": scores[task], **scores[task]["lengths"]}
                for bound, row in rows.items() if len(rows) > 2 else [("all", scores[task])]:
                    figures = (f"{row[key]:.1f}" for key in ("exact_prefix", "em", "f1"))
                    table.add_row(source, title_of(method), task, bound, f"{row['texts']:,}", f"{row['perplexity']:.2f}", *figures)
        table.add_section()
    return table


def judge_table(summary: Mapping[str, Any]) -> Table:
    """What a judge says of every method on every source."""
    table = _table(f"Judged correct by {summary['judge']}, percent", ["correct", "95 %", "judged", "failed calls"])
    for source, methods in summary["sources"].items():
        for method, found in methods.items():
            share = ("", "")
            if found["judged"]:
                share = (f"{found['correct']:.1f}", "{:.1f} to {:.1f}".format(*found["interval"]))
            table.add_row(source, title_of(method), *share, f"{found['judged']:,}", f"{found['failed']:,}")
    return table


def show(table: Table) -> None:
    """Print a table, wide enough for its content also where there is no terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("source")
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="left" if column in ("task", "to") else "right")
    return table
