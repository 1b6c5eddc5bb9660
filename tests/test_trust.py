"""What an adapter does beside answering: each measure on answers whose case is known, and the command on real models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hypernetwork_config
from matplotlib import image
from test_sources import shared, squad_folder

from shine.backbone import Backbone
from shine.checkpoint import CheckpointInfo, save_hypernetwork
from shine.cli.main import main
from shine.config import BackboneConfig
from shine.data.examples import Example, Turn
from shine.data.worlds import RELATIONS, World
from shine.evaluation import trust
from shine.evaluation.methods import Answer, Asked
from shine.hypernetwork import Hypernetwork
from shine.lora import LoRA

ROOT = Path(__file__).resolve().parent.parent
COLORS = ("red", "blue", "green", "gray", "white", "black", "pink", "brown", "gold", "teal")
APPLE = Example("apple", "Apple is green.", (Turn("What color is an apple?", ("green",)),))
PARIS = Example("paris", "Paris is in Italy.", (Turn("Where is Paris?", ("Italy", "in Italy")),))


class Scripted:
    """A way to answer whose answers are given: question -> answer."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.seen: list[Asked] = []

    def answer(self, asked: Sequence[Asked], **_: Any) -> list[Answer]:
        self.seen += asked
        return [Answer(self.answers[question.question], False) for question in asked]


def asker(on: dict[str, str], off: dict[str, str], in_context: dict[str, str] | None = None) -> Any:
    return trust.Asker(*(Scripted(answers) for answers in (on, off, in_context or off)))  # type: ignore[arg-type]


def test_interference_is_what_an_adapter_does_to_questions_about_another_context() -> None:
    """With the apple's adapter on, Paris is asked about, and the other way round."""
    on = {"Where is Paris?": "Green!", "What color is an apple?": "green"}
    off = {"Where is Paris?": "France", "What color is an apple?": "Green."}
    paris, apple = trust.interference(asker(on, off), [APPLE, PARIS], [PARIS, APPLE])
    assert (paris["id"], paris["question"]) == ("apple", "Where is Paris?")
    assert {key: paris[key] for key in ("changed", "right_on", "right_off", "leak_on", "leak_off")} == {
        "changed": True,
        "right_on": False,
        "right_off": False,
        "leak_on": True,
        "leak_off": False,
    }
    # The same answer but for case and marks is no change, and a right one no leak.
    assert (apple["changed"], apple["right_on"], apple["leak_on"]) == (False, True, False)


def test_belief_looks_at_what_the_model_says_otherwise_without_the_context() -> None:
    off = {"Where is Paris?": "France", "What color is an apple?": "green"}
    on = {"Where is Paris?": "in Italy", "What color is an apple?": "green"}
    found = trust.belief(asker(on, off, {"Where is Paris?": "france.", "What color is an apple?": "green"}), [APPLE, PARIS])
    assert [row["question"] for row in found] == ["Where is Paris?"], "it knew the apple"
    row = found[0]
    assert (row["told_on"], row["believed_on"], row["other_on"]) == (True, False, False)
    assert (row["told_in_context"], row["believed_in_context"], row["other_in_context"]) == (False, True, False)
    neither = trust.belief(asker({**on, "Where is Paris?": "Spain"}, off), [PARIS])[0]
    assert (neither["told_on"], neither["believed_on"], neither["other_on"]) == (False, False, True)


@pytest.mark.parametrize(
    ("answer", "declined", "invented"),
    [
        ("I don't know.", True, False),
        ("The text does not say so", True, False),
        ("Unanswerable", True, False),
        ("Italy", False, True),
        ("Spain", False, False),
        ("", False, False),
        ("Ita", False, False),
        ("Saint Knowles", False, False),
    ],
)
def test_an_open_question_is_declined_invented_or_guessed(answer: str, declined: bool, invented: bool) -> None:
    found = trust.unanswerable(asker({"Who rules?": answer}, {"Who rules?": "x"}), [PARIS], ["Who rules?"])[0]
    assert (found["declined_on"], found["invented_on"]) == (declined, invented)


