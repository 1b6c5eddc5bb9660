"""What was measured of the versions of ``smollm2-135m``, as ``scores.json`` keeps it, and what was wanted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shine.checkpoint import WEIGHTS_FILE
from shine.evaluation.results import PLAN_FILE, PREDICTIONS_FILE
from shine.evaluation.run import weights_digest
from shine.evaluation.scores import totals
from shine.evaluation.statistics import Estimate, difference, interval, way
from shine.evaluation.trust_page import FIGURES_FILE
from shine.lora import LoRA

SET_TITLES = {"squad": "SQuAD, unseen articles", "worlds": "invented worlds, unseen"}
OTHER_TITLES = {
    "squad": "SQuAD, other passages of two of these articles, by which no version was chosen",
    "worlds": "invented worlds, unseen, others by which no version was chosen",
}
"""Of ``configs/sets/passages/other.yaml``."""
CONTROL = "shine_other"
"""Each question under the adapter of another context."""
SAMPLES_OF_EACH = 4
KEPT = ("samples", "owners", "rest", "chosen_on", "notes", "answers", "other", "texts", "trust")
"""Of `Results`, beside the versions, in ``scores.json``."""
WANTED_WAY, WANTED_PERPLEXITY, WANTED_WORLDS = 50, 4, 60
"""Percent of SQuAD's way, perplexity of texts given back, percent of the answers about worlds."""


