"""Result folders to one page: Markdown tables, plots, and the same figures as JSON. Only folders are read, never a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from shine.evaluation import plots
from shine.evaluation.results import PREDICTIONS_FILE, SUMMARY_FILE, Row, read_jsonl
from shine.evaluation.scores import totals
from shine.evaluation.statistics import Estimate, difference
from shine.evaluation.tables import shown_way, title_of, with_interval

REPORT_FILE, FIGURES_FILE = "report.md", "report.json"
TASKS = ("reconstruct", "complete")
ANSWERS_COMPARED, RECALL_COMPARED = ("em", "f1", "rouge_l"), ("loss", "exact_prefix")
SHOWN = {"f1": "F1", "loss": "loss, nats a token", "exact_prefix": "exact prefix"}
"""Of what is compared, what the page shows, and how it calls it."""


@dataclass(frozen=True)
class Run:
    """A finished evaluation.

    Attributes:
        name: what tells it from the other folders of the report.
        judges: what `shine.evaluation.judge` wrote there.
    """

    name: str
    summary: Mapping[str, Any]
    rows: Sequence[Row]
    judges: Sequence[Mapping[str, Any]] = ()

    @property
    def recalls(self) -> bool:
        """Whether texts were given back, rather than questions answered."""
        return bool(self.summary["stage"] == "pretrain")

    def of(self, source: str, method: str) -> list[Row]:
        """The predictions of one method on one source."""
        return [row for row in self.rows if (row["source"], row["method"]) == (source, method)]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The evaluations in some folders, each under the shortest end of its path that no other has.

    Raises:
        ValueError: a folder holds no finished evaluation, or is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a folder is named twice: name each once")
    runs = []
    for folder, name in zip(folders, _short_names(folders), strict=True):
        if not (folder / SUMMARY_FILE).exists():
            raise ValueError(f"{folder}: no {SUMMARY_FILE}; name the output folder of an evaluation that has ended")
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        judges = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("judge-*.json"))]
        runs.append(Run(name, summary, read_jsonl(folder / PREDICTIONS_FILE), judges))
    return runs


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write ``report.md``, its plots and ``report.json`` into ``output``, and return the page."""
    runs = read_runs(folders)
    output.mkdir(parents=True, exist_ok=True)
    compared = compare(runs)
    pictures = plots.draw_runs(runs, output)
    page = output / REPORT_FILE
    apart = unlike(runs)
    page.write_text("\n".join(_page(runs, compared, apart, pictures)) + "\n", encoding="utf-8")
    figures = {
        "runs": {run.name: {**run.summary, "judges": list(run.judges)} for run in runs},
        "comparisons": [{**row, "difference": row["difference"].plain()} for row in compared],
        "not_compared": apart,
    }
    (output / FIGURES_FILE).write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return page


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How much each run is ahead of each named before it, method by method, where both were asked the same (see `unlike`).

    Of texts given back the difference in loss is in nats a token, where less is better; all others are in percent.
    """
    found = []
    for first, second, source in _pairs(runs):
        if _same_data(first, second, source):
            theirs = second.summary["sources"][source]["methods"]
            for method, task in product(first.summary["sources"][source]["methods"], TASKS if first.recalls else ("",)):
                if method not in theirs:
                    continue
                before, after = ([row for row in run.of(source, method) if row.get("task", "") == task] for run in (first, second))
                contexts = len({row["id"] for row in before})
                for score in RECALL_COMPARED if first.recalls else ANSWERS_COMPARED:
                    gap = difference(totals(after, score), totals(before, score))
                    names = {
                        "from": first.name,
                        "to": second.name,
                        "source": source,
                        "method": method,
                        "task": task,
                        "score": score,
                    }
                    found.append({**names, "difference": gap, "contexts": contexts})
    return found


def unlike(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Sets of one name on which two runs were not asked the same: other contexts or questions, or contexts cut to another length.
    A paired difference would be none, whatever the ids are."""
    return [
        {"from": first.name, "to": second.name, "source": source}
        for first, second, source in _pairs(runs)
        if not _same_data(first, second, source)
    ]


def _pairs(runs: Sequence[Run]) -> Iterator[tuple[Run, Run, str]]:
    for first, second in combinations(runs, 2):
        if first.summary["stage"] == second.summary["stage"]:
            for source in first.summary["sources"]:
                if source in second.summary["sources"]:
                    yield first, second, source


