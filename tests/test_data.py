"""Worlds, texts in pieces and groups, samples of each stage, the stream of batches, and the readers of files."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from shine.config import SourceConfig, StageConfig, TaskTokens
from shine.data.batching import SampleStream, collate, pad_left
from shine.data.examples import Example, Turn
from shine.data.grouping import first_fit
from shine.data.samples import AnswerSamples, CutTally, PretrainSamples, Sample, answerable, build_samples, hide_end, split_text
from shine.data.sources import READERS, look_into, read_source
from shine.data.worlds import NAMES, RELATIONS, World, guess_rate

TOKENIZER = tiny_tokenizer()
SEPARATOR = 0
SHARED = Path(os.environ.get("SHINE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def stage(name: str = "pretrain", *, context: int = 100, conversation: int = 200) -> StageConfig:
    return StageConfig(name=name, context_length=context, conversation_length=conversation, learning_rate=1e-3, warmup_steps=0)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


# --- worlds ----------------------------------------------------------------------------------------------------------------

EXAMPLES = list(World(seed=5).examples(300))
VALUES = {relation.kind: relation.values for relation in RELATIONS}


def test_a_world_is_the_same_every_time_and_whatever_the_count() -> None:
    assert list(World(seed=5).examples(300)) == EXAMPLES
    assert list(World(seed=5).examples(40)) == EXAMPLES[:40]
    assert World(seed=5).example(299) == EXAMPLES[299]


def test_worlds_of_different_seeds_share_no_context() -> None:
    contexts = [{example.context for example in World(seed=seed).examples(300)} for seed in (5, 6, 50, 1000, 2000)]
    for one, other in itertools.combinations(contexts, 2):
        assert not one & other
    assert all(len(found) == 300 for found in contexts)


def test_lists_hold_nothing_twice_and_no_name_is_a_value() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for values in VALUES.values():
        assert len(set(values)) == len(values)
    lower = {value.lower() for values in VALUES.values() for value in values}
    assert not lower & {name.lower() for name in NAMES}


@pytest.mark.parametrize(("facts", "people"), [((4, 6), (2, 3)), ((1, 1), (1, 1)), ((2, 8), (1, 4)), ((1, 2), (4, 4))])
def test_each_fact_is_stated_once_and_asked_once(facts: tuple[int, int], people: tuple[int, int]) -> None:
    statements = {kind: next(r.statements for r in RELATIONS if r.kind == kind) for kind in VALUES}
    questions = {kind: next(r.questions for r in RELATIONS if r.kind == kind) for kind in VALUES}
    for example in World(facts=facts, people=people, seed=9).examples(60):
        found = set()
        sentences = set(re.findall(r"[^.]+\.", example.context.replace(". ", ".")))
        for turn in example.turns:
            (what,) = turn.answers
            assert what in VALUES[turn.kind]
            asked = [name for name in NAMES for text in questions[turn.kind] if text.format(who=name) == turn.question]
            assert len(asked) == 1, turn.question
            article = f"{'an' if what[0] in 'aeiouAEIOU' else 'a'} {what}"
            told = {text.format(who=asked[0], what=what, a_what=article) for text in statements[turn.kind]} & sentences
            assert len(told) == 1, (turn, example.context)
            found |= told
        # Nothing told that is not asked, nothing asked twice.
        assert found == sentences
        assert len(found) == len(example.turns) == len({turn.question for turn in example.turns})
        mentioned = [name for name in NAMES if name.lower() in words_of(example.context)]
        assert people[0] <= len(mentioned) <= people[1]
        assert min(facts) <= len(example.turns) <= max(*facts, len(mentioned))


@pytest.mark.parametrize(
    ("facts", "people"),
    [
        ((2, len(RELATIONS) + 1), (1, 4)),  # one person has as many facts as there are kinds, not one more
        ((6, 4), (2, 3)),
        ((4, 6), (3, 2)),
        ((4, 6), (0, 2)),
        ((200, 200), (len(NAMES) + 1, len(NAMES) + 1)),
    ],
)
def test_a_world_that_cannot_be_drawn_is_refused_before_the_first_context(facts: tuple[int, int], people: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"facts|people"):
        World(facts=facts, people=people)


def test_a_world_of_few_kinds_lets_people_share_them() -> None:
    for example in World(facts=(3, 3), people=(3, 4), kinds=(1, 2), seed=3).examples(60):
        assert len({turn.kind for turn in example.turns}) <= 2
        assert 3 <= len(example.turns) <= 4
    with pytest.raises(ValueError, match=r"facts=\[2, 5\].*2 people have at most 4 facts of 2 kinds"):
        World(facts=(2, 5), people=(2, 3), kinds=(2, 2))
    with pytest.raises(ValueError, match=r"kinds=\[0, 1\]"):
        World(kinds=(0, 1))


def test_no_answer_can_be_read_from_its_question_or_an_earlier_turn() -> None:
    for example in EXAMPLES:
        seen: set[str] = set()
        for turn in example.turns:
            seen |= words_of(turn.question)
            assert not words_of(turn.answer) & seen


@pytest.mark.parametrize("kind", sorted(VALUES))
def test_the_best_constant_answer_is_right_as_often_as_said(kind: str) -> None:
    counts = Counter(turn.answer for example in World(seed=77).examples(2500) for turn in example.turns if turn.kind == kind)
    total = sum(counts.values())
    best = 100 * counts.most_common(1)[0][1] / total
    assert total > 1000
    # The luckiest value of some 24 lies up to about three standard deviations above the mean.
    rate = guess_rate(kind)
    assert rate - 0.5 < best < rate + 4 * 100 * ((rate / 100) * (1 - rate / 100) / total) ** 0.5
    assert rate <= 20
    assert set(counts) == set(VALUES[kind])


def test_kinds_people_and_counts_vary() -> None:
    assert {turn.kind for example in EXAMPLES for turn in example.turns} == set(VALUES)
    assert {len(example.turns) for example in EXAMPLES} == {4, 5, 6}
    assert len({example.id for example in EXAMPLES}) == len(EXAMPLES)


# --- texts -----------------------------------------------------------------------------------------------------------------

texts = st.text(alphabet=st.sampled_from("abcdefgh é\n \t"), max_size=120)


@given(text=texts, budget=st.integers(4, 40))
def test_pieces_fit_the_budget_and_lose_nothing_but_white_space(text: str, budget: int) -> None:
    pieces = split_text(TOKENIZER, text, budget=budget)
    for piece, length in pieces:
        assert piece
        assert length == len(piece.encode())  # one token a byte
        assert length <= budget
    assert "".join("".join(piece for piece, _ in pieces).split()) == "".join(text.split())


def test_a_text_that_fits_stays_as_it_is() -> None:
    assert split_text(TOKENIZER, "ab cd", budget=5) == [("ab cd", 5)]
    assert split_text(TOKENIZER, "", budget=5) == []


@given(words=st.lists(st.text("abc", min_size=1, max_size=8), max_size=20), mark=st.sampled_from(" \n"), budget=st.integers(8, 20))
def test_a_word_that_fits_is_never_broken(words: list[str], mark: str, budget: int) -> None:
    pieces = split_text(TOKENIZER, mark.join(words), budget=budget)
    assert [word for piece, _ in pieces for word in piece.split()] == words


def test_a_word_longer_than_the_budget_is_broken_where_it_must_be() -> None:
    assert [piece for piece, _ in split_text(TOKENIZER, "abcdefghijklm", budget=8)] == ["abcdefgh", "ijklm"]


def test_a_very_long_text_can_be_split() -> None:
    # More pieces than Python allows calls within calls.
    assert split_text(TOKENIZER, " ".join(["ab"] * 1200), budget=2) == [("ab", 2)] * 1200


@given(count=st.integers(1, 60), share=st.floats(0.1, 0.3))
def test_hiding_the_end_takes_that_share_of_the_words_and_never_the_first(count: int, share: float) -> None:
    words = [f"w{n}" for n in range(count)]
    text = "  " + " \n".join(words) + " "
    left = hide_end(text, share)
    kept = len(left.split())
    assert left.split() == words[:kept]
    assert kept >= 1
    assert abs((count - kept) - share * count) <= 0.5 or kept == 1
    assert text.startswith(left)
    assert left == left.rstrip()


@pytest.mark.parametrize("text", ["", " \n "])
def test_hiding_the_end_of_nothing_is_nothing(text: str) -> None:
    assert hide_end(text, 0.3) == text


# --- grouping --------------------------------------------------------------------------------------------------------------

costs = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 20)), max_size=60)


@given(costs=costs, open_groups=st.integers(1, 6))
def test_first_fit_is_a_partition_within_both_budgets(costs: list[tuple[int, int]], open_groups: int) -> None:
    groups = first_fit(costs, limits=(10, 20), open_groups=open_groups)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(costs)))
    for group in groups:
        assert group == sorted(group)
        assert sum(costs[item][0] for item in group) <= 10
        assert sum(costs[item][1] for item in group) <= 20
    assert groups == first_fit(list(costs), limits=(10, 20), open_groups=open_groups)


@given(costs=costs)
def test_with_all_groups_open_each_item_goes_to_the_first_that_has_room(costs: list[tuple[int, int]]) -> None:
    wanted: list[list[int]] = []
    for item, cost in enumerate(costs):
        for group in wanted:
            if all(sum(costs[other][axis] for other in group) + cost[axis] <= (10, 20)[axis] for axis in (0, 1)):
                group.append(item)
                break
        else:
            wanted.append([item])
    assert first_fit(costs, limits=(10, 20), open_groups=1000) == wanted


def test_the_fullest_group_is_closed_when_one_more_is_needed() -> None:
    # 6 and 7 are open; 5 closes the 7, so that 4 joins the 6 and 3 would have joined the 7.
    assert first_fit([(6, 0), (7, 0), (5, 0), (4, 0), (3, 0)], limits=(10, 9), open_groups=2) == [[1], [0, 3], [2, 4]]


# --- pretraining samples ---------------------------------------------------------------------------------------------------

RECON, COMP = "<RECON>", "<COMP>"
SENTENCES = [f"t{n} " + " ".join(f"w{k}" for k in range(5 + n % 4)) for n in range(40)]


def pretrain(texts: Sequence[str] = SENTENCES, *, seed: int = 1, tokenizer: Any = TOKENIZER, **options: Any) -> PretrainSamples:
    lengths = {key: options.pop(key) for key in ("context", "conversation") if key in options}
    examples = [Example(str(n), text) for n, text in enumerate(texts)]
    return PretrainSamples(examples, tokenizer, stage(**lengths), task_tokens=TaskTokens(), seed=seed, **options)


def all_samples(samples: PretrainSamples, *, epoch: int = 0) -> list[Sample]:
    found = [samples.sample(index, epoch=epoch) for index in range(len(samples))]
    return [sample for sample in found if sample is not None]


def contexts_of(sample: Sample) -> list[str]:
    """The contexts between the separators."""
    parts: list[list[int]] = [[]]
    for token in sample.context_ids:
        if token == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(token)
    return [TOKENIZER.decode(part) for part in parts]


def turns_of(sample: Sample) -> list[tuple[str, str]]:
    """(task, answer) of each turn; fails if the conversation is anything but turns."""
    text = TOKENIZER.decode(sample.input_ids)
    pattern = r"<\|im_start\|>user\n(<RECON>|<COMP>)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)<\|im_end\|>\n"
    found = re.findall(pattern, text, flags=re.DOTALL)
    assert "".join(f"<|im_start|>user\n{t}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for t, a in found) == text
    return found


def test_every_text_is_in_exactly_one_group_once() -> None:
    for epoch in (0, 3):
        answers = [answer for sample in all_samples(pretrain(), epoch=epoch) for _, answer in turns_of(sample)]
        assert sorted(answers) == sorted(SENTENCES)


def test_labels_are_the_whole_texts_in_both_tasks() -> None:
    for sample in all_samples(pretrain()):
        turns = turns_of(sample)
        assert all(label in (-100, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
        learned = TOKENIZER.decode([label for label in sample.labels if label != -100])
        assert learned == "".join(f"{answer}<|im_end|>\n" for _, answer in turns)


def test_contexts_are_whole_for_a_reconstruction_and_lack_their_end_for_a_completion() -> None:
    tasks = Counter()
    for sample in all_samples(pretrain()):
        contexts = contexts_of(sample)
        turns = turns_of(sample)
        assert len(contexts) == len(turns)
        for task, text in turns:
            tasks[task] += 1
            (seen,) = [context for context in contexts if context.split()[0] == text.split()[0]]
            if task == RECON:
                assert seen == text
            else:
                words = text.split()
                assert text.startswith(seen + " ")
                hidden = len(words) - len(seen.split())
                assert 0.1 * len(words) - 0.5 <= hidden <= 0.3 * len(words) + 0.5
                assert hidden >= 1
    # Half and half: a fair coin leaves this range once in 10,000 times.
    assert 8 <= tasks[RECON] <= 32
    assert tasks[RECON] + tasks[COMP] == 40


@pytest.mark.parametrize(("task", "token"), [("reconstruct", RECON), ("complete", COMP)])
def test_tasks_can_be_restricted(task: str, token: str) -> None:
    assert {t for sample in all_samples(pretrain(tasks=(task,))) for t, _ in turns_of(sample)} == {token}


def test_the_hidden_share_spreads_from_ten_to_thirty_percent() -> None:
    text = " ".join(f"w{n}" for n in range(100))
    samples = pretrain([text], tasks=("complete",), context=500, conversation=600)
    hidden = [100 - len(contexts_of(samples.sample(0, epoch=epoch))[0].split()) for epoch in range(150)]
    assert min(hidden) in range(10, 13)
    assert max(hidden) in range(28, 31)
    assert 18 <= sum(hidden) / len(hidden) <= 22


def test_order_of_contexts_and_order_of_turns_are_independent() -> None:
    samples = pretrain(["a b c d e", "x y z u v"])
    assert len(samples) == 1
    seen: Counter[tuple[bool, bool]] = Counter()
    for epoch in range(400):
        sample = samples.sample(0, epoch=epoch)
        seen[contexts_of(sample)[0].startswith("a"), turns_of(sample)[0][1].startswith("a")] += 1
    # Four equally likely cases: 100 each, standard deviation below nine.
    assert all(65 <= seen[case] <= 135 for case in itertools.product((True, False), repeat=2)), seen


def test_a_sample_is_fixed_by_seed_epoch_and_index() -> None:
    samples = pretrain()
    forward = all_samples(samples, epoch=2)
    again = pretrain()
    backward = [again.sample(index, epoch=2) for index in reversed(range(len(again)))]
    assert forward == backward[::-1]
    assert all_samples(samples, epoch=3) != forward
    assert all_samples(pretrain(seed=2), epoch=2) != forward


@given(
    texts=st.lists(st.text(alphabet=st.sampled_from("abcdefghé \n"), min_size=1, max_size=150), min_size=1, max_size=12),
    context=st.integers(20, 60),
    conversation=st.integers(60, 130),
)
def test_no_sample_exceeds_a_budget_and_no_word_is_lost(texts: list[str], context: int, conversation: int) -> None:
    samples = pretrain(texts, context=context, conversation=conversation)
    found = []
    for sample in all_samples(samples):
        assert len(sample.context_ids) <= context
        assert len(sample.input_ids) <= conversation
        assert sample.label_count > 0
        assert (sample.context_dropped, sample.conversation_dropped) == (0, 0)
        found += [answer for _, answer in turns_of(sample)]
    assert Counter("".join("".join(found).split())) == Counter("".join("".join(texts).split()))


def test_long_texts_that_were_split_are_counted() -> None:
    samples = pretrain(["ab " * 300, "ab", "cd " * 200], context=50, conversation=100)
    assert samples.tally.texts_split == 2
    assert "2 long texts split into pieces that fit" in str(samples.tally)
    assert "split" not in str(pretrain(["ab"], context=50, conversation=100).tally)


def test_groups_are_filled() -> None:
    # 20 texts of 9 tokens: 10 with their separator, so ten to a context of 100; the conversation has room for all.
    samples = pretrain(["ab cd efg"] * 20, context=100, conversation=2000)
    assert [len(group) for group in samples.groups] == [10, 10]


def test_blank_texts_are_left_out_and_counted() -> None:
    samples = pretrain(["", " \n", "a b c"])
    assert [answer for sample in all_samples(samples) for _, answer in turns_of(sample)] == ["a b c"]
    assert samples.tally.skipped == {"empty context": 2}


def test_lengths_without_room_for_a_text_are_an_error() -> None:
    # The turn around a text, its two headers, end tokens and newlines: <|im_start|>user\n<RECON><|im_end|>\n and so on.
    around = 1 + len("user\n") + 1 + 1 + len("\n") + 1 + len("assistant\n") + 1 + len("\n")
    with pytest.raises(ValueError, match=rf"conversation_length={around + 7} .*no room.*at least 9 and {around + 8}"):
        pretrain(context=100, conversation=around + 7)
    assert len(pretrain(["a"], context=100, conversation=around + 8)) == 1
    # Eight tokens of a text and its separator.
    with pytest.raises(ValueError, match=r"context_length=8 .*no room.*at least 9"):
        pretrain(context=8, conversation=200)
    assert len(pretrain(["a"], context=9, conversation=200)) == 1


# --- answer samples --------------------------------------------------------------------------------------------------------


def example(name: str, context: str, *turns: tuple[str, str]) -> Example:
    return Example(name, context, tuple(Turn(question, (answer, "another")) for question, answer in turns))


TWO = example("two", "Abro lives in Arlow.", ("Who?", "Abro"), ("Where?", "Arlow"))
ONE = example("one", "Ivar plays the lute.", ("What?", "lute"))


def conversation_text(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in turns)


def test_mqa_is_one_conversation_a_context() -> None:
    samples = AnswerSamples([TWO, ONE], TOKENIZER, stage("mqa"))
    assert len(samples) == 2
    sample = samples.sample(0, epoch=0)
    assert sample.id == "two"
    assert TOKENIZER.decode(sample.context_ids) == TWO.context
    assert TOKENIZER.decode(sample.input_ids) == conversation_text(("Who?", "Abro"), ("Where?", "Arlow"))
    assert TOKENIZER.decode([label for label in sample.labels if label != -100]) == "Abro<|im_end|>\nArlow<|im_end|>\n"


def test_1qa_is_one_question_a_sample_each_with_the_context() -> None:
    samples = AnswerSamples([TWO, ONE], TOKENIZER, stage("1qa"))
    found = [samples.sample(index, epoch=0) for index in range(len(samples))]
    assert [TOKENIZER.decode(s.input_ids) for s in found] == [
        conversation_text(turn) for turn in (("Who?", "Abro"), ("Where?", "Arlow"), ("What?", "lute"))
    ]
    assert [TOKENIZER.decode(s.context_ids) for s in found] == [TWO.context, TWO.context, ONE.context]
    assert len({s.id for s in found}) == 3


@pytest.mark.parametrize("name", ["mqa", "1qa"])
def test_the_context_is_not_in_the_conversation(name: str) -> None:
    samples = AnswerSamples([TWO, ONE], TOKENIZER, stage(name))
    for index in range(len(samples)):
        assert "lives" not in TOKENIZER.decode(samples.sample(index, epoch=0).input_ids)


def test_cut_contexts_and_conversations_are_counted() -> None:
    # Contexts are 20 tokens each; conversations 61 and 34 tokens.
    turns = conversation_text(("Who?", "Abro"), ("Where?", "Arlow")), conversation_text(("What?", "lute"))
    lengths = [len(re.sub(r"<\|\w+\|>", "#", text)) for text in turns]
    samples = AnswerSamples([TWO, ONE], TOKENIZER, stage("mqa", context=15, conversation=lengths[0] - 4))
    cut, whole = (samples.sample(index, epoch=0) for index in (0, 1))
    assert TOKENIZER.decode(cut.context_ids) == TWO.context[:15]
    assert (cut.context_dropped, cut.conversation_dropped) == (5, 4)
    assert len(cut.input_ids) == len(cut.labels) == lengths[0] - 4
    assert (whole.context_dropped, whole.conversation_dropped) == (5, 0)
    assert samples.tally == CutTally(
        samples=2, contexts_cut=2, context_tokens_dropped=10, conversations_cut=1, conversation_tokens_dropped=4
    )
    assert str(samples.tally) == "2 samples: 2 contexts cut (10 tokens), 1 conversations cut (4 tokens)"


def test_a_conversation_without_a_label_left_is_skipped_and_counted() -> None:
    long = example("long", "x", ("q" * 300, "a"))
    samples = AnswerSamples([long, ONE], TOKENIZER, stage("1qa", conversation=100))
    assert samples.sample(0, epoch=0) is None
    assert samples.sample(1, epoch=0) is not None
    assert samples.tally.skipped == {"no label left after truncation, raise stage.conversation_length": 1}
    assert samples.tally.samples == 1
    assert "1 skipped: no label left after truncation" in str(samples.tally)


@pytest.mark.parametrize("name", ["mqa", "1qa"])
def test_an_empty_context_and_one_without_questions_are_skipped_and_counted(name: str) -> None:
    examples = [example("a", " \n", ("q", "a"), ("r", "b")), Example("b", "text", ()), ONE]
    samples = AnswerSamples(examples, TOKENIZER, stage(name))
    assert [samples.sample(i, epoch=0).id.split("/")[0] for i in range(len(samples))] == ["one"]
    assert samples.tally.skipped == {"empty context": 1, "no question": 1}


@pytest.mark.parametrize("name", ["pretrain", "mqa", "1qa"])
def test_a_stage_without_any_sample_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"no sample for stage {name}"):
        build_samples([], TOKENIZER, stage(name), task_tokens=TaskTokens(), seed=0)


@pytest.mark.parametrize(("name", "count"), [("pretrain", 1), ("mqa", 2), ("1qa", 3)])
def test_each_stage_gets_its_kind_of_samples(name: str, count: int) -> None:
    assert len(build_samples([TWO, ONE], TOKENIZER, stage(name), task_tokens=TaskTokens(), seed=0)) == count


# --- the stream ------------------------------------------------------------------------------------------------------------


def named(count: int, *, unusable: Sequence[int] = ()) -> AnswerSamples:
    """Samples "0", "1", …; the unusable ones have a question longer than the conversation may be."""
    examples = [example(str(n), "c", ("q" * (300 if n in unusable else 1), "a")) for n in range(count)]
    return AnswerSamples(examples, TOKENIZER, stage("mqa", conversation=100))


def ids_of(batches: list[list[Sample]]) -> list[str]:
    return [sample.id for batch in batches for sample in batch]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_each_epoch_is_a_permutation_of_its_own(batch_size: int) -> None:
    stream = SampleStream(named(7), batch_size=batch_size, seed=3)
    batches = [next(stream) for _ in range(-(-21 // batch_size))]
    assert all(len(batch) == batch_size for batch in batches)
    epochs = [ids_of(batches)[start : start + 7] for start in (0, 7, 14)]
    for epoch in epochs:
        assert sorted(epoch) == [str(n) for n in range(7)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed_alone() -> None:
    orders = {seed: ids_of([next(SampleStream(named(30), batch_size=30, seed=seed))]) for seed in (3, 4)}
    assert orders[3] != orders[4]
    # Not on the size of the batches.
    stream = SampleStream(named(30), batch_size=5, seed=3)
    assert ids_of([next(stream) for _ in range(6)]) == orders[3]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_a_stream_continues_exactly_from_its_state(steps: int) -> None:
    make = {
        "answers": lambda: named(7, unusable=[2]),
        # Its samples change with the epoch.
        "pretrain": lambda: pretrain(SENTENCES[:12], context=60, conversation=150),
    }
    for samples in make.values():
        stream = SampleStream(samples(), batch_size=3, seed=11)
        for _ in range(steps):
            next(stream)
        later = SampleStream(samples(), batch_size=3, seed=11, epoch=stream.epoch, offset=stream.offset)
        assert [next(later) for _ in range(6)] == [next(stream) for _ in range(6)]
        assert (later.epoch, later.offset) == (stream.epoch, stream.offset)


def test_a_streams_state_can_be_set_on_a_stream_that_has_already_run() -> None:
    stream, other = (SampleStream(named(7), batch_size=2, seed=11) for _ in "ab")
    for _ in range(5):
        next(stream)
    next(other)
    other.epoch, other.offset = stream.epoch, stream.offset
    assert next(other) == next(stream)


def test_unusable_samples_are_replaced_by_those_that_follow() -> None:
    stream = SampleStream(named(6, unusable=[1, 4]), batch_size=4, seed=0)
    batches = [next(stream) for _ in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    found = ids_of(batches)
    for start in (0, 4, 8):
        assert sorted(found[start : start + 4]) == ["0", "2", "3", "5"]


def test_when_no_sample_is_usable_the_stream_ends_with_an_error() -> None:
    stream = SampleStream(named(4, unusable=range(4)), batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"no sample is usable: .*no label left.*conversation_length"):
        next(stream)


# --- batches ---------------------------------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4], [5, 6]], value=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 6]]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert ids.dtype == mask.dtype == torch.int64


def test_equal_rows_need_no_mask() -> None:
    ids, mask = pad_left([[1, 2], [3, 9]], value=9)
    assert ids.tolist() == [[1, 2], [3, 9]]
    assert mask is None


def test_a_batch_knows_where_its_labels_are() -> None:
    samples = [
        Sample("a", [11, 12], [1, 2, 3, 4], [-100, -100, 3, 4]),
        Sample("b", [13, 14], [5, 6], [-100, 6]),
    ]
    batch = collate(samples, pad_id=0)
    assert batch.ids == ("a", "b")
    assert batch.context_ids.tolist() == [[11, 12], [13, 14]]
    assert batch.context_mask is None
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]
    assert batch.input_mask is not None
    assert batch.input_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.label_positions.tolist() == [2, 3, 7]
    assert batch.label_ids.tolist() == [3, 4, 6]
    assert batch.tokens == 4 + 6
    assert batch.input_ids.flatten()[batch.label_positions].tolist() == batch.label_ids.tolist()
    assert batch.to(torch.device("cpu")).input_ids.tolist() == batch.input_ids.tolist()


def test_a_pad_token_in_the_text_is_not_taken_for_padding() -> None:
    batch = collate([Sample("a", [0, 5], [0, 0, 1], [-100, 0, 1]), Sample("b", [0], [1, 2, 3], [-100, 2, 3])], pad_id=0)
    assert batch.context_mask is not None
    assert batch.context_mask.tolist() == [[1, 1], [0, 1]]
    assert batch.input_mask is None
    assert batch.label_ids.tolist() == [0, 1, 2, 3]


# --- sources: our own small files ------------------------------------------------------------------------------------------


def parquet(folder: Path, split: str, **columns: list[Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def squad_folder(folder: Path, **changes: list[Any]) -> str:
    columns = {
        "id": ["q1", "q2", "q3"],
        "title": ["t", "t", "t"],
        "context": ["first", "first", "second"],
        "question": [" Who? ", "Where?", "When?"],
        "answers": [
            {"text": ["Abro", "abro", "Abro"], "answer_start": [0, 0, 0]},
            {"text": ["Arlow"], "answer_start": [3]},
            {"text": ["May"], "answer_start": [1]},
        ],
    }
    return parquet(folder, "validation", **{**columns, **changes})


def read(kind: str, path: str | Path | None, split: str = "validation", **more: Any) -> list[Example]:
    return list(read_source(SourceConfig(kind=kind, path=None if path is None else str(path), split=split, **more)))


def test_squad_gathers_the_questions_of_a_passage(tmp_path: Path) -> None:
    assert read("squad", squad_folder(tmp_path / "squad")) == [
        Example("q1", "first", (Turn("Who?", ("Abro", "abro")), Turn("Where?", ("Arlow",)))),
        Example("q3", "second", (Turn("When?", ("May",)),)),
    ]


def test_a_limit_takes_the_first_contexts(tmp_path: Path) -> None:
    folder = squad_folder(tmp_path)
    assert [e.context for e in read("squad", folder, limit=1)] == ["first"]
    assert len(read("squad", folder, limit=100)) == 2


def test_a_question_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    # SQuAD 2.0 has the same columns, and questions that have no answer.
    nothing = {"text": [], "answer_start": []}
    folder = squad_folder(tmp_path, answers=[nothing, {"text": ["Arlow"], "answer_start": [3]}, nothing])
    tally = CutTally()
    usable = list(answerable(read("squad", folder), tally))
    assert usable == [Example("q1", "first", (Turn("Where?", ("Arlow",)),))]
    assert str(tally).endswith(", 2 skipped: question without an answer (first q1)")


def test_what_is_wrong_with_a_source_is_said_without_reading_it_all(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"context": "one"}\nnot json\n')
    good = {"worlds": SourceConfig("worlds", options={"count": 10**9, "seed": 1}), "mine": SourceConfig("jsonl", str(file))}
    look_into(good, "data.train")
    with pytest.raises(ValueError, match=r"data.test.gone: .*none.jsonl"):
        look_into({**good, "gone": SourceConfig("jsonl", str(tmp_path / "none.jsonl"))}, "data.test")


RACE: dict[str, list[Any]] = {
    "example_id": ["high1.txt", "high1.txt", "high2.txt"],
    "article": ["first", "first", "second"],
    "answer": ["B", "D", "A"],
    "question": ["Who is it?", "It is _ .", "The end _ ."],
    "options": [["a", " b ", "c", "d"], ["e", "f", "g", "h"], ["i", "j", "k", "l"]],
}


def test_race_answers_with_the_text_of_the_right_option(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "race", "validation", **RACE)
    examples = read("race", folder)
    assert [(e.context, [(t.question, t.answers) for t in e.turns]) for e in examples] == [
        ("first", [("Who is it?", ("b",)), ("It is _ .", ("h",))]),
        ("second", [("The end _ .", ("i",))]),
    ]
    assert len({e.id for e in examples}) == 2


def test_race_can_leave_out_cloze_questions_and_articles_that_have_no_other(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "race", "validation", **RACE)
    examples = read("race", folder, options={"cloze": False})
    assert [(e.context, [t.question for t in e.turns]) for e in examples] == [("first", ["Who is it?"])]


@pytest.mark.parametrize("letter", ["E", "", "b"])
def test_a_race_answer_that_is_no_option_names_the_folder(tmp_path: Path, letter: str) -> None:
    folder = parquet(tmp_path / "race", "validation", **{**RACE, "answer": ["B", letter, "A"]})
    with pytest.raises(ValueError, match=re.escape(folder)):
        read("race", folder)


def test_text_gives_a_row_each_and_leaves_empty_ones_to_be_counted(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "text", "train", text=[" one \n", "", "  ", None, "two"], source=["a"] * 5)
    assert [(e.context, e.turns) for e in read("text", folder, "train")] == [(text, ()) for text in ("one", "", "", "", "two")]


def test_text_reads_another_column_and_plain_text_files(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "text", "train", body=["x", "y"])
    assert [e.context for e in read("text", folder, "train", options={"column": "body"})] == ["x", "y"]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("one\n\ntwo\n")
    assert [e.context for e in read("text", tmp_path / "lines", "train")] == ["one", "", "two"]


def test_ids_of_a_source_are_unique(tmp_path: Path) -> None:
    examples = read("text", parquet(tmp_path / "text", "train", text=["x", "x", "x"]), "train")
    assert len({e.id for e in examples}) == 3


def test_worlds_are_a_source() -> None:
    options = {"count": 5, "seed": 7, "facts": [2, 3], "people": [1, 2], "kinds": [3, 4]}
    world = World(facts=(2, 3), people=(1, 2), kinds=(3, 4), seed=7)
    assert read("worlds", None, options=options) == list(world.examples(5))
    assert read("worlds", None, options=options, limit=2) == list(world.examples(2))


def test_jsonl_is_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [
        {"context": "é one", "turns": [{"question": "q", "answers": ["a", "b"], "kind": "k"}], "id": "mine"},
        {"context": "two", "turns": []},
        {"context": "three"},
    ]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    examples = read("jsonl", file)
    assert examples[0] == Example("mine", "é one", (Turn("q", ("a", "b"), "k"),))
    assert [(e.context, e.turns) for e in examples[1:]] == [("two", ()), ("three", ())]
    assert len({e.id for e in examples}) == 3


@pytest.mark.parametrize(
    ("line", "about"),
    [
        ('{"context": "x"', "JSON"),
        ("context", "JSON"),
        ("[]", "context"),
        ("{}", "context"),
        ('{"context": " "}', "context"),
        ('{"context": 3}', "context"),
        ('{"context": "x", "turns": ["q"]}', "question"),
        ('{"context": "x", "turns": [{"answers": ["a"]}]}', "question"),
        ('{"context": "x", "turns": [{"question": 1, "answers": ["a"]}]}', "question"),
        ('{"context": "x", "turns": [{"question": " ", "answers": ["a"]}]}', "question"),
        ('{"context": "x", "turns": [{"question": "q"}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": "a"}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": []}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": [""]}]}', "answers"),
        ('{"context": "x", "turns": [{"question": "q", "answers": ["a", 2]}]}', "answers"),
        ('{"context": "x", "turns": {"question": "q", "answers": ["a"]}}', "turns?"),
        ('{"context": "x", "turns": null}', "turns?"),
        ('{"context": "x", "turns": 5}', "turns?"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, about: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"context": "fine"}\n\n' + line + '\n{"context": "never reached"}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}:3: .*{about}"):
        read("jsonl", file)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes('{"context": "café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read("jsonl", file)


@pytest.mark.parametrize("kind", ["squad", "race", "text", "jsonl"])
def test_a_missing_folder_or_file_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "absent")) + ": no such"):
        read(kind, tmp_path / "absent")
    with pytest.raises(ValueError, match=f"'{kind}' needs a path"):
        read(kind, None)


@pytest.mark.parametrize(("kind", "column"), [("squad", "context"), ("race", "article"), ("text", "text")])
def test_a_folder_with_other_columns_says_which_are_missing(tmp_path: Path, kind: str, column: str) -> None:
    folder = parquet(tmp_path, "validation", something=["x"], id=["1"])
    with pytest.raises(ValueError, match=rf"{re.escape(folder)}: no column .*{column}.*something") as error:
        read(kind, folder)
    assert kind in str(error.value)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}: .*'nosuch'"):
        read("squad", squad_folder(tmp_path), "nosuch")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read("text", tmp_path)


def test_an_unknown_kind_gets_the_list_of_kinds() -> None:
    with pytest.raises(ValueError, match="unknown data source 'sqaud'") as error:
        read("sqaud", "x")
    assert all(kind in str(error.value) for kind in READERS)


@pytest.mark.parametrize(
    ("kind", "options"), [("squad", {"cloze": True}), ("race", {"clozed": True}), ("worlds", {"count": 1, "seeds": 2})]
)
def test_an_unknown_option_is_named(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"'{kind}'.*{list(options)[-1]}"):
        read(kind, tmp_path, options=options)


# --- sources: real data, where it is ---------------------------------------------------------------------------------------


def shared(folder: str) -> Path:
    path = SHARED / folder
    if not path.exists():
        pytest.skip(f"no {path}: the development data is not part of the repository")
    return path


def table(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}-00000-of-00001.parquet").to_pylist()


def test_squad_validation_is_read_completely() -> None:
    folder = shared("squad/plain_text")
    examples = read("squad", folder)
    found = Counter((e.context, t.question, t.answers) for e in examples for t in e.turns)
    # The first gold answer first, each only once.
    wanted = Counter(
        (row["context"], row["question"].strip(), tuple(sorted(set(gold), key=gold.index)))
        for row in table(folder, "validation")
        for gold in [row["answers"]["text"]]
    )
    assert found == wanted
    assert sum(found.values()) == 1901
    assert len(examples) == len({e.context for e in examples})
    assert all(answer in e.context for e in examples for t in e.turns for answer in t.answers)


def test_race_validation_is_read_completely() -> None:
    folder = shared("race/all")
    rows = table(folder, "validation")
    examples = read("race", folder)
    found = Counter((e.context, t.question, t.answers) for e in examples for t in e.turns)
    wanted = Counter(
        (row["article"], row["question"].strip(), (row["options"]["ABCD".index(row["answer"])].strip(),)) for row in rows
    )
    assert found == wanted
    assert sum(found.values()) == len(rows) == 4887
    assert len({e.id for e in examples}) == len(examples)
    plain = read("race", folder, options={"cloze": False}, limit=50)
    assert not any("_" in t.question for e in plain for t in e.turns)


def test_pretraining_text_is_read_row_by_row() -> None:
    folder = shared("pretrain_text")
    rows = [row["text"].strip() for row in table(folder, "validation") if row["text"].strip()]
    assert [e.context for e in read("text", folder)] == rows


def test_pretraining_samples_of_real_text_fit_their_budgets() -> None:
    samples = PretrainSamples(
        read("text", shared("pretrain_text"), limit=4),
        TOKENIZER,
        stage(context=300, conversation=400),
        task_tokens=TaskTokens(),
        seed=0,
    )
    for index in range(0, len(samples), max(len(samples) // 40, 1)):
        sample = samples.sample(index, epoch=0)
        assert len(sample.context_ids) <= 300
        assert len(sample.input_ids) <= 400
