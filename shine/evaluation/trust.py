"""What an adapter does beside answering: to unrelated questions, to what the model believed, and over a long conversation.

Every figure is a rate in percent, with its 95 % interval over contexts. "Off" is the same model, asked in the same words without
an adapter; In-Context stands beside where it is a yardstick.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shine.data.examples import Example, Turn
from shine.data.worlds import NAMES, RELATIONS
from shine.evaluation.methods import Answer, Asked, InContext, Method, Shine, Speaker
from shine.evaluation.scores import totals
from shine.evaluation.statistics import interval
from shine.lora import LoRA
from shine.metrics import exact_match, f1, normalise

TURNS, OWN, FACTS = 15, 6, 4
UNKNOWN = (
    *("not know", "t know", "unknown", "not sure", "unclear", "not mention", "not say", "not state", "not specif", "not given"),
    *("not provid", "no information", "cannot", "can not", "can t", "unable", "no answer", "unanswerable", "not answer"),
)
"""What an answer holds, in normal form and from the start of a word on, that says it does not know."""


class Off(Method):
    """The model without an adapter, asked as SHINE is."""

    plain = True


@dataclass(frozen=True)
class TrustSet:
    """What is asked.

    Attributes:
        examples: contexts with questions whose answers they hold.
        unanswerable: for each example, a question that its context does not answer, or ``None`` where none is known.
        knowledge: questions of general knowledge, which no context is about.
    """

    name: str
    examples: tuple[Example, ...]
    unanswerable: tuple[str | None, ...]
    knowledge: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Asker:
    """The three ways to answer, and how."""

    on: Shine
    off: Off
    in_context: InContext
    max_new_tokens: int = 32
    batch_size: int = 16

    @staticmethod
    def of(speaker: Speaker, on: Shine, *, max_new_tokens: int) -> Asker:
        """Three methods on one backbone."""
        return Asker(on, Off("off", speaker), InContext("in_context", speaker), max_new_tokens)

    def methods(self) -> dict[str, Method]:
        """By the names that the report uses."""
        return {"on": self.on, "off": self.off, "in_context": self.in_context}

    def ask(self, method: Method, asked: Sequence[Asked]) -> list[str]:
        """Texts of the answers."""
        found: list[Answer] = method.answer(asked, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        return [answer.text for answer in found]


def examine(asker: Asker, questions: TrustSet, *, seed: int) -> dict[str, Any]:
    """Every part of the report on one set; its contexts are read once, `Asker.batch_size` at a time."""
    found: dict[str, Any] = {"name": questions.name, "contexts": len(questions.examples)}
    loras: list[LoRA] = []
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in ("interference", "knowledge", "belief", "unanswerable", "decay")}
    size = asker.batch_size
    for start in range(0, len(questions.examples), size):
        group = questions.examples[start : start + size]
        for method in asker.methods().values():
            method.prepare(group)
        assert asker.on.lora is not None
        loras.append(asker.on.lora)
        # Half the set away, so that no two are neighbours in a book.
        away = [(start + n + len(questions.examples) // 2) % len(questions.examples) for n in range(len(group))]
        rows["interference"] += interference(asker, group, [questions.examples[n] for n in away])
        rows["knowledge"] += knowledge(asker, group, questions.knowledge, first=start)
        rows["belief"] += belief(asker, group)
        rows["unanswerable"] += unanswerable(asker, group, questions.unanswerable[start : start + size])
        rows["decay"] += decay(asker, group, questions.examples, rng=random.Random(f"{seed} {start}"))
    for part, mine in rows.items():
        found[part] = {"questions": len(mine), **rates(mine)} if part != "decay" else by_position(mine)
    return {**found, "geometry": geometry(LoRA.stack(loras)), "rows": rows}


def interference(asker: Asker, group: Sequence[Example], others: Sequence[Example]) -> list[dict[str, Any]]:
    """Questions about another context, with the adapter on and off.

    ``changed``: the adapter gives another answer. ``right_on``, ``right_off``: exactly right. ``leak_on``, ``leak_off``: the answer
    is wrong and stands in the context whose adapter is on.
    """
    asked = [Asked(n, turn.question) for n, other in enumerate(others) for turn in other.turns[:2]]
    turns = [turn for other in others for turn in other.turns[:2]]
    on, off = (asker.ask(method, asked) for method in (asker.on, asker.off))
    rows = []
    for question, turn, with_it, without in zip(asked, turns, on, off, strict=True):
        context = group[question.context]
        row: dict[str, Any] = {"id": context.id, "question": turn.question, "answer_on": with_it, "answer_off": without}
        row["changed"] = normalise(with_it) != normalise(without)
        for name, said in (("on", with_it), ("off", without)):
            right = exact_match(said, turn.answers) == 1.0
            row |= {f"right_{name}": right, f"leak_{name}": not right and stands_in(said, context.context)}
        rows.append(row)
    return rows


def knowledge(asker: Asker, group: Sequence[Example], questions: Sequence[Turn], *, first: int) -> list[dict[str, Any]]:
    """What the model knows by itself, asked with adapters on that are about something else: of that, what is left?

    Each context takes `FACTS` of the questions, going round them from context number ``first`` of the set on. Those that the model
    answers wrongly without an adapter are left out. ``kept_on``: a right answer stands in what it says. ``leak_on``: none does, and
    what it says stands in the context.
    """
    numbers = [(n, FACTS * (first + n) + k) for n in range(len(group)) for k in range(min(FACTS, len(questions)))]
    chosen = [(n, questions[number % len(questions)]) for n, number in numbers]
    asked = [Asked(n, turn.question) for n, turn in chosen]
    on, off = (asker.ask(method, asked) if asked else [] for method in (asker.on, asker.off))
    rows = []
    for (n, turn), with_it, without in zip(chosen, on, off, strict=True):
        if any(stands_in(answer, without) for answer in turn.answers):
            row: dict[str, Any] = {"id": group[n].id, "question": turn.question, "answer_on": with_it, "answer_off": without}
            row["kept_on"] = any(stands_in(answer, with_it) for answer in turn.answers)
            rows.append({**row, "leak_on": not row["kept_on"] and stands_in(with_it, group[n].context)})
    return rows


def belief(asker: Asker, group: Sequence[Example]) -> list[dict[str, Any]]:
    """Questions whose right answer is not what the model says without the context: does it say what it was told?

    ``told``: the context's answer. ``believed``: the one it gave without. ``other``: neither.
    """
    turns = [(n, turn) for n, example in enumerate(group) for turn in example.turns]
    asked = [Asked(n, turn.question) for n, turn in turns]
    said = {name: asker.ask(method, asked) for name, method in asker.methods().items()}
    rows = []
    for index, (n, turn) in enumerate(turns):
        before = said["off"][index]
        if f1(before, turn.answers) > 0:
            continue
        row: dict[str, Any] = {"id": group[n].id, "question": turn.question, "told": turn.answers[0], "answer_off": before}
        for name in ("on", "in_context"):
            answer = said[name][index]
            told, believed = exact_match(answer, turn.answers) == 1.0, normalise(answer) == normalise(before)
            row |= {f"answer_{name}": answer, f"told_{name}": told, f"believed_{name}": believed}
            row[f"other_{name}"] = not told and not believed
        rows.append(row)
    return rows


def unanswerable(asker: Asker, group: Sequence[Example], questions: Sequence[str | None]) -> list[dict[str, Any]]:
    """Questions that the context does not answer.

    ``declined``: the answer says so (`UNKNOWN`). ``invented``: it is words of the context instead, which belong to something else.
    """
    asked = [Asked(n, question) for n, question in enumerate(questions) if question is not None]
    said = {name: asker.ask(method, asked) if asked else [] for name, method in asker.methods().items()}
    rows = []
    for index, question in enumerate(asked):
        example = group[question.context]
        row: dict[str, Any] = {"id": example.id, "question": question.question}
        for name, answers in said.items():
            row |= {f"answer_{name}": answers[index], f"declined_{name}": declines(answers[index])}
            row[f"invented_{name}"] = not declines(answers[index]) and stands_in(answers[index], example.context)
        rows.append(row)
    return rows


def decay(asker: Asker, group: Sequence[Example], pool: Sequence[Example], *, rng: random.Random) -> list[dict[str, Any]]:
    """Conversations of `TURNS` turns: the questions about the context fall anywhere among others, and only they are scored.

    Each is asked once, so that no answer can be read off the conversation.
    """
    plans = [_long_conversation(example, pool, rng) for example in group]
    rows = []
    for name in ("on", "in_context"):
        method, histories = asker.methods()[name], [[] for _ in group]  # type: ignore[var-annotated]
        for turn in range(TURNS):
            asked = [Asked(n, plan[turn][0].question, tuple(histories[n]), turn) for n, plan in enumerate(plans)]
            for n, text in enumerate(asker.ask(method, asked)):
                question, own = plans[n][turn]
                histories[n].append((question.question, text))
                if own:
                    scores = {"em": exact_match(text, question.answers), "f1": f1(text, question.answers)}
                    rows.append({"id": group[n].id, "method": name, "position": turn + 1, "answer": text, **scores})
    return rows


def fills_conversations(examples: Sequence[Example]) -> bool:
    """Whether there are questions enough about the other contexts for the `TURNS` turns of each one's conversation."""
    count = sum(len(example.turns) for example in examples)
    return all(count - len(example.turns) + min(len(example.turns), OWN) >= TURNS for example in examples)