@dataclass(frozen=True)
class Version:
    """What was shipped once, and what it scored.

    Attributes:
        weights: the start of the SHA-256 of its file.
        samples: how many had been drawn for it, each as often as it was.
        scores: by name, as `Results.version` has them.
        dtype: that they were computed in.
        cosine: between its adapters of SQuAD's unseen articles.
    """

    weights: str
    rank: int
    samples: int
    scores: Mapping[str, Estimate]
    cosine: float
    dtype: str

    def kept(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @staticmethod
    def read(kept: Mapping[str, Any]) -> Version:
        """From `kept`."""
        scores = {name: Estimate(**found) for name, found in kept["scores"].items()}
        return Version(**{**kept, "scores": scores})


@dataclass(frozen=True)
class Score:
    """One score that every version has.

    Attributes:
        wanted: how much, and what that is called.
        lines: what else it is held against, by name.
    """

    name: str
    title: str
    wanted: tuple[str, float]
    lines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """What ``scores.json`` keeps of the weights that lie beside it.

    Attributes:
        answers, texts, trust: the summaries of ``test.py`` and ``test_pretrain.py`` and the figures of ``shine trust``.
        other: the summary of ``test.py`` on other questions, by which no version was chosen.
        samples: the first questions of ``test.py`` with what each method answered.
        owners: of the answers about worlds, those where one person has a fact of the kind that is asked for, and those where
            several have: ``questions``, and the EM of SHINE as an `Estimate` has it.
        rest: F1 on those of SQuAD's questions that were not used to choose these weights: ``questions``, ``contexts``, each
            method's as an `Estimate` has it, and how far SHINE is ``ahead`` of In-Context and of Only Question, and on its ``way``;
            empty where none was used.
        chosen_on: by source, how many of the questions, the first, had been used to choose these weights before all were asked.
        before: the versions that shipped before.
        notes: what else is to be known of how all this was measured, in sentences.
    """

    answers: Mapping[str, Any]
    texts: Mapping[str, Any]
    trust: Mapping[str, Any]
    other: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    owners: Mapping[str, Mapping[str, float]]
    rest: Mapping[str, Any]
    chosen_on: Mapping[str, int]
    before: Sequence[Version]
    notes: Sequence[str] = ()

    @staticmethod
    def of(folder: Path, *, chosen_on: Mapping[str, int], before: Sequence[Version], notes: Sequence[str] = ()) -> Results:
        """From the folder of ``score.sh``."""
        answers, texts, trust, other = (
            json.loads((folder / file).read_text(encoding="utf-8"))
            for file in ("test/summary.json", "test_pretrain/summary.json", f"trust/{FIGURES_FILE}", "other/summary.json")
        )
        lines = (folder / "test" / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        measured = _without_paths(answers), _without_paths(texts), trust, _without_paths(other)
        rest = _of_the_rest(rows, chosen_on["squad"]) if "squad" in chosen_on else {}
        return Results(*measured, _first_answers(rows), _by_owners(rows), rest, chosen_on, before, notes)

    @staticmethod
    def read(kept: Mapping[str, Any]) -> Results:
        """From ``scores.json``."""
        before = [Version.read(version) for version in kept["before"]]
        return Results(**{name: kept[name] for name in KEPT}, before=before)

    def kept(self, version: Version) -> dict[str, Any]:
        """As ``scores.json`` has it."""
        versions = {"version": version.kept(), "before": [each.kept() for each in self.before]}
        return {**versions, **{name: getattr(self, name) for name in KEPT}}

    @property
    def of_others(self) -> Results:
        """The same of the other questions."""
        return replace(self, answers=self.other)

    def version(self, weights: str, *, rank: int, samples: int) -> Version:
        """These weights, with the scores that are compared from version to version."""
        scores = {
            "squad": self.score("squad", "shine", "f1"),
            "worlds": self.score("worlds", "shine", "em"),
            "texts": self.perplexity("shine", "reconstruct"),
        }
        dtype = self.answers["config"]["dtype"]
        return Version(weights, rank, samples, scores, self.cosine("squad").value, dtype)

    def score(self, source: str, method: str, name: str) -> Estimate:
        """A score in percent."""
        found = self.answers["sources"][source]["methods"][method]
        return Estimate(found[name], *found["intervals"][name])

    def ahead(self, source: str, ours: str, theirs: str, name: str) -> Estimate:
        """How much one method is ahead of another."""
        return Estimate(**self.answers["sources"][source]["differences"][f"{ours} - {theirs}"][name])

    def way_to_tuned(self, source: str, name: str) -> Estimate | None:
        """SHINE's way from Only Question to In-Context, tuned."""
        found = self.answers["sources"][source]["ways"]["shine"]["in_context_tuned"][name]
        return Estimate(**found) if found else None

    def perplexity(self, method: str, task: str, bound: str = "") -> Estimate:
        """Of texts given back, all or those of up to ``bound`` tokens."""
        found = self.texts["sources"]["wikitext"]["methods"][method][task]
        found = found["lengths"][bound] if bound else found
        return Estimate(found["perplexity"], *found["intervals"]["perplexity"])

    def cosine(self, source: str) -> Estimate:
        """Between SHINE's adapters of the contexts of a set."""
        found = self.answers["sources"][source]["methods"]["shine"]["adapters"]
        return Estimate(found["cosine"], *found["intervals"]["cosine"])

    def effective_rank(self, source: str) -> float:
        """Of SHINE's adapters of the contexts of a set."""
        return float(self.answers["sources"][source]["methods"]["shine"]["adapters"]["effective_rank"])


@dataclass(frozen=True)
class Target:
    """What was wanted of a score, and what came."""

    wanted: str
    measured: str
    reached: bool


def targets(results: Results) -> list[Target]:
    """What was wanted, against what was measured."""
    ours, only_question = (results.score("squad", method, "f1") for method in ("shine", "only_question"))
    above_untuned = results.ahead("squad", "shine", "in_context", "f1")
    gone = results.way_to_tuned("squad", "f1")
    given_back = results.perplexity("shine", "reconstruct")
    worlds, without = (results.score("worlds", method, "em") for method in ("shine", "only_question"))
    cosines = {title: results.cosine(name) for name, title in SET_TITLES.items()}
    return [
        Target(
            "SQuAD: SHINE's F1 above Only Question's, intervals apart",
            f"{ours:.1f} against {only_question:.1f}; paired {results.ahead('squad', 'shine', 'only_question', 'f1'):+.1f}",
            ours.low > only_question.high,
        ),
        Target("SQuAD: SHINE above untuned In-Context, F1", f"{above_untuned:+.1f}", above_untuned.low > 0),
        Target(
            f"SQuAD: at least {WANTED_WAY} % of the way to In-Context, tuned, F1",
            f"{gone:.1f} %" if gone else "no way to go",
            bool(gone and gone.value >= WANTED_WAY),
        ),
        Target(
            f"reconstruction of 100 to 300 tokens: perplexity below {WANTED_PERPLEXITY}",
            f"{given_back:.2f}",
            given_back.value < WANTED_PERPLEXITY,
        ),
        Target(
            f"invented worlds: at least {WANTED_WORLDS} % exact, under 5 % without the context",
            f"{worlds:.1f} and {without:.1f}",
            worlds.value >= WANTED_WORLDS and without.value < 5,
        ),
        Target(
            "cosine between adapters of different contexts below 0.8",
            ", ".join(f"{found:.3f} ({title})" for title, found in cosines.items()),
            max(found.value for found in cosines.values()) < 0.8,
        ),
    ]


def compared(results: Results) -> list[Score]:
    """The scores of the picture, each with what it is held against."""
    untuned, without, tuned = (
        results.score("squad", method, "f1").value for method in ("in_context", "only_question", "in_context_tuned")
    )
    half = "wanted: half of the way to In-Context, tuned", without + (tuned - without) * WANTED_WAY / 100
    return [
        Score("squad", "SQuAD, unseen articles: F1", half, {"Only Question": without, "In-Context": untuned}),
        Score("worlds", "invented worlds, unseen: exact, percent", ("wanted", WANTED_WORLDS)),
        Score("texts", "WikiText-2 given back: perplexity", ("wanted", WANTED_PERPLEXITY)),
    ]


def digest_of(place: Path) -> str:
    """The start of the SHA-256 of the weights in the model's folder."""
    return hashlib.sha256((place / "hypernetwork" / WEIGHTS_FILE).read_bytes()).hexdigest()[:16]


def check_scored(scores: Path, place: Path) -> None:
    """Make sure that the tests loaded the weights, and the reader, that lie in ``place``, and `shine trust` too."""
    reader = LoRA.load(place / "reader")
    for name, readers in (("test", [reader]), ("other", [reader]), ("test_pretrain", [])):
        plan = json.loads((scores / name / PLAN_FILE).read_text(encoding="utf-8"))
        dtype = getattr(torch, plan["config"]["backbone"]["dtype"])
        expected = weights_digest(place / "hypernetwork", [reader.to(dtype=dtype) for reader in readers])
        if plan["weights"] != expected:
            raise _of_other_weights(scores / name, place)
    examined = json.loads((scores / "trust" / FIGURES_FILE).read_text(encoding="utf-8"))["weights"]
    if examined != weights_digest(place / "hypernetwork", []):
        raise _of_other_weights(scores / "trust", place)


def _of_other_weights(folder: Path, place: Path) -> ValueError:
    return ValueError(f"{folder}: scored other weights than {place / 'hypernetwork'}; run score.sh on that")


def _by_owners(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """SHINE's answers about worlds, each of whose facts is asked for once, by how many have one of that kind."""
    ours = [row for row in rows if (row["source"], row["method"]) == ("worlds", "shine")]
    having = Counter((row["id"], row["kind"]) for row in ours)
    parts: dict[str, list[Mapping[str, Any]]] = {"alone": [], "shared": []}
    for row in ours:
        parts["alone" if having[row["id"], row["kind"]] == 1 else "shared"].append(row)
    return {name: {"questions": len(found), **interval(totals(found, "em")).plain()} for name, found in parts.items() if found}


def _of_the_rest(rows: Sequence[Mapping[str, Any]], chosen: int) -> dict[str, Any]:
    """Of SQuAD's contexts that come after the first ``chosen`` questions, each context with all its questions."""
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["source"] == "squad":
            methods.setdefault(row["method"], []).append(row)
    ours = methods["shine"]
    later = {row["id"] for row in ours[chosen:]} - {row["id"] for row in ours[:chosen]}
    found = {method: totals([row for row in mine if row["id"] in later], "f1") for method, mine in methods.items()}
    gone = way(found["shine"], floor=found["only_question"], ceiling=found["in_context_tuned"])
    return {
        "questions": sum(row["id"] in later for row in ours),
        "contexts": len(later),
        "methods": {method: interval(each).plain() for method, each in found.items()},
        "ahead": {other: difference(found["shine"], found[other]).plain() for other in ("in_context", "only_question")},
        "way": gone.plain() if gone else None,
    }


def _first_answers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first question of the first contexts of each source, with the answer of every method but the control."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["turn"] == 0 and row["method"] != CONTROL:
            sample = {"source": row["source"], "question": row["question"], "right": row["answers"][0], "answers": {}}
            found.setdefault((row["source"], row["id"]), sample)["answers"][row["method"]] = row["prediction"]
    sources = dict.fromkeys(sample["source"] for sample in found.values())
    return [
        sample for source in sources for sample in [each for each in found.values() if each["source"] == source][:SAMPLES_OF_EACH]
    ]


def _without_paths(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary without what it says of the machine that it was made on, and of a training that it does not do."""
    config = {name: summary["config"].get(name) for name in ("methods", "max_new_tokens", "seed", "prompts")}
    config["dtype"] = summary["config"]["backbone"]["dtype"]
    config["context_length"] = summary["config"]["stage"]["context_length"]
    return {"config": config, **{name: value for name, value in summary.items() if name != "config"}}
