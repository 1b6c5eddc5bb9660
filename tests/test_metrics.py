"""Scores against hand-made cases, and against values counted another way on many random texts."""

from __future__ import annotations

import itertools
import json
import math
import random
import string
import sys
from collections.abc import Iterator

import pytest
from rouge import Rouge

from shine.metrics import exact_match, exact_prefix_ratio, f1, hotpot_f1, normalise, perplexity, rouge


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("  A  ", ""),
        ("", ""),
        ("...", ""),
        ("theatre", "theatre"),
        ("Anna and Theo", "anna and theo"),
        ("the-end", "theend"),  # punctuation goes before articles, as in SQuAD's own script
        ("U.S.A.", "usa"),
        ("can't", "cant"),
        ("one\n\ttwo", "one two"),
        ("$1,000.50", "100050"),
        ("Ünna’s", "ünna’s"),  # only ASCII punctuation
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1.0),
        ("Denver", ["Denver Broncos"], 0.0),
        ("broncos denver", ["Denver Broncos"], 0.0),
        ("Paris", ["London", "PARIS!"], 1.0),
        ("", ["Paris"], 0.0),
        ("", ["the"], 1.0),
        ("London Paris", ["London", "Paris"], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], score: float) -> None:
    assert exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the Denver Broncos.", ["Denver Broncos"], 1.0),
        ("Broncos Denver", ["Denver Broncos"], 1.0),
        # Shared 1, precision 1, recall 1/2.
        ("Denver", ["Denver Broncos"], 2 / 3),
        # Shared 2 of 4 said and 3 wanted: 2 * 1/2 * 2/3 / (1/2 + 2/3).
        ("in red green park", ["red green blue"], 4 / 7),
        # A word counts as often as both have it: shared 2, of 3 and of 2.
        ("ha ha ha", ["ha ha"], 4 / 5),
        ("ha", ["ha ha ha"], 1 / 2),
        # The best of the gold answers, not their union.
        ("red green", ["red", "green blue red", "x"], 4 / 5),
        ("red blue", ["red", "blue"], 2 / 3),
        ("Paris", ["London"], 0.0),
        ("", ["Paris"], 0.0),
        ("Paris", ["the"], 0.0),
        ("a", ["the"], 1.0),
    ],
)
def test_f1(prediction: str, answers: list[str], score: float) -> None:
    assert f1(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "target", "ratio"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3, 4], [1, 2, 3], 1.0),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([1, 9, 3, 4], [1, 2, 3, 4], 0.25),  # what is right after the first error does not count
        ([9, 2, 3, 4], [1, 2, 3, 4], 0.0),
        ([], [1], 0.0),
    ],
)
def test_exact_prefix_ratio(prediction: list[int], target: list[int], ratio: float) -> None:
    assert exact_prefix_ratio(prediction, target) == ratio


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        # hotpot_evaluate_v1.py: yes, no and noanswer count only as the same word.
        ("yes", ["yes"], 1.0),
        ("Yes.", ["yes"], 1.0),
        ("no, he was not", ["no"], 0.0),
        ("yes", ["Yes Minister"], 0.0),
        ("noanswer", ["Rome"], 0.0),
        ("no", ["yes", "No"], 1.0),
        ("in Rome", ["Rome"], 2 / 3),
        ("the", ["a"], 0.0),
    ],
)
def test_hotpot_f1(prediction: str, answers: list[str], score: float) -> None:
    assert hotpot_f1(prediction, answers) == pytest.approx(score)


def test_rouge_by_hand() -> None:
    # Unigrams 3 of 4 and 3 of 3; bigrams "the cat", "cat sat" are 2 of 3 and 2 of 2; longest common subsequence 3.
    found = rouge("The cat sat down", ["the cat sat"])
    assert found["rouge_1"] == pytest.approx(2 * (3 / 4) / (3 / 4 + 1), abs=1e-6)
    assert found["rouge_2"] == pytest.approx(2 * (2 / 3) / (2 / 3 + 1), abs=1e-6)
    assert found["rouge_l"] == pytest.approx(2 * (3 / 4) / (3 / 4 + 1), abs=1e-6)
    assert rouge("cat the sat", ["sat the cat"])["rouge_l"] == pytest.approx(1 / 3, abs=1e-6)
    assert rouge("dog", ["x y", "dog"])["rouge_1"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("the cat sat down", "the cat sat"),
        ("one two. three four. one two", "three four. one two five"),
        ("a b c d e f", "f e d c b a"),
        ("don't stop, please", "please don't, stop"),
    ],
)
def test_rouge_is_the_packages_own_on_what_it_can_take(prediction: str, answer: str) -> None:
    """Lower-case words with single spaces: nothing that is done for other texts changes the score of these."""
    (found,) = Rouge().get_scores(prediction, answer)
    assert rouge(prediction, [answer]) == {f"rouge_{kind}": found[f"rouge-{kind}"]["f"] for kind in "12l"}


@pytest.mark.parametrize(("prediction", "answer"), [("", "x"), ("x", ""), ("", ""), ("...", "x"), ("x", " . "), ("\n", ".")])
def test_rouge_of_nothing_is_zero(prediction: str, answer: str) -> None:
    assert rouge(prediction, [answer]) == {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}


