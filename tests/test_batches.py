"""The stream of batches, and how a batch is laid out."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_samples import SENTENCES, TOKENIZER, example, pretrain, stage

from shine.data.batching import SampleStream, collate, pad_left
from shine.data.samples import AnswerSamples, Sample, StageSamples
from shine.data.tally import Tally
from shine.lora import LoRA


def named(count: int, *, unusable: Sequence[int] = ()) -> AnswerSamples:
    """Samples "0", "1", …; the unusable ones have a question longer than the conversation may be."""
    examples = [example(str(n), "c", ("q" * (300 if n in unusable else 1), "a")) for n in range(count)]
    return AnswerSamples.build(examples, TOKENIZER, stage("mqa", conversation=100))


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


@pytest.mark.parametrize("kind", ["answers", "pretrain"])
def test_a_stream_that_draws_ahead_hands_out_the_same_batches_states_and_counts(kind: str) -> None:
    def make() -> StageSamples:
        if kind == "pretrain":
            return pretrain(SENTENCES[:12], context=60, conversation=150)
        examples = [example(str(n), "c" * (90 + 5 * n), ("q", "a" * 20)) for n in range(7)]
        return AnswerSamples.build(examples, TOKENIZER, stage("mqa", context=100, conversation=60))

    stream, ahead = SampleStream(make(), 3, seed=11, window=2), SampleStream(make(), 3, seed=11, window=2, ahead=True)
    states, counts = [], []
    for _ in range(9):
        assert next(stream) == next(ahead)
        assert (stream.epoch, stream.offset) == (ahead.epoch, ahead.offset)
        assert stream.samples.tally == ahead.samples.tally
        states.append((ahead.epoch, ahead.offset))
        counts.append(ahead.samples.tally.samples)
    assert counts == [3 * (n + 1) for n in range(9)]
    # Set back to any state, what was drawn ahead is not mistaken for what comes there.
    whole = SampleStream(make(), 3, seed=11, window=2)
    batches = [next(whole) for _ in range(9)]
    for step in (6, 2, 3, 0, 7):
        ahead.epoch, ahead.offset = states[step]
        assert next(ahead) == batches[step + 1]


class Watched:
    """Samples that tell of each of them that was made."""

    fingerprint = ""

    def __init__(self, *, broken: int | None = None) -> None:
        self.lengths, self.examples, self.tally, self.broken = np.full(64, 9), np.arange(64), Tally(), broken
        self.made: queue.Queue[tuple[int, str]] = queue.Queue()

    def __len__(self) -> int:
        return 64

    def sample(self, index: int, *, epoch: int) -> Sample:
        if self.made.qsize() == self.broken:
            raise ValueError("texts.arrow: damaged")
        self.made.put((index, threading.current_thread().name))
        return Sample(str(index), [1], [], [])


def test_the_next_batch_is_made_while_this_one_is_used() -> None:
    samples = Watched()
    stream = SampleStream(samples, 4, seed=0, ahead=True)
    first = next(stream)
    made = [samples.made.get(timeout=10) for _ in range(8)]
    assert [str(index) for index, _ in made[:4]] == [sample.id for sample in first]
    assert {thread for _, thread in made[4:]} == {"next-batch_0"}
    # One batch ahead, no more, and handed out next.
    with pytest.raises(queue.Empty):
        samples.made.get(timeout=0.2)
    assert [sample.id for sample in next(stream)] == [str(index) for index, _ in made[4:]]


def test_what_goes_wrong_while_the_next_batch_is_made_is_raised_where_it_is_asked_for() -> None:
    stream = SampleStream(Watched(broken=6), 4, seed=0, ahead=True)
    next(stream)
    with pytest.raises(ValueError, match="damaged"):
        next(stream)


def test_unusable_samples_are_left_out() -> None:
    stream = SampleStream(named(6, unusable=[1, 4]), batch_size=4, seed=0)
    batches = [next(stream) for _ in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 4]
    found = ids_of(batches)
    for start in (0, 4, 8):
        assert sorted(found[start : start + 4]) == ["0", "2", "3", "5"]


class Lengths:
    """Samples that are nothing but their lengths."""

    fingerprint = ""

    def __init__(self, lengths: Sequence[int], *, of_each: int = 1) -> None:
        self.lengths, self.examples = np.array(lengths), np.arange(len(lengths)) // of_each
        self.tally = Tally()

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int, *, epoch: int) -> Sample:
        return Sample(str(index), [0] * int(self.lengths[index]), [], [])


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    batch_size=st.integers(1, 7),
    window=st.integers(0, 4),
    steps=st.integers(0, 12),
    together=st.integers(1, 4),
)
def test_batches_by_length_are_still_permutations_and_continue_exactly(
    lengths: list[int], batch_size: int, window: int, steps: int, together: int
) -> None:
    samples = Lengths(lengths, of_each=3)
    stream = SampleStream(samples, batch_size, seed=5, window=window, together=together)
    found = ids_of([next(stream) for _ in range(steps)])
    for start in range(0, len(found) - len(lengths) + 1, len(lengths)):
        assert sorted(found[start : start + len(lengths)], key=int) == [str(n) for n in range(len(lengths))]
    state = {"epoch": stream.epoch, "offset": stream.offset}
    later = SampleStream(samples, batch_size, seed=5, window=window, together=together, **state)
    assert [next(later) for _ in range(4)] == [next(stream) for _ in range(4)]


@given(of_each=st.integers(1, 5), together=st.integers(2, 6), seed=st.integers(0, 9), window=st.sampled_from([0, 4]))
def test_samples_of_one_example_stand_together(of_each: int, together: int, seed: int, window: int) -> None:
    """In as few places as their number allows, here where one window holds an epoch."""
    examples = 8
    samples = Lengths([7 * n % 40 + 1 for n in range(examples * of_each)], of_each=of_each)
    stream = SampleStream(samples, len(samples), seed=seed, window=window, together=together)
    order = [int(sample.id) // of_each for sample in next(stream)]
    runs = [len(list(run)) for _, run in itertools.groupby(order)]
    places = -(-of_each // together)
    # Two parts of one example may happen to stand beside each other.
    assert len(runs) <= examples * places
    assert len(runs) == examples or places > 1
    if of_each > 1:
        alone = SampleStream(samples, len(samples), seed=seed, window=window)
        assert len(runs) < len(list(itertools.groupby(int(sample.id) // of_each for sample in next(alone))))


def test_questions_know_their_context() -> None:
    """Over the chunks in which examples are tokenised, and past questions that are too long."""
    turns = [("q", "a"), ("q" * 300, "a"), ("qq", "a")]
    samples = AnswerSamples.build([example(str(n), "c", *turns) for n in range(300)], TOKENIZER, stage("1qa", conversation=100))
    assert samples.examples.tolist() == [n for n in range(300) for _ in "ab"]
    assert samples.sample(599, epoch=0).id == "299/2"


def test_batches_by_length_hold_what_is_equally_long() -> None:
    lengths = [(7 * n) % 64 for n in range(64 * 4 + 3)]
    spread = {}
    for window in (0, 8):
        stream = SampleStream(Lengths(lengths), batch_size=8, seed=1, window=window)
        # Over the ends of epochs too, where a batch begins in one and ends in the next.
        batches = [[len(sample.context_ids) for sample in next(stream)] for _ in range(96)]
        spread[window] = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    # Eight batches of eight drawn from 0 … 63 and shared out by length: about eight apart. By themselves: 49 on average.
    assert spread[8] < 14 < 40 < spread[0]


def test_batches_by_length_come_in_no_order_of_length() -> None:
    stream = SampleStream(Lengths(range(64)), batch_size=8, seed=1, window=8)
    firsts = [len(next(stream)[0].context_ids) for _ in range(8)]
    assert sorted(firsts) == list(range(0, 64, 8)) != firsts


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


def test_a_context_that_samples_share_is_there_once() -> None:
    contexts = [[11, 12], [13], [11, 12], [13], [11, 12]]
    batch = collate([Sample(str(n), context, [n, 7], [-100, 7]) for n, context in enumerate(contexts)], pad_id=0)
    assert batch.context_ids.tolist() == [[11, 12], [0, 13]]
    assert batch.context_mask is not None
    assert batch.context_of is not None
    assert batch.context_of.tolist() == [0, 1, 0, 1, 0]
    assert batch.input_ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch.tokens == 2 * 5 + 8, "useful is what each sample has, whoever shares it"
    adapters = LoRA({"a": (torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.ones(2, 1, 1))})
    assert batch.worn(adapters)["a"][0].flatten().tolist() == [1.0, 2.0, 1.0, 2.0, 1.0]
    alone = collate([Sample("a", [11], [1, 7], [-100, 7]), Sample("b", [12], [2, 7], [-100, 7])], pad_id=0)
    assert alone.context_of is None
    assert alone.worn(adapters) is adapters


def test_a_batch_can_be_padded_to_a_multiple() -> None:
    samples = [Sample("a", [11, 12, 13], [1, 2, 3, 4], [-100, -100, 3, 4]), Sample("b", [14], [5, 6], [-100, 6])]
    batch = collate(samples, pad_id=0, multiple=4)
    assert batch.context_ids.tolist() == [[0, 11, 12, 13], [0, 0, 0, 14]]
    assert batch.context_mask is not None
    assert batch.context_mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]
    assert batch.input_ids.flatten()[batch.label_positions].tolist() == batch.label_ids.tolist() == [3, 4, 6]
    full = collate([Sample("a", [1] * 8, [2] * 4, [-100, 2, 2, 2])], pad_id=0, multiple=4)
    assert (full.context_mask, full.input_mask) == (None, None)


def test_a_pad_token_in_the_text_is_not_taken_for_padding() -> None:
    batch = collate([Sample("a", [0, 5], [0, 0, 1], [-100, 0, 1]), Sample("b", [0], [1, 2, 3], [-100, 2, 3])], pad_id=0)
    assert batch.context_mask is not None
    assert batch.context_mask.tolist() == [[1, 1], [0, 1]]
    assert batch.input_mask is None
    assert batch.label_ids.tolist() == [0, 1, 2, 3]
