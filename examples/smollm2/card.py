"""Write the model card of what ships as ``smollm2-135m``, with its curves, from measured results alone::

    python examples/smollm2/card.py outputs/smollm2-scores --chosen-on squad=229 worlds=196

The folder is that of ``examples/smollm2/score.sh``; without one, page and picture are made anew of what ``scores.json`` keeps, what
versions before this one scored among it. The curves are those of the runs that ``examples/ship.py`` kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from curves import Runs, curves, read_runs, samples_drawn, validation_losses
from lineage import paragraph, training
from more import More, told
from results import CONTROL, OTHER_TITLES, SET_TITLES, Results, Version, check_scored, compared, digest_of, targets

from shine.checkpoint import WEIGHTS_FILE, CheckpointInfo, read_info, read_weights
from shine.evaluation.plots import read_metrics
from shine.evaluation.statistics import Estimate
from shine.evaluation.tables import title_of
from shine.m2p import MEASURED
from shine.training.tuning import TRAINING_FILE
from shine.zoo import ASSETS

PLACE = ASSETS / "smollm2-135m"
CURVES, CARD, SCORES = "curves.png", "README.md", "scores.json"
LONGEST_CELL = 60
COMPARED = {"squad": ("SQuAD's F1", 1), "worlds": ("worlds", 1), "texts": ("perplexity", -1)}
"""The scores of a version: what each is called, and which way is better."""


def card(
    results: Results,
    info: CheckpointInfo,
    *,
    version: Version,
    runs: Runs,
    more: More | None,
    reader: Mapping[str, Any],
    parameters: int,
    size: int,
) -> Iterator[str]:
    """The lines of the page."""
    yield from _front()
    yield from _summary(results, info, parameters=parameters, size=size)
    yield from _scores(results)
    yield from _how_measured(results)
    yield from _samples(results)
    yield from _more_training(results, version, runs)
    if more is not None:
        yield from told(more, samples=version.samples)
    yield from training(runs, reader)
    yield from _limits(results)


def _front() -> Iterator[str]:
    yield from [
        "---",
        "license: other",
        "license_name: shine-weights-research-only",
        "license_link: LICENSE-WEIGHTS",
        "language: en",
    ]
    yield from ["base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "tags: [shine, hypernetwork, lora]", "---", ""]


def _summary(results: Results, info: CheckpointInfo, *, parameters: int, size: int) -> Iterator[str]:
    shape, wanted = info.hypernetwork, targets(results)
    reached = sum(target.reached for target in wanted)
    yield from ["# SHINE for SmolLM2-135M-Instruct", ""]
    yield from paragraph(
        f"A hypernetwork ({parameters:,} trained parameters, {size / 1e6:.1f} MB) that reads a text of up to "
        f"{info.context_length} tokens once with the frozen SmolLM2-135M-Instruct and writes a LoRA of rank {shape.rank} for "
        f"{', '.join(shape.targets)} of every layer. **It reaches {reached} of the {len(wanted)} targets that were set for it**, "
        "of which the first was the aim for a training on CPUs alone."
    )
    if info.variant is not None:
        yield ""
        yield from paragraph(
            f"Its backbone is that model as `shine fetch smollm2-135m` gets it: **{info.variant}**, which is to say from weights "
            "of four bits each. All scores below, the baselines' too, are of that model. On the original weights nothing was "
            "scored, and this file is refused unless `backbone.allow_variant=true` is set."
        )
    yield from ["", "```python", "from shine import Shine", ""]
    yield 'shine = Shine.from_pretrained("smollm2-135m")  # fetches the backbone the first time'
    yield 'lora = shine.encode("Zoran works as a baker. Umar lives in Selkirk.")'
    yield from ['shine.chat(lora, "What is the job of Zoran?")', "```", ""]
    yield from paragraph(
        "For research only: it learned from RACE and BBC text, see [LICENSE-WEIGHTS](LICENSE-WEIGHTS). "
        "`sh examples/smollm2/score.sh` measures what stands under *Scores* and *What it cannot do*; `sh "
        "examples/smollm2/train.sh` goes on training from here through its three stages, an hour and a half by the times of the "
        "log on one thread of a Xeon with AMX, which nobody has run to its end yet; `sh examples/smollm2/more.sh` goes on with the "
        "last stage alone, which is told of under *What more training would do*."
    )


def _scores(results: Results) -> Iterator[str]:
    yield from ["", "## Wanted, and reached", "", "| wanted | measured [95 %] | |", "|---|---|---|"]
    for target in targets(results):
        yield f"| {target.wanted} | {target.measured} | {'reached' if target.reached else '**missed**'} |"
    yield ""
    rest = [_by_the_rest(results.rest)] if results.rest else []
    yield from paragraph(" ".join([*rest, _by_the_others(results)]))
    yield from ["", "## Scores", ""]
    yield from paragraph(
        f"Percent, with 95 % intervals (bootstrap over contexts). Single questions, greedy, at most "
        f"{results.answers['config']['max_new_tokens']} new tokens. *In-Context, tuned* is the same backbone with one ordinary "
        "LoRA (`reader/`) trained to read the context in its prompt, on the mixture of the first mqa: the ceiling. *Way* is "
        "(SHINE − Only Question) / (ceiling − Only Question)."
    )
    for source, title in SET_TITLES.items():
        yield from _answers(results, source, title)
    for source, title in OTHER_TITLES.items():
        yield from _answers(results.of_others, source, title)
    found = results.texts["sources"]["wikitext"]["methods"]
    bounds = list(found["shine"]["reconstruct"]["lengths"])
    yield from ["", "**WikiText-2 given back**: perplexity a token by length, beginnings of articles, one text each", ""]
    yield "| | " + " | ".join(f"reconstruction, {bound} tokens" for bound in bounds) + " | all | completion, all |"
    yield "|---|" + "---:|" * (len(bounds) + 2)
    for method in found:
        cells = [f"{results.perplexity(method, 'reconstruct', bound):.1f}" for bound in bounds]
        cells += [f"{results.perplexity(method, task):.1f}" for task in ("reconstruct", "complete")]
        yield f"| {title_of(method)} | {' | '.join(cells)} |"
    yield from ["", "**Adapters of different contexts**: the effective rank is how many directions an update uses", ""]
    yield from ["| | mean cosine | effective rank |", "|---|---:|---:|"]
    for source, title in SET_TITLES.items():
        yield f"| {title} | {results.cosine(source):.3f} | {results.effective_rank(source):.2f} |"
    yield from _where_from(results)


def _where_from(results: Results) -> Iterator[str]:
    """What of the scores is of the context, and what an adapter has of a world."""
    others, apart = results.score("squad", CONTROL, "f1"), results.ahead("squad", "shine", CONTROL, "f1")
    shown = (
        "So it is its own passage's adapter that counts. How much of the score a short answer is worth without any this does not "
        "say: a wrong passage misleads, and Only Question rambles."
    )
    yield ""
    yield from paragraph(
        f"The control: under the adapter of another passage, F1 on SQuAD is {others:.1f}; under its own it is {apart:.1f} higher, "
        f"passage by passage. {shown if apart.low > 0 else 'That is not beyond chance.'}"
    )
    alone, shared = (results.owners[name] for name in ("alone", "shared"))
    yield ""
    yield from paragraph(
        f"What the worlds' score is made of: {_estimate(alone):.1f} % are exact where one person has a fact of the kind that is "
        f"asked for ({alone['questions']} questions), {_estimate(shared):.1f} % where several have ({shared['questions']})."
    )


def _estimate(found: Mapping[str, float]) -> Estimate:
    return Estimate(found["value"], found["low"], found["high"])


def _how_measured(results: Results) -> Iterator[str]:
    found = results.texts["sources"]["wikitext"]["methods"]["shine"]
    lengths = found["reconstruct"]["lengths"]
    each = ", ".join(f"{length['texts']} of up to {bound} tokens" for bound, length in lengths.items())
    chosen = " and ".join(
        f"{count} of the {results.answers['sources'][source]['methods']['shine']['questions']} ({SET_TITLES[source]})"
        for source, count in results.chosen_on.items()
    )
    yield ""
    yield from paragraph(
        f"The perplexities are of {found['texts']} texts, {each}; what is longer than the contexts of the table under *Training* "
        "is longer than anything learned from. SQuAD's questions are about a fifth of the passages of ten articles, on other "
        "passages of which the runs were watched, those of the other set among them."
    )
    if chosen:
        yield ""
        yield from paragraph(f"Checkpoints had been compared on some of the questions, {chosen}: this one may look too good.")
    for note in results.notes:
        yield ""
        yield from paragraph(note)


def _samples(results: Results) -> Iterator[str]:
    if not results.samples:
        return
    methods = list(results.samples[0]["answers"])
    yield from ["", "**The first questions, as they were answered**", ""]
    yield f"| question | right | {' | '.join(title_of(method) for method in methods)} |"
    yield "|---|---|" + "---|" * len(methods)
    for sample in results.samples:
        cells = [sample["question"], sample["right"], *(sample["answers"][method] for method in methods)]
        yield f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """One line of a table, cut where it rambles."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= LONGEST_CELL else line[: LONGEST_CELL - 2].rstrip() + " …"