def _long_conversation(example: Example, pool: Sequence[Example], rng: random.Random) -> list[tuple[Turn, bool]]:
    own = [(turn, True) for turn in rng.sample(example.turns, min(len(example.turns), OWN))]
    others = [turn for other in pool if other.id != example.id for turn in other.turns]
    fillers = [(turn, False) for turn in rng.sample(others, TURNS - len(own))]
    return rng.sample(own + fillers, TURNS)


def rates(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every yes-or-no column the share of yes, in percent, with its interval."""
    names = [name for name, value in rows[0].items() if isinstance(value, bool)] if rows else []
    return {name: interval(totals(rows, name)).plain() for name in names}


def by_position(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """EM at each place in the conversation, and of the first five turns against the last five."""
    found: dict[str, Any] = {}
    for method in ("on", "in_context"):
        mine = [row for row in rows if row["method"] == method]
        places = {p: [row for row in mine if row["position"] == p] for p in range(1, TURNS + 1)}
        spans = {"first_five": [r for r in mine if r["position"] <= 5], "last_five": [r for r in mine if r["position"] > TURNS - 5]}
        found[method] = {
            "turns": {str(p): {"em": interval(totals(at, "em")).plain(), "questions": len(at)} for p, at in places.items() if at},
            **{name: interval(totals(span, "em")).plain() for name, span in spans.items() if span},
        }
    return found


def geometry(lora: LoRA) -> dict[str, Any]:
    """How unlike the adapters of different contexts are, and how many directions each uses."""
    away = lora.pair_cosines().float()
    found: dict[str, Any] = {"effective_rank": float(lora.effective_rank()), "rank": next(iter(lora.values()))[0].shape[2]}
    if len(away):
        spread = {"p10": float(away.quantile(0.1)), "mean": float(away.mean()), "p90": float(away.quantile(0.9))}
        found |= {"cosine": spread, "cosines": [round(value, 4) for value in away.sort().values.tolist()]}
    return found


def stands_in(answer: str, context: str) -> bool:
    """Whether the words of an answer stand in a context, in this order."""
    said = normalise(answer)
    return bool(said) and f" {said} " in f" {normalise(context)} "


def declines(answer: str) -> bool:
    """Whether an answer says that it does not know."""
    text = f" {normalise(answer.replace(chr(0x2019), ' ').replace(chr(39), ' '))} "
    return any(f" {mark}" in text for mark in UNKNOWN)


def world_set(examples: Sequence[Example], *, name: str = "invented worlds", seed: int = 0) -> TrustSet:
    """Invented worlds; unanswerable is a fact of a kind that the context does not tell about somebody it names."""
    rng = random.Random(seed)
    asked = []
    for example in examples:
        words = set(example.context.replace(".", " ").split())
        people = [person for person in NAMES if person in words]
        told = {(person, turn.kind) for turn in example.turns for person in people if person in turn.question.rstrip("?").split()}
        open_ones = [(person, kind) for person in people for kind in RELATIONS if (person, kind.kind) not in told]
        person, relation = rng.choice(open_ones)
        asked.append(rng.choice(relation.questions).format(who=person))
    return TrustSet(name, tuple(examples), tuple(asked))


def passage_set(examples: Sequence[Example], *, name: str) -> TrustSet:
    """Passages with questions; unanswerable is a question about another passage, mostly of the same article.

    It is the nearest one after it of which no gold answer stands in the passage; where there is none, nothing is asked.
    """
    return TrustSet(name, tuple(examples), tuple(_open_question(examples, n) for n in range(len(examples))))


def _open_question(examples: Sequence[Example], place: int) -> str | None:
    context = examples[place].context
    for other in [*examples[place + 1 :], *examples[:place]]:
        for turn in other.turns:
            if not any(stands_in(answer, context) for answer in turn.answers):
                return turn.question
    return None


def read_knowledge(file: Path) -> tuple[Turn, ...]:
    """Questions of general knowledge: one ``{"question": "…", "answers": ["…"]}`` a line.

    Raises:
        ValueError: no such file, or a line is none; the message names it.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; name one with questions of general knowledge")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            question, answers = row["question"], tuple(row["answers"])
        except (json.JSONDecodeError, KeyError, TypeError):
            question, answers = None, ()
        if not isinstance(question, str) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f'{file}, line {number}: must be {{"question": "…", "answers": ["…"]}}')
        found.append(Turn(question, answers))
    return tuple(found)