def test_rouge_of_a_long_text_without_sentences() -> None:
    """The package alone recurses once for each word of both texts, beyond Python's limit."""
    words = [f"w{n}" for n in range(1200)]
    limit = sys.getrecursionlimit()
    assert rouge(" ".join(words), [" ".join(words[::2])])["rouge_l"] == pytest.approx(2 * 600 / 1800, abs=1e-4)
    assert sys.getrecursionlimit() == limit


@pytest.mark.parametrize(("said", "gold"), [("東京の塔", "東京の駅"), ("ก ข ค", "กขง"), ("서울 타워", "서울 역")])
def test_rouge_reads_scripts_without_spaces_by_character(said: str, gold: str) -> None:
    assert 0 < rouge(said, [gold])["rouge_1"] < 1


def plain_words(text: str) -> list[str]:
    """Words as SQuAD's script counts them, of ASCII texts: character by character and word by word."""
    kept = "".join(character for character in text if character not in string.punctuation)
    return [word for word in kept.lower().split() if word not in ("a", "an", "the")]


def overlap(said: list[str], wanted: list[str]) -> float:
    """F1 from precision and recall; each word that both have is taken off once."""
    left, shared = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return float(said == wanted)
    precision, recall = shared / len(said), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def random_answers(count: int) -> Iterator[tuple[str, list[str]]]:
    """A prediction with one to three golds, of few words, so that many are shared, repeated, articles, closed, or none."""
    rng = random.Random(7)
    parts = ["a", "The", "an", "red", "Red!", "red-hot", "no", "Yes", "noanswer", "blue,", "U.S.", "--", "ann", "bathe"]

    def text() -> str:
        return rng.choice([" ", "  ", "\n"]).join(rng.choices(parts, k=rng.randrange(5)))

    for _ in range(count):
        yield text(), [text() for _ in range(rng.randint(1, 3))]


def test_em_and_f1_are_those_counted_from_precision_and_recall() -> None:
    seen = set()
    for prediction, answers in random_answers(3000):
        said, golds = plain_words(prediction), [plain_words(answer) for answer in answers]
        expected = max(overlap(said, gold) for gold in golds)
        assert f1(prediction, answers) == pytest.approx(expected), (prediction, answers)
        assert exact_match(prediction, answers) == float(said in golds), (prediction, answers)
        seen.add(round(expected, 3))
    assert len(seen) > 10, "hardly any case was tried"


def test_hotpots_f1_is_squads_but_for_closed_answers_and_nothing() -> None:
    """HotpotQA's script, gold by gold: nothing for an overlap of no word; yes, no and noanswer only as a whole."""

    def one(said: list[str], gold: list[str]) -> float:
        closed = any(words in (["yes"], ["no"], ["noanswer"]) for words in (said, gold))
        return float(said == gold) if closed else overlap(said, gold) if said and gold else 0.0

    differ = 0
    for prediction, answers in random_answers(3000):
        expected = max(one(plain_words(prediction), plain_words(answer)) for answer in answers)
        assert hotpot_f1(prediction, answers) == pytest.approx(expected), (prediction, answers)
        differ += expected != pytest.approx(f1(prediction, answers))
    assert differ > 100, "hardly any case is closed"


def longest_common(first: list[str], second: list[str]) -> int:
    """By trying every selection of words."""
    kept = {words for size in range(len(second) + 1) for words in itertools.combinations(second, size)}
    return max(size for size in range(len(first) + 1) for words in itertools.combinations(first, size) if words in kept)


def test_rouge_is_the_share_of_common_words_pairs_and_sequences() -> None:
    """F = 2PR / (P + R) = twice what is common, by the sum of both; of one sentence without repeated words."""
    rng = random.Random(11)
    for _ in range(200):
        first, second = (rng.sample("abcdefghij", rng.randint(1, 7)) for _ in range(2))
        pairs = [set(itertools.pairwise(words)) for words in (first, second)]
        expected = {
            "rouge_1": 2 * len({*first} & {*second}) / (len(first) + len(second)),
            "rouge_2": 2 * len(pairs[0] & pairs[1]) / (sum(map(len, pairs)) or 1),
            "rouge_l": 2 * longest_common(first, second) / (len(first) + len(second)),
        }
        assert rouge(" ".join(first), [" ".join(second)]) == pytest.approx(expected, abs=1e-6)


def test_the_exact_prefix_is_the_common_one() -> None:
    rng = random.Random(13)
    for _ in range(500):
        said, target = ([rng.randrange(2) for _ in range(rng.randint(least, 6))] for least in (0, 1))
        longest = max(size for size in range(len(target) + 1) if said[:size] == target[:size])
        assert exact_prefix_ratio(said, target) == longest / len(target)


def test_perplexity_is_the_mean_of_inverse_chances() -> None:
    """Geometrically: a model that picks evenly among eight has a perplexity of eight. What is beyond all bounds stays a number."""
    chances = [0.5, 0.25, 0.125, 0.0625]
    loss = sum(-math.log(chance) for chance in chances) / len(chances)
    assert perplexity(loss) == pytest.approx(math.prod(1 / chance for chance in chances) ** (1 / len(chances)))
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert float(json.dumps(perplexity(1e6), allow_nan=False)) > 1e20