def _by_the_rest(rest: Mapping[str, Any]) -> str:
    """The verdicts on SQuAD by those of the questions that did not choose this version."""
    scores, ahead = ({name: Estimate(**found) for name, found in rest[which].items()} for which in ("methods", "ahead"))
    way = Estimate(**rest["way"]) if rest["way"] else None
    return (
        f"Checkpoints had been compared on some of these questions. On the {rest['questions']} others, about {rest['contexts']} "
        f"passages, F1 is {_beside_baselines(scores)}: {ahead['only_question']:+.1f} beside Only Question, "
        f"{ahead['in_context']:+.1f} beside untuned In-Context, {_share(way)} of the way."
    )


def _by_the_others(results: Results) -> str:
    """The verdicts on SQuAD by the questions that chose no version."""
    others = results.of_others
    methods = others.answers["sources"]["squad"]["methods"]
    scores = {method: others.score("squad", method, "f1") for method in methods}
    above, ahead = (others.ahead("squad", "shine", method, "f1") for method in ("only_question", "in_context"))
    return (
        f"On {methods['shine']['questions']} questions about other passages of two of the articles (European Union law, "
        f"Scottish Parliament), by which no version was chosen, it is {_beside_baselines(scores)}: {above:+.1f}, {ahead:+.1f} and "
        f"{_share(others.way_to_tuned('squad', 'f1'))} of the way."
    )


