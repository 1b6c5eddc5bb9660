"""Texts in pieces and groups, and the samples of each stage."""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from shine.config import StageConfig, TaskTokens
from shine.data.batching import SampleStream
from shine.data.build import samples_of
from shine.data.examples import Example, Turn
from shine.data.grouping import first_fit
from shine.data.pieces import hide_end, split_text
from shine.data.samples import AnswerSamples, PretrainSamples, Sample
from shine.data.tally import Tally

TOKENIZER = tiny_tokenizer()
SEPARATOR = 0


def stage(name: str = "pretrain", *, context: int = 100, conversation: int = 200) -> StageConfig:
    return StageConfig(name=name, context_length=context, conversation_length=conversation, learning_rate=1e-3, warmup_steps=0)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


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


@given(count=st.integers(2, 60), share=st.floats(0.1, 0.3))
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


def test_hiding_the_end_of_a_single_word_takes_characters() -> None:
    assert hide_end("上下文成为适配器中的知识", 0.25) == "上下文成为适配器中"
    assert hide_end(" x ", 0.3) == " x"


@pytest.mark.parametrize("text", ["", " \n "])
def test_hiding_the_end_of_nothing_is_nothing(text: str) -> None:
    assert hide_end(text, 0.3) == text


costs = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 20)), max_size=60)


def fit(costs: Sequence[tuple[int, int]], *, limits: tuple[int, int], open_groups: int) -> list[list[int]]:
    found = first_fit(np.array(costs, dtype=np.int64).reshape(-1, 2), limits=limits, open_groups=open_groups)
    groups = [found[index] for index in range(len(found))]
    assert found.totals.tolist() == [sum(costs[item][0] for item in group) for group in groups]
    return groups


@given(costs=costs, open_groups=st.integers(1, 6))
def test_first_fit_is_a_partition_within_both_budgets(costs: list[tuple[int, int]], open_groups: int) -> None:
    groups = fit(costs, limits=(10, 20), open_groups=open_groups)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(costs)))
    for group in groups:
        assert group == sorted(group)
        assert sum(costs[item][0] for item in group) <= 10
        assert sum(costs[item][1] for item in group) <= 20
    assert groups == fit(list(costs), limits=(10, 20), open_groups=open_groups)


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
    assert fit(costs, limits=(10, 20), open_groups=1000) == wanted


def plainly(costs: Sequence[tuple[int, int]], *, limits: tuple[int, int], open_groups: int) -> list[list[int]]:
    """First fit as it is defined, a group a list: the oldest with room takes an item, the fullest makes way for one more."""
    closed: list[list[int]] = []
    held: list[tuple[list[int], list[int]]] = []
    for item, cost in enumerate(costs):
        fitting = next((group for group in held if group[1][0] >= cost[0] and group[1][1] >= cost[1]), None)
        if fitting is None:
            if len(held) == open_groups:
                fullest = min(held, key=lambda group: group[1])
                closed.append(fullest[0])
                held.remove(fullest)
            fitting = ([], list(limits))
            held.append(fitting)
        fitting[0].append(item)
        fitting[1][:] = [left - taken for left, taken in zip(fitting[1], cost, strict=True)]
    return closed + [members for members, _ in held]


@given(costs=costs, open_groups=st.integers(1, 6))
def test_first_fit_is_what_its_definition_says(costs: list[tuple[int, int]], open_groups: int) -> None:
    assert fit(costs, limits=(10, 20), open_groups=open_groups) == plainly(costs, limits=(10, 20), open_groups=open_groups)