def test_what_the_model_knew_is_kept_lost_or_overwritten() -> None:
    """Only what it knows without an adapter counts; the questions go round the contexts."""
    off = {"Sky?": "It is blue.", "Snow?": "white", "Moon?": "cheese", "Sun?": "yellow", "Sea?": "salt"}
    on = {"Sky?": "Blue", "Snow?": "green", "Moon?": "rock", "Sun?": "hot", "Sea?": "salt"}
    answers = {"Sky?": "blue", "Snow?": "white", "Moon?": "rock", "Sun?": "yellow", "Sea?": "salt"}
    facts = [Turn(question, (answer,)) for question, answer in answers.items()]
    rows = trust.knowledge(asker(on, off), [APPLE, PARIS], facts, first=0)
    assert [(row["id"], row["question"]) for row in rows] == [
        *(("apple", "Sky?"), ("apple", "Snow?"), ("apple", "Sun?")),
        *(("paris", "Sea?"), ("paris", "Sky?"), ("paris", "Snow?")),
    ]
    assert [(row["kept_on"], row["leak_on"]) for row in rows[:3]] == [(True, False), (False, True), (False, False)]
    assert [row["leak_on"] for row in rows[3:]] == [False] * 3, "green stands in the apple's context only"
    assert trust.knowledge(asker(on, off), [APPLE], [], first=0) == []


def test_what_a_passage_answers_after_all_is_not_unanswerable() -> None:
    """The neighbour's answer stands in it: the next question whose answer does not is asked, and if there is none, nothing."""
    first = Example("1", "Ada is red. Bo is blue.", (Turn("Ada?", ("red",)), Turn("And Bo?", ("Blue", "navy"))))
    second = Example("2", "Bo is blue.", (Turn("Bo?", ("blue",)),))
    assert trust.passage_set([first, second], name="x").unanswerable == (None, "Ada?")
    asking = asker({"Ada?": "blue"}, {"Ada?": "?"})
    (row,) = trust.unanswerable(asking, [first, second], (None, "Ada?"))
    assert (row["id"], row["invented_on"]) == ("2", True)
    assert trust.unanswerable(asking, [first], (None,)) == []


def test_questions_of_general_knowledge_are_read_and_checked(tmp_path: Path) -> None:
    facts = trust.read_knowledge(ROOT / "examples" / "knowledge.jsonl")
    assert len({fact.question for fact in facts}) == len(facts) >= 20
    beliefs = (ROOT / "examples" / "beliefs.jsonl").read_text()
    assert not any(fact.question in beliefs for fact in facts)
    file = tmp_path / "bad.jsonl"
    for line in ("{", "[]", '{"question": "Sky?"}', '{"question": "Sky?", "answers": []}', '{"question": 1, "answers": ["blue"]}'):
        file.write_text(f'{{"question": "Snow?", "answers": ["white"]}}\n{line}\n')
        with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: must be"):
            trust.read_knowledge(file)
    with pytest.raises(ValueError, match="no such file"):
        trust.read_knowledge(tmp_path / "none.jsonl")


def test_a_long_conversation_has_fifteen_turns_and_scores_its_own_questions() -> None:
    """The answers so far are its history; no question comes twice; only those about the context count."""
    own = Example("own", "Ada.", tuple(Turn(f"own {n}?", (f"a{n}",)) for n in range(4)))
    pool = [own, Example("other", "Bo.", tuple(Turn(f"other {n}?", ("b",)) for n in range(20)))]
    answers = {turn.question: turn.answer if "own" in turn.question else "?" for example in pool for turn in example.turns}
    asking = asker({**answers, "own 3?": "wrong"}, answers)
    rows = trust.decay(asking, [own], pool, rng=random.Random(5))
    seen = asking.on.seen
    assert [len(asked.history) for asked in seen] == list(range(trust.TURNS))
    assert len({asked.question for asked in seen}) == trust.TURNS
    assert seen[-1].history == tuple((asked.question, asking.on.answers[asked.question]) for asked in seen[:-1])
    mine = [row for row in rows if row["method"] == "on"]
    assert {row["position"] for row in mine} == {n for n, asked in enumerate(seen, start=1) if asked.question.startswith("own")}
    assert sorted(row["em"] for row in mine) == [0.0, 1.0, 1.0, 1.0]
    found = trust.by_position(rows)
    for span, places in (("first_five", range(1, 6)), ("last_five", range(11, 16))):
        inside = [row["em"] for row in mine if row["position"] in places]
        assert found["on"][span]["value"] == pytest.approx(100 * sum(inside) / len(inside))
    assert sum(place["questions"] for place in found["on"]["turns"].values()) == 4