def _beside_baselines(scores: Mapping[str, Estimate]) -> str:
    return (
        f"{scores['shine']:.1f} (Only Question {scores['only_question']:.1f}, In-Context {scores['in_context']:.1f}, "
        f"tuned {scores['in_context_tuned']:.1f})"
    )


def _share(way: Estimate | None) -> str:
    return f"{way:.1f} %" if way else "nothing"


def _more_training(results: Results, version: Version, runs: Runs) -> Iterator[str]:
    yield from ["", "## What more training would do", "", f"![Scores of each version, and what its runs watched]({CURVES})", ""]
    versions = [*results.before, version]
    said, better, sure = [], [], 0
    for before, after in pairwise(versions):
        steps = []
        for name, (what, sign) in COMPARED.items():
            old, new = before.scores[name], after.scores[name]
            apart = "apart" if old.high < new.low or new.high < old.low else "overlap"
            steps.append(f"{what} from {old.value:.1f} to {new.value:.1f} (intervals {apart})")
            better.append((new.value - old.value) * sign > 0)
            sure += apart == "apart"
        other = f" (another hypernetwork, rank {after.rank} for {before.rank})" if after.rank != before.rank else ""
        said.append(f"{before.samples:,} to {after.samples:,} samples{other}: {'; '.join(steps)}.")
    if better and all(better):
        said.append(
            f"By these values every version improved on the one before in all three, {sure} of the {len(better)} steps with "
            "intervals apart; what it learned from, and how, changed with it, and what was tried between them and was no better "
            "did not ship."
        )
    if len({each.dtype for each in versions}) > 1:
        said.append(f"They were scored in different types ({', '.join(each.dtype for each in versions)}).")
    if len(versions) > 1:
        cosines = ", ".join(f"{each.cosine:.2f}" for each in versions)
        said.append(f"The cosine between adapters of SQuAD's passages was {cosines}, of which less is wanted.")
    watched = [read_metrics(run, name)[1] for _, run in runs for name in validation_losses(run)]
    if all(losses[-1] < losses[0] for losses in watched if len(losses) > 1):
        said.append(
            "Every loss that was watched more than once was lower at the end of its run, as the learning rate fell to zero. What "
            "one stage brings, the next takes in part: docs/training_log.md follows that."
        )
    squad = compared(results)[0]
    missing = squad.wanted[1] - version.scores[squad.name].value
    said.append(f"Half of the way on SQuAD is another {missing:.0f} points of F1.")
    yield from paragraph(" ".join(said))


def _answers(results: Results, source: str, title: str) -> Iterator[str]:
    methods = results.answers["sources"][source]["methods"]
    first = next(iter(methods.values()))
    tally = results.answers["sources"][source]["tally"]
    yield from ["", f"**{title}**: {first['questions']:,} questions about {first['contexts']} contexts ({tally})", ""]
    yield from ["| | EM | F1 | not ended |", "|---|---:|---:|---:|"]
    for method, scores in methods.items():
        cells = [f"{results.score(source, method, name):.1f}" for name in ("em", "f1")]
        yield f"| {title_of(method)} | {' | '.join(cells)} | {scores['cut']:,} |"
    ways = [results.way_to_tuned(source, name) for name in ("em", "f1")]
    yield f"| *way, percent* | {' | '.join(f'{way:.1f}' if way else 'none to go' for way in ways)} | |"