@pytest.mark.slow
def test_a_million_texts_are_grouped_in_a_minute() -> None:
    """The published budget; texts as long as those of a web corpus (log-normal, 200 tokens in the middle). Its first groups, closed
    within the first 30,000 texts, against the definition; of all of them that they are a partition within the budgets."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.3, 0.9, 1_000_000).astype(np.int64) + 1, 1100)
    costs = np.stack([lengths + 1, lengths + 10], axis=1)
    started = time.process_time()
    found = first_fit(costs, limits=(1141, 1150))
    seconds = time.process_time() - started
    wanted = plainly([(int(a), int(b)) for a, b in costs[:30_000]], limits=(1141, 1150), open_groups=64)[:-64]
    assert len(wanted) > 5000
    assert [found[index] for index in range(len(wanted))] == wanted
    assert np.array_equal(np.sort(found.members), np.arange(len(costs)))
    for axis, limit in enumerate((1141, 1150)):
        totals = np.add.reduceat(costs[found.members, axis], np.concatenate([[0], found.ends[:-1]]))
        assert totals.max() <= limit
    assert found.totals.mean() > 0.93 * 1141
    assert seconds < 60


def test_the_fullest_group_is_closed_when_one_more_is_needed() -> None:
    # 6 and 7 are open; 5 closes the 7, so that 4 joins the 6 and 3 would have joined the 7.
    assert fit([(6, 0), (7, 0), (5, 0), (4, 0), (3, 0)], limits=(10, 9), open_groups=2) == [[1], [0, 3], [2, 4]]


RECON, COMP = "<RECON>", "<COMP>"
SENTENCES = [f"t{n} " + " ".join(f"w{k}" for k in range(5 + n % 4)) for n in range(40)]


def pretrain(texts: Sequence[str] = SENTENCES, *, seed: int = 1, tokenizer: Any = TOKENIZER, **options: Any) -> PretrainSamples:
    lengths = {key: options.pop(key) for key in ("context", "conversation") if key in options}
    examples = [Example(str(n), text) for n, text in enumerate(texts)]
    return PretrainSamples.build(examples, tokenizer, stage(**lengths), task_tokens=TaskTokens(), seed=seed, **options)


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
    assert [len(samples.groups[index]) for index in range(len(samples))] == [10, 10]


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


def example(name: str, context: str, *turns: tuple[str, str]) -> Example:
    return Example(name, context, tuple(Turn(question, (answer, "another")) for question, answer in turns))


TWO = example("two", "Abro lives in Arlow.", ("Who?", "Abro"), ("Where?", "Arlow"))
ONE = example("one", "Ivar plays the lute.", ("What?", "lute"))


def conversation_text(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in turns)


def test_mqa_is_one_conversation_a_context() -> None:
    samples = AnswerSamples.build([TWO, ONE], TOKENIZER, stage("mqa"))
    assert len(samples) == 2
    sample = samples.sample(0, epoch=0)
    assert sample.id == "two"
    assert TOKENIZER.decode(sample.context_ids) == TWO.context
    assert TOKENIZER.decode(sample.input_ids) == conversation_text(("Who?", "Abro"), ("Where?", "Arlow"))
    assert TOKENIZER.decode([label for label in sample.labels if label != -100]) == "Abro<|im_end|>\nArlow<|im_end|>\n"


def test_1qa_is_one_question_a_sample_each_with_the_context() -> None:
    samples = AnswerSamples.build([TWO, ONE], TOKENIZER, stage("1qa"))
    found = [samples.sample(index, epoch=0) for index in range(len(samples))]
    assert [TOKENIZER.decode(s.input_ids) for s in found] == [
        conversation_text(turn) for turn in (("Who?", "Abro"), ("Where?", "Arlow"), ("What?", "lute"))
    ]
    assert [TOKENIZER.decode(s.context_ids) for s in found] == [TWO.context, TWO.context, ONE.context]
    assert len({s.id for s in found}) == 3


@pytest.mark.parametrize("name", ["mqa", "1qa"])
def test_the_context_is_not_in_the_conversation(name: str) -> None:
    samples = AnswerSamples.build([TWO, ONE], TOKENIZER, stage(name))
    for index in range(len(samples)):
        assert "lives" not in TOKENIZER.decode(samples.sample(index, epoch=0).input_ids)


def test_cut_contexts_and_conversations_are_counted() -> None:
    # Contexts are 20 tokens each; conversations 61 and 34 tokens.
    turns = conversation_text(("Who?", "Abro"), ("Where?", "Arlow")), conversation_text(("What?", "lute"))
    lengths = [len(re.sub(r"<\|\w+\|>", "#", text)) for text in turns]
    samples = AnswerSamples.build([TWO, ONE], TOKENIZER, stage("mqa", context=15, conversation=lengths[0] - 4))
    cut, whole = (samples.sample(index, epoch=0) for index in (0, 1))
    assert TOKENIZER.decode(cut.context_ids) == TWO.context[:15]
    assert (cut.context_dropped, cut.conversation_dropped) == (5, 4)
    assert len(cut.input_ids) == len(cut.labels) == lengths[0] - 4
    assert (whole.context_dropped, whole.conversation_dropped) == (5, 0)
    # When they are drawn to be learned from, not when they are looked at.
    assert samples.tally == Tally()
    next(SampleStream(samples, batch_size=2, seed=0))
    assert samples.tally == Tally(
        samples=2, contexts_cut=2, context_tokens_dropped=10, conversations_cut=1, conversation_tokens_dropped=4
    )
    assert str(samples.tally) == "2 samples: 2 contexts cut (10 tokens), 1 conversations cut (4 tokens)"


def test_a_conversation_without_a_label_left_is_skipped_and_counted() -> None:
    long = example("long", "x", ("q" * 300, "a"))
    samples = AnswerSamples.build([long, ONE], TOKENIZER, stage("1qa", conversation=100))
    assert [samples.sample(index, epoch=0).id for index in range(len(samples))] == ["one/0"]
    assert samples.tally.skipped == {"no label left after truncation, raise stage.conversation_length": 1}
    assert "1 skipped: no label left after truncation" in str(samples.tally)


@pytest.mark.parametrize("name", ["mqa", "1qa"])
def test_an_empty_context_and_one_without_questions_are_skipped_and_counted(name: str) -> None:
    examples = [example("a", " \n", ("q", "a"), ("r", "b")), Example("b", "text", ()), ONE]
    samples = AnswerSamples.build(examples, TOKENIZER, stage(name))
    assert [samples.sample(i, epoch=0).id.split("/")[0] for i in range(len(samples))] == ["one"]
    assert samples.tally.skipped == {"empty context": 1, "no question": 1}


@pytest.mark.parametrize("name", ["pretrain", "mqa", "1qa"])
def test_a_stage_without_any_sample_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"no sample for stage {name}"):
        samples_of([], TOKENIZER, stage(name), task_tokens=TaskTokens(), seed=0)


@pytest.mark.parametrize(("name", "count"), [("pretrain", 1), ("mqa", 2), ("1qa", 3)])
def test_each_stage_gets_its_kind_of_samples(name: str, count: int) -> None:
    assert len(samples_of([TWO, ONE], TOKENIZER, stage(name), task_tokens=TaskTokens(), seed=0)) == count