def _same_data(first: Run, second: Run, source: str) -> bool:
    ours, theirs = (run.summary["sources"][source].get("examples") for run in (first, second))
    return ours is not None and ours == theirs


def _short_names(folders: Sequence[Path]) -> list[str]:
    for depth in range(1, 20):
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _page(
    runs: Sequence[Run],
    compared: Sequence[Mapping[str, Any]],
    apart: Sequence[Mapping[str, str]],
    pictures: Mapping[str, Path],
) -> Iterator[str]:
    yield "# Evaluation"
    yield ""
    for run in runs:
        made, config = run.summary["versions"], run.summary["config"]
        of = f", hypernetwork `{config['checkpoint']}`" if config["checkpoint"] else ""
        asked = {"pretrain": "texts given back", "mqa": "conversations", "1qa": "single questions"}[run.summary["stage"]]
        yield f"- **{run.name}**: {asked}, backbone `{config['backbone']['path']}`{of}, code {made['revision'] or made['shine']}"
        yield from (f"  - {source}: {found['tally']}" for source, found in run.summary["sources"].items())
    yield ""
    yield "± is half the width of the 95 % interval: percentile bootstrap over contexts, 4,000 resamples. Where all contexts score"
    yield "the same it is 0: what was not asked it cannot see."
    answering, recalling = [run for run in runs if not run.recalls], [run for run in runs if run.recalls]
    if answering:
        yield from ["", "## F1", "", *_paper_table(answering)]
        yield from ["", "## Scores, shares and costs", "", *_score_table(answering)]
        yield from [
            "",
            "right, wrong: share of answers with F1 1 and 0. cut: answers that had not ended. pays from: the number of ",
        ]
        yield "questions about a context from which on its adapter takes less time than the context in the prompt."
        yield from _learned(answering)
        for title, key, _ in plots.GROUPINGS:
            if rows := list(_grouped_table(answering, key)):
                yield from ["", f"## {title}", "", *rows, *_picture(title, pictures)]
        yield from ["", f"## {plots.TIME}", *_picture(plots.TIME, pictures)]
        yield from ["", "## Differences between methods, F1", "", *_difference_table(answering)]
        yield from _way_table(answering)
        yield from _adapter_table(answering)
        yield from _judge_tables(answering)
    if recalling:
        yield from ["", "## Texts given back", "", *_recall_table(recalling)]
        yield from ["", f"## {plots.RECALL}", "", *_recall_table(recalling, by_length=True), *_picture(plots.RECALL, pictures)]
        yield from ["", "## Differences between methods, texts given back", "", *_recall_difference_table(recalling)]
    if compared:
        yield from ["", "## Differences between runs", "", *_comparison_table(compared)]
    for row in apart:
        yield from ["", f"{row['from']} and {row['to']} are not compared on {row['source']}: they were not asked the same there"]
        yield "(other contexts or questions, or contexts cut to another length)."


def _picture(title: str, pictures: Mapping[str, Path]) -> list[str]:
    return ["", f"![{title}]({pictures[title].name})"]


def _paper_table(runs: Sequence[Run]) -> Iterator[str]:
    """A row for each method, a column for each set."""
    sources = list(dict.fromkeys(source for run in runs for source in run.summary["sources"]))
    yield from _head(["", *sources], left=1)
    for run in runs:
        for method in dict.fromkeys(name for found in run.summary["sources"].values() for name in found["methods"]):
            cells = []
            for source in sources:
                scores = run.summary["sources"].get(source, {"methods": {}})["methods"].get(method)
                cells.append("" if scores is None else with_interval(scores, "f1"))
            yield _line([title_of(method) if len(runs) == 1 else f"{title_of(method)} ({run.name})", *cells])