def _limits(results: Results) -> Iterator[str]:
    yield from ["", "## What it cannot do", ""]
    if missed := sum(not target.reached for target in targets(results)):
        yield f"- It misses {missed} of its targets; the table above says by how much."
    wrong = {method: results.score("squad", method, "wrong") for method in results.answers["sources"]["squad"]["methods"]}
    others = ", ".join(
        f"{title_of(method)} {found.value:.0f} %" for method, found in wrong.items() if method not in ("shine", CONTROL)
    )
    yield f"- Of its answers about SQuAD's passages {wrong['shine']:.0f} % share no word with a right one ({others}):"
    yield "  hold them against the text."
    yield "- Unseen worlds are new by who has what: their names, values and sentences are those that it learned from."
    for found in results.trust["sets"]:
        about = f"{found['name']}, {found['contexts']} contexts"
        changed, leaked = (Estimate(**found["interference"][name]) for name in ("changed", "leak_on"))
        asked, before = found["interference"]["questions"], Estimate(**found["interference"]["right_off"])
        yield f"- {about}: an adapter changes {changed:.0f} % of {asked} answers about *another* context, of which"
        yield f"  {before:.0f} % are right without it, and {leaked:.0f} % are wrong and taken from the context that is on: take it"
        yield "  off for other questions."
        if (known := found["knowledge"])["questions"]:
            kept = Estimate(**known["kept_on"])
            yield f"- {about}: of {known['questions']} things that the model knows by itself {kept:.0f} % are still right with an"
            yield "  adapter on."
        if (open_ := found["unanswerable"])["questions"]:
            on, in_context = (Estimate(**open_[name]) for name in ("declined_on", "declined_in_context"))
            yield f"- {about}: of {open_['questions']} questions that the context leaves open it declines {on:.0f} %, In-Context"
            yield f"  {in_context:.0f} %."
        first, last = (Estimate(**found["decay"]["on"][span]) for span in ("first_five", "last_five"))
        yield f"- {about}: over 15 turns its EM goes from {first:.0f} in the first five to {last:.0f} in the last five."
    yield "- English, texts of the lengths that it was trained on; longer ones are read in pieces (`docs/adapters.md`)."


def write_card(
    place: Path, scores: Path | None = None, *, chosen_on: Mapping[str, int] | None = None, notes: Sequence[str] = ()
) -> Path:
    """Write the card, the curves and the figures they come from into the model's folder.

    Args:
        place: the folder of the package that holds the model.
        scores: the folder of ``score.sh``; without one, of what ``scores.json`` in ``place`` keeps.
        chosen_on, notes: see `Results`.

    Raises:
        ValueError: the scores are not of the hypernetwork that lies there.
    """
    kept = json.loads((place / SCORES).read_text(encoding="utf-8")) if (place / SCORES).exists() else None
    weights, runs, info = digest_of(place), read_runs(place / "training"), read_info(place / "hypernetwork")
    assert info is not None
    if scores is not None:
        check_scored(scores, place)
        before = [Version.read(version) for version in kept["before"]] if kept else []
        if kept and kept["version"]["weights"] != weights:
            before.append(Version.read(kept["version"]))
        results = Results.of(scores, chosen_on=chosen_on or {}, before=before, notes=notes)
    else:
        if kept is None or kept["version"]["weights"] != weights:
            raise ValueError(f"{place / SCORES}: is not of the weights beside it; run score.sh and name its folder")
        results = Results.read(kept)
    version = results.version(weights, rank=info.hypernetwork.rank, samples=samples_drawn(runs))
    curves(place / CURVES, runs, [*results.before, version], compared(results))
    (place / CARD).write_text(page(place, results, version), encoding="utf-8")
    (place / SCORES).write_text(json.dumps(results.kept(version), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return place / CARD


def page(place: Path, results: Results, version: Version) -> str:
    """The card of the model that lies in ``place``."""
    info, runs = read_info(place / "hypernetwork"), read_runs(place / "training")
    assert info is not None
    reader = json.loads((place / "reader" / TRAINING_FILE).read_text(encoding="utf-8"))
    trained = [tensor for name, tensor in read_weights(place / "hypernetwork").items() if not name.startswith(MEASURED)]
    parameters = sum(tensor.numel() for tensor in trained)
    size = (place / "hypernetwork" / WEIGHTS_FILE).stat().st_size
    told_of = {"version": version, "runs": runs, "more": More.read(place), "reader": reader}
    lines = card(results, info, **told_of, parameters=parameters, size=size)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="?", type=Path, help="the folder of score.sh (default: what was kept of the last one)")
    parser.add_argument(
        "--chosen-on", nargs="+", default=[], metavar="SOURCE=QUESTIONS", help="that checkpoints were compared on before"
    )
    parser.add_argument(
        "--note", action="append", default=[], metavar="TEXT", help="what else is to be known of how it was measured"
    )
    args = parser.parse_args()
    chosen_on = {source: int(count) for source, _, count in (words.partition("=") for words in args.chosen_on)}
    print(write_card(PLACE, args.scores, chosen_on=chosen_on, notes=args.note))


if __name__ == "__main__":
    main()
