"""The stream of batches, and how a batch is laid out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_samples import SENTENCES, TOKENIZER, example, pretrain, stage

from shine.data.batching import SampleStream, collate, pad_left
from shine.data.samples import AnswerSamples, Sample


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


@pytest.mark.parametrize("seed", range(20))
def test_one_usable_sample_is_enough(seed: int) -> None:
    """It may come first in one epoch and last in the next."""
    stream = SampleStream(named(20, unusable=range(1, 20)), 3, seed)
    assert [sample.id for _ in range(3) for sample in next(stream)] == ["0"] * 9


def test_when_no_sample_is_usable_the_stream_ends_with_an_error() -> None:
    stream = SampleStream(named(4, unusable=range(4)), batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"no sample is usable: .*no label left.*conversation_length"):
        next(stream)


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
