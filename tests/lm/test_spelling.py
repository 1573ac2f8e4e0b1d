import math

import numpy as np
import pytest

from lm.spelling import written_nats
from lm.vocab import Vocab

TRAIN = ["The otter swims.\n", "the otter sleeps.\n", "The heron stands near the river.\n", "An adder hides.\n"] * 3


def cost(texts: list[str], train: list[str] = TRAIN, kind: str = "word") -> list[float]:
    vocab = Vocab.build(train, kind, min_count=4, bpe_vocab_size=300)
    return written_nats(vocab, train, [texts])[0].tolist()


def test_a_usual_form_is_cheap_and_an_unusual_one_is_not() -> None:
    usual, capitals, spaced, unknown = cost(["the otter.\n", "THE OTTER.\n", "the otter .\n", "the zyzzyva.\n"])
    assert usual < spaced < capitals
    assert usual < unknown
    assert usual < 6


def test_a_longer_unknown_word_costs_more() -> None:
    short, long = cost(["the xq.\n", "the xqxqxqxqxqxq.\n"])
    assert long > short + 10


def test_a_word_of_any_length_has_a_finite_price() -> None:
    [paid] = cost(["the " + "xq7" * 2000 + ".\n"])
    assert 6000 < paid < 60_000


def test_byte_level_tokens_have_nothing_left_to_pay() -> None:
    assert cost(["The zyzzyva!\n"], kind="bpe") == [0.0]


def test_the_forms_of_a_token_share_less_than_one() -> None:
    vocab = Vocab.build(TRAIN, "word", min_count=4)
    paid = [written_nats(vocab, TRAIN, [[form.strip()]])[0][0] for form in ("the", "The", "THE", "tHe", "thE", "tHE")]
    assert 0.5 < sum(math.exp(-p) for p in paid) <= 1


def test_without_unknown_words_in_train_unknown_ones_are_still_spelled() -> None:
    vocab = Vocab.build(TRAIN, "word", min_count=1)
    [paid] = written_nats(vocab, TRAIN, [["the zyzzyva.\n"]])[0]
    assert np.isfinite(paid)
    assert paid > 10


def test_an_empty_split_costs_nothing() -> None:
    assert cost([]) == []


@pytest.mark.parametrize("text", ["İstanbul is.\n", "naïve é 漢字\n", "\U0001f600 ok\n"])
def test_letters_of_any_script_are_paid_for(text: str) -> None:
    [paid] = cost([text])
    assert np.isfinite(paid)
    assert paid > 5