def _score_table(runs: Sequence[Run]) -> Iterator[str]:
    names = ["EM", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L", "right", "wrong", "questions", "cut"]
    yield from _head(
        [
            *("run", "set", "method", *names),
            *("encode, s a context", "s an adapter", "answer, s a question", "adapter, kB", "pays from"),
        ],
        left=3,
    )
    for run in runs:
        for source, found in run.summary["sources"].items():
            for method, scores in found["methods"].items():
                cells = [with_interval(scores, name) for name in ("em", "f1", "rouge_1", "rouge_2", "rouge_l", "right", "wrong")]
                cells += [f"{scores['questions']:,}", f"{scores['cut']:,}"]
                seconds, size = scores["seconds"], scores["adapter_bytes"]
                cells += [f"{seconds[part]:.3g}" if size else "" for part in ("encode_context", "encode_adapter")]
                cells += [f"{seconds['answer_question']:.3g}"]
                pays = found["break_even_questions"].get(method, "")
                cells += [f"{size / 1000:,.0f}" if size else "", "never" if pays is None else str(pays)]
                yield _line([run.name, source, title_of(method), *cells])


def _grouped_table(runs: Sequence[Run], key: str) -> Iterator[str]:
    """F1 of each method, a column for each length or turn, above how many questions that is of; nothing where all are of one."""
    panels = [(run, source, run.summary["sources"][source]["methods"]) for run, source in plots.grouped_by(key, runs)]
    groups = sorted({int(group) for *_, methods in panels for scores in methods.values() for group in scores[key]})
    if panels:
        yield from _head(["run", "set", "method", *map(str, groups)], left=3)
    for run, source, methods in panels:
        for method, scores in methods.items():
            there = [scores[key].get(str(group)) for group in groups]
            cells = (f"{g['f1']:.1f} ±{(g['f1_interval'][1] - g['f1_interval'][0]) / 2:.1f}" if g else "" for g in there)
            yield _line([run.name, source, title_of(method), *cells])
        yield _line([run.name, source, "*questions*", *(f"{g['questions']:,}" if g else "" for g in there)])


def _learned(runs: Sequence[Run]) -> Iterator[str]:
    """Where fine-tuning had fewer conversations to learn than its name says."""
    for run in runs:
        for source, found in run.summary["sources"].items():
            for method, scores in found["methods"].items():
                learned = scores.get("conversations_learned", {"wanted": 0, "fewest": 0})
                if learned["fewest"] < learned["wanted"]:
                    yield from ["", f"{run.name}, {source}: *{title_of(method)}* learned {learned['mean']:.1f} conversations an "]
                    yield f"adapter ({learned['fewest']} at least), for there were no more."


def _difference_table(runs: Sequence[Run]) -> Iterator[str]:
    yield from _head(["run", "set", "methods", "difference [95 %]"], left=3)
    for run in runs:
        for source, found in run.summary["sources"].items():
            first = next(iter(found["methods"]))
            for pair, scores in found["differences"].items():
                ours, _, theirs = pair.partition(" - ")
                if ours != first:
                    continue
                yield _line([run.name, source, f"{title_of(ours)} − {title_of(theirs)}", f"{Estimate(**scores['f1']):+.1f}"])


def _way_table(runs: Sequence[Run]) -> Iterator[str]:
    """How far each method goes from Only Question to the context in the prompt; nothing where no run has both ends."""
    rows = []
    for run in runs:
        for source, found in run.summary["sources"].items():
            for method, ceilings in found.get("ways", {}).items():
                for ceiling, scores in ceilings.items():
                    cells = [title_of(method), title_of(ceiling), shown_way(scores["em"]), shown_way(scores["f1"])]
                    rows.append(_line([run.name, source, *cells]))
    if rows:
        yield from ["", "## The way from Only Question to the context in the prompt, percent", ""]
        yield from _head(["run", "set", "method", "to", "EM [95 %]", "F1 [95 %]"], left=4)
        yield from rows
        yield from ["", "100 is as good as seeing the context, 0 as Only Question. none to go: the other end is not above Only "]
        yield "Question beyond chance."


def _adapter_table(runs: Sequence[Run]) -> Iterator[str]:
    """How unlike the adapters of different contexts are; nothing where no hypernetwork made any."""
    rows = [
        _line(
            [
                run.name,
                source,
                "" if found["cosine"] is None else f"{Estimate(found['cosine'], *found['intervals']['cosine']):.2f}",
                f"{found['effective_rank']:.2f}",
            ]
        )
        for run in runs
        for source, scored in run.summary["sources"].items()
        for found in (scores["adapters"] for scores in scored["methods"].values() if "adapters" in scores)
    ]
    if rows:
        yield from [
            "",
            "## Adapters of different contexts",
            "",
            *_head(["run", "set", "mean cosine [95 %]", "effective rank"], left=2),
            *rows,
        ]
        yield from ["", "Of every two contexts of a batch. A cosine near 1 means collapse: every context gets the same adapter."]


def _recall_difference_table(runs: Sequence[Run]) -> Iterator[str]:
    yield from _head(["run", "set", "methods", "task", "loss, nats a token [95 %]", "exact prefix [95 %]"], left=4)
    for run in runs:
        for source, found in run.summary["sources"].items():
            for pair, tasks in found["differences"].items():
                ours, _, theirs = pair.partition(" - ")
                if ours != next(iter(found["methods"])):
                    continue
                for task, scores in tasks.items():
                    cells = [f"{Estimate(**scores['loss']):+.3f}", f"{Estimate(**scores['exact_prefix']):+.1f}"]
                    yield _line([run.name, source, f"{title_of(ours)} − {title_of(theirs)}", task, *cells])


def _judge_tables(runs: Sequence[Run]) -> Iterator[str]:
    judged = [(run, judge) for run in runs for judge in run.judges]
    if not judged:
        return
    yield from ["", "## Judged correct, percent", ""]
    yield from _head(["run", "judge", "prompt", "set", "method", "correct", "judged", "failed calls"], left=5)
    for run, judge in judged:
        for source, methods in judge["sources"].items():
            for method, found in methods.items():
                share = Estimate(found["correct"], *found["interval"]) if found["judged"] else None
                cells = [f"{share:.1f}" if share else "", f"{found['judged']:,}", f"{found['failed']:,}"]
                yield _line([run.name, judge["judge"], judge["prompt_sha256"][:8], source, title_of(method), *cells])
    yield from ["", "## Differences between methods, judged correct", ""]
    yield from _head(["run", "judge", "prompt", "set", "methods", "difference [95 %]", "judged for both"], left=5)
    for run, judge in judged:
        for source, pairs in judge.get("differences", {}).items():
            for pair, found in pairs.items():
                gap = Estimate(found["value"], found["low"], found["high"])
                titles = " − ".join(map(title_of, pair.split(" - ")))
                cells = [f"{gap:+.1f}", f"{found['questions']:,}"]
                yield _line([run.name, judge["judge"], judge["prompt_sha256"][:8], source, titles, *cells])


def _recall_table(runs: Sequence[Run], *, by_length: bool = False) -> Iterator[str]:
    """A row for each method and task, or for each of their length buckets."""
    lengths = ["tokens up to"] if by_length else []
    names = ["perplexity [95 %]", "p10–p90", "exact prefix", "EM", "F1", "texts"]
    yield from _head(["run", "set", "method", "task", *lengths, *names], left=4)
    for run in runs:
        for source, found in run.summary["sources"].items():
            for method, task in product(found["methods"], TASKS):
                scores = found["methods"][method][task]
                for bound, part in scores["lengths"].items() if by_length else [("", scores)]:
                    mean = Estimate(part["perplexity"], *part["intervals"]["perplexity"])
                    spread = f"{part['perplexity_p10']:.2f}–{part['perplexity_p90']:.2f}"
                    cells = [f"{mean:.2f}", spread, *(with_interval(part, name) for name in ("exact_prefix", "em", "f1"))]
                    place = [bound] if by_length else []
                    yield _line([run.name, source, title_of(method), task, *place, *cells, f"{part['texts']:,}"])


def _comparison_table(compared: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from _head(["from", "to", "set", "method", "score", "difference [95 %]", "contexts"], left=5)
    for row in compared:
        if row["score"] not in SHOWN:
            continue
        score = f"{SHOWN[row['score']]} ({row['task']})" if row["task"] else SHOWN[row["score"]]
        names = [row["from"], row["to"], row["source"], title_of(row["method"]), score]
        gap = f"{row['difference']:+.3f}" if row["score"] == "loss" else f"{row['difference']:+.1f}"
        sure = row["difference"].low > 0 or row["difference"].high < 0
        yield _line([*names, f"**{gap}**" if sure else gap, f"{row['contexts']:,}"])


def _head(names: Sequence[str], *, left: int) -> Iterator[str]:
    yield _line(names)
    yield _line(["---" if n < left else "---:" for n in range(len(names))])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
