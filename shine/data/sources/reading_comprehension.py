"""Public reading comprehension sets in their hub layouts, beside those of `shine.data.sources.questions`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shine.data.examples import Example, Turn
from shine.data.sources.files import Row, Source, label, parsed, spoken, texts

CANNOT_ANSWER = "CANNOTANSWER"
"""What QuAC has in place of an answer, and at the end of each context."""


def read_quac(source: Source) -> Iterator[Example]:
    """``allenai/quac``: a section of an encyclopedia and a dialogue about it. What it leaves open comes without an answer."""
    return parsed(source, {"dialogue_id": str, "context": str, "questions": Sequence, "orig_answers": Mapping}, _quac_row)


def _quac_row(row: Row, place: str) -> Example:
    answers = texts(row["orig_answers"].get("texts"), "orig_answers", place)
    turns = _dialogue(texts(row["questions"], "questions", place), answers, place)
    context = row["context"].strip().removesuffix(CANNOT_ANSWER).strip()
    return Example(row["dialogue_id"], context, tuple(Turn(t.question, ()) if t.answer == CANNOT_ANSWER else t for t in turns))


def read_coqa(source: Source) -> Iterator[Example]:
    """``stanfordnlp/coqa``: a story and a dialogue about it, answered freely. The kind of a turn is the story's source."""
    return parsed(source, {"story": str, "questions": Sequence, "answers": Mapping}, _coqa_row, more=["source"])


def _coqa_row(row: Row, place: str) -> Example:
    answers = texts(row["answers"].get("input_text"), "answers", place)
    turns = _dialogue(texts(row["questions"], "questions", place), answers, place, kind=label(row, "source", place))
    return Example(place.rsplit("/", 1)[-1], row["story"], turns)


def _dialogue(questions: Sequence[str], answers: Sequence[str], place: str, *, kind: str = "") -> tuple[Turn, ...]:
    if len(questions) != len(answers):
        raise ValueError(f"{place}: {len(questions)} questions and {len(answers)} answers; mend the file")
    return tuple(Turn(question.strip(), (answer.strip(),), kind) for question, answer in zip(questions, answers, strict=True))


def read_drop(source: Source) -> Iterator[Example]:
    """``ucinlp/drop``: questions that count and compare. Several spans are one answer, a list; the kind is that of the first."""
    return _passages(parsed(source, {"query_id": str, "passage": str, "question": str, "answers_spans": Mapping}, _drop_row))


def _drop_row(row: Row, place: str) -> tuple[str, str, Turn]:
    spans = texts(row["answers_spans"].get("spans"), "answers_spans", place)
    given = row["answers_spans"].get("types")
    kinds = [] if given is None else texts(given, "types", place)
    # Annotators who agree repeat the span; a list has each of its members once.
    answers = (", ".join(dict.fromkeys(spans)),) if spans else ()
    return row["query_id"], row["passage"], Turn(spoken(row, "question", place), answers, kinds[0] if kinds else "")


def read_narrativeqa(source: Source) -> Iterator[Example]:
    """``deepmind/narrativeqa``: questions about a book or film, on its summary; the whole text is far longer than a context."""
    return _passages(parsed(source, {"document": Mapping, "question": Mapping, "answers": Sequence}, _narrativeqa_row))


def _narrativeqa_row(row: Row, place: str) -> tuple[str, str, Turn]:
    summary, question = row["document"].get("summary"), row["question"].get("text")
    context = summary.get("text") if isinstance(summary, Mapping) else None
    if not isinstance(context, str) or not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: needs a text in document.summary.text and in question.text; mend the file")
    given = [answer.get("text") if isinstance(answer, Mapping) else answer for answer in row["answers"]]
    answers = dict.fromkeys(answer.strip() for answer in texts(given, "answers", place))
    return label(row["document"], "id", place) or place, context.strip(), Turn(question.strip(), tuple(answers))


def read_quail(source: Source) -> Iterator[Example]:
    """``textmachinelab/quail``: the text of the right option, "not enough information" among them. The kind is its type."""
    columns = {"context_id": str, "context": str, "question": str, "answers": Sequence, "correct_answer_id": int}
    return _passages(parsed(source, columns, _quail_row, more=["question_type"]))


def _quail_row(row: Row, place: str) -> tuple[str, str, Turn]:
    options, right = texts(row["answers"], "answers", place), row["correct_answer_id"]
    if not 0 <= right < len(options):
        raise ValueError(f"{place}: correct_answer_id is {right}, there are {len(options)} answers; mend the file")
    turn = Turn(spoken(row, "question", place), (options[right].strip(),), label(row, "question_type", place))
    return row["context_id"], row["context"], turn


def read_pwc(source: Source) -> Iterator[Example]:
    """``sggetao/PwC``: texts with prompts about them of all sorts, and long answers."""
    return _passages(parsed(source, {"input": str, "prompt": str, "answer": str}, _pwc_row))


def _pwc_row(row: Row, place: str) -> tuple[str, str, Turn]:
    answers = texts([row["answer"]], "answer", place)
    return place.rsplit("/", 1)[-1], row["input"], Turn(spoken(row, "prompt", place), tuple(answers))


def read_newsqa(source: Source) -> Iterator[Example]:
    """``lucadiliello/newsqa``: NewsQA as the MRQA shared task has it: news stories, answered by spans."""
    return _passages(parsed(source, {"context": str, "question": str, "answers": Sequence, "key": str}, _newsqa_row))


def _newsqa_row(row: Row, place: str) -> tuple[str, str, Turn]:
    answers = dict.fromkeys(answer.strip() for answer in texts(row["answers"], "answers", place))
    return row["key"], row["context"], Turn(spoken(row, "question", place), tuple(answers))


def read_duorc(source: Source) -> Iterator[Example]:
    """``ibm-research/duorc``, folder ``SelfRC`` or ``ParaphraseRC``: plots of films. Some questions come without an answer."""
    columns = {"plot_id": str, "plot": str, "question": str, "answers": Sequence, "no_answer": bool}
    return _passages(parsed(source, columns, _duorc_row))


def _duorc_row(row: Row, place: str) -> tuple[str, str, Turn]:
    answers = [] if row["no_answer"] else texts(row["answers"], "answers", place)
    turn = Turn(spoken(row, "question", place), tuple(dict.fromkeys(answer.strip() for answer in answers)))
    return row["plot_id"], row["plot"], turn


def _passages(rows: Iterable[tuple[str, str, Turn]]) -> Iterator[Example]:
    """Rows of (id, context, turn) as examples: rows in a row with one context belong together.

    A passage that comes back later is another example with the id of its own first row, made unlike the first by its number.
    """
    for index, (context, group) in enumerate(itertools.groupby(rows, key=lambda row: row[1])):
        members = list(group)
        yield Example(f"{members[0][0]}#{index}", context, tuple(turn for _, _, turn in members))