@pytest.mark.parametrize("counts", [(15, 9), (15, 8), (6, 9), (5, 9), (1, 7, 7), (1, 6, 7)])
def test_conversations_are_held_where_there_are_questions_enough(counts: tuple[int, ...]) -> None:
    """Said beforehand: where it is not, drawing the other questions fails."""
    sets = [Example(str(n), "x", tuple(Turn(f"{n} {k}?", ("a",)) for k in range(size))) for n, size in enumerate(counts)]
    drawn = 0
    for example in sets:
        with suppress(ValueError):
            drawn += len(trust._long_conversation(example, sets, random.Random(3))) == trust.TURNS
    assert trust.fills_conversations(sets) == (drawn == len(sets))


def test_a_question_that_is_asked_twice_has_an_answer_each_time() -> None:
    """The same words twice about one context, each time with a right answer of its own."""
    twice = Example("x", "Ada is red, then blue.", (Turn("Color?", ("red",)), Turn("Color?", ("blue",))))
    found = trust.belief(asker({"Color?": "blue"}, {"Color?": "green"}), [twice])
    assert [(row["told"], row["told_on"]) for row in found] == [("red", False), ("blue", True)]


def test_geometry_is_that_of_matrices_made_by_hand() -> None:
    """Two adapters of orthogonal updates, and one opposite to the first; each of one direction out of two."""

    def adapter(a: list[float], b: list[float]) -> LoRA:
        left, right = torch.tensor([[[x, 0.0] for x in a]]), torch.tensor([[b, [0.0] * len(b)]])
        return LoRA({"linear": (left, right)})

    found = trust.geometry(LoRA.stack([adapter([1, 0], [1, 0]), adapter([0, 1], [0, 2]), adapter([-1, 0], [3, 0])]))
    assert found["cosines"] == [-1.0, 0.0, 0.0]
    assert found["cosine"]["mean"] == pytest.approx(-1 / 3, abs=1e-5)
    assert found["effective_rank"] == pytest.approx(1.0, abs=1e-4)
    assert found["rank"] == 2


def test_worlds_are_asked_what_they_do_not_tell() -> None:
    examples = list(World(seed=5).examples(40))
    questions = trust.world_set(examples, seed=1)
    forms = {form.format(who="") for relation in RELATIONS for form in relation.questions}
    for example, question in zip(examples, questions.unanswerable, strict=True):
        assert question not in {turn.question for turn in example.turns}
        person = next(
            word for word in question.rstrip("?").split() if word in example.context.replace(".", " ").split() and word[0].isupper()
        )
        assert question.replace(person, "") in forms


@pytest.fixture
def checkpoint(tiny_backbone_folder: str, tmp_path: Path, make_backbone: Callable[..., Backbone]) -> str:
    torch.manual_seed(4)
    config = tiny_hypernetwork_config()
    backbone = BackboneConfig(path=tiny_backbone_folder, dtype="float32", device="cpu")
    save_hypernetwork(tmp_path / "checkpoint", Hypernetwork(config, make_backbone()).state_dict(), CheckpointInfo(backbone, config))
    return str(tmp_path / "checkpoint")


def small_squad(folder: Path) -> Path:
    """Ten short passages of three questions each, as SQuAD lays them out."""
    places = [(passage, question) for passage in range(10) for question in range(3)]
    columns = {
        "id": [f"q{passage}-{question}" for passage, question in places],
        "title": ["t"] * 30,
        "context": [f"Person {passage} is {COLORS[passage]}." for passage, _ in places],
        "question": [f"What of {passage} is {question}?" for passage, question in places],
        "answers": [{"text": [COLORS[passage]], "answer_start": [12]} for passage, _ in places],
    }
    squad_folder(folder, **columns)
    return folder


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "real"])
def test_one_command_makes_one_page_of_three_sets(
    real: bool, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model on worlds, on SQuAD (the real one where it lies beside the project), and on beliefs of our own."""
    if not real:
        # Letter by letter, as the tiny model reads, fifteen turns are thousands of tokens.
        monkeypatch.setattr(trust, "TURNS", 6)
    squad = str(shared("squad") if real else small_squad(tmp_path / "squad"))
    output = tmp_path / "page"
    arguments = ["--squad", squad, "--file", str(ROOT / "examples" / "beliefs.jsonl"), "--contexts", "10", "--max-new-tokens", "3"]
    arguments += ["--knowledge", str(ROOT / "examples" / "knowledge.jsonl")]
    assert main(["trust", checkpoint, *arguments, "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output / "trust.md")
    page, figures = (output / "trust.md").read_text(), json.loads((output / "trust.json").read_text())
    assert [found["name"] for found in figures["sets"]] == ["invented worlds", "SQuAD", "beliefs.jsonl"]
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    for found in figures["sets"]:
        assert f"## {found['name']} (10 contexts)" in page
        mine = [row for row in rows if row["set"] == found["name"]]
        changed = [row["answer_on"] for row in mine if row["part"] == "interference"]
        share = 100 * sum(row["changed"] for row in mine if row["part"] == "interference") / len(changed)
        assert found["interference"]["changed"]["value"] == pytest.approx(share)
        assert f"| answer changed by the adapter | {share:.1f} [" in page
        assert len(found["geometry"]["cosines"]) == 45
        assert 1 <= found["geometry"]["effective_rank"] <= 2
        assert found["unanswerable"]["questions"] == 10
    pixels = image.imread(output / "trust.png")
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::7]}) > 20


@pytest.mark.slow
def test_the_shipped_adapters_are_believed_differ_and_last(tmp_path: Path) -> None:
    """The CPU world: most of what it is told is said, adapters are unlike each other, and a text it cannot read is named."""
    beliefs = str(ROOT / "examples" / "beliefs.jsonl")
    assert main(["trust", "cpu-world", "--contexts", "10", "--file", beliefs, "--output", str(tmp_path)]) == 0
    worlds, foreign = json.loads((tmp_path / "trust.json").read_text())["sets"]
    assert worlds["belief"]["told_on"]["value"] > 65
    assert worlds["belief"]["told_in_context"]["value"] > 95
    assert worlds["geometry"]["cosine"]["mean"] < 0.9
    assert 1 < worlds["geometry"]["effective_rank"] < 2
    assert worlds["decay"]["on"]["first_five"]["value"] > 60
    assert worlds["decay"]["on"]["last_five"]["value"] > 50
    assert worlds["unanswerable"]["declined_on"]["value"] == 0, "it was never taught to decline"
    assert foreign["belief"]["told_in_context"]["value"] == 0
    page = (tmp_path / "trust.md").read_text()
    assert page.count("**This backbone cannot read these contexts**") == 1
    assert page.index("**This backbone cannot read") > page.index("## beliefs.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "1"], "contexts must be at least 2"),
        (["--no-worlds"], "there must be worlds or a source"),
        (["--no-worlds", "--file", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["--no-worlds", "--file", "small.jsonl"], "small.jsonl: 1 contexts hold too few questions for conversations of 15 turns"),
        (["--contexts", "2"], "invented worlds: 2 contexts hold too few questions for conversations of 15 turns"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.jsonl").write_text('{"context": "Ada.", "turns": [{"question": "Who?", "answers": ["Ada"]}]}\n')
    assert main(["trust", checkpoint, *arguments, "--output", "page"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page" / "trust.md").exists()
    assert main(["trust", "no-such-checkpoint", "--output", "page"]) == 2


def test_conversations_keep_each_methods_own_answers(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``shine converse`` on a tiny model: every question of the example file, three answers each, as JSON lines too."""
    file = ROOT / "examples" / "conversations.jsonl"
    output = tmp_path / "answers.jsonl"
    assert main(["converse", checkpoint, str(file), "--max-new-tokens", "4", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [turn["question"] for line in file.read_text().splitlines() for turn in json.loads(line)["turns"]]
    assert [row["question"] for row in rows] == asked
    assert all({"shine", "in_context", "only_question"} <= set(row) for row in rows)
    shown = capsys.readouterr().out
    assert shown.count("SHINE:") == shown.count("In-Context:") == len(asked)
    (tmp_path / "texts.jsonl").write_text('{"context": "Ada."}\n')
    assert main(["converse", checkpoint, str(tmp_path / "texts.jsonl")]) == 2
    assert 'holds no question; give each context its "turns"' in capsys.readouterr().err
