from collections import Counter
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import ngram
from lm.data import TokenizedCorpus
from lm.ngram import KneserNey


class Definition:
    """Chen and Goodman's formulas, one n-gram at a time, in dictionaries."""

    def __init__(self, ids: list[int], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        raw = [Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)) for n in range(1, order + 1)]
        self.counts: list[dict[tuple[int, ...], int]] = []
        for n in range(1, order):
            left = {gram: {longer[0] for longer in raw[n] if longer[1:] == gram} for gram in raw[n - 1]}
            self.counts.append({gram: len(words) for gram, words in left.items()})
        self.counts.append(dict(raw[order - 1]))
        self.discounts = [self.discounts_of(list(counts.values())) for counts in self.counts]

    @staticmethod
    def discounts_of(counts: list[int]) -> list[float]:
        n1, n2, n3, n4 = (counts.count(i) for i in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return [0.0, 0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        made = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return made if all(0 <= d <= i for i, d in enumerate(made)) else [0.0, 0.5, 1.0, 1.5]

    def probability(self, context: tuple[int, ...], word: int, n: int | None = None) -> float:
        n = self.order if n is None else n
        if n == 0:
            return 1 / self.vocab_size
        context = context[len(context) - (n - 1) :] if n > 1 else ()
        counts, discounts = self.counts[n - 1], self.discounts[n - 1]
        followers = {gram: c for gram, c in counts.items() if gram[:-1] == context and len(gram) == n}
        total = sum(followers.values())
        lower = self.probability(context[1:], word, n - 1)
        if total == 0 or len(context) < n - 1:
            return lower
        taken = sum(discounts[min(c, 3)] for c in followers.values())
        count = counts.get((*context, word), 0)
        return (count - discounts[min(count, 3)]) / total + taken / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_each_order_is_the_definition(order: int, toy_text: TokenizedCorpus) -> None:
    train, validation = (toy_text.ids[split][:400].tolist() for split in ("train", "validation"))
    vocab_size = len(toy_text.vocab)
    expected = Definition(train, vocab_size, order)
    ours = KneserNey(np.array(train), vocab_size, 5).nats(np.array(validation[:60]), order)
    for i, got in enumerate(ours):
        context = tuple(validation[max(0, i - order + 1) : i])
        # At the start the context is shorter than the order: the model of what there is.
        n = min(order, len(context) + 1)
        assert got == pytest.approx(-log(expected.probability(context, validation[i], n)), abs=1e-9), i


@given(
    ids=st.lists(st.integers(0, 5), min_size=12, max_size=80),
    context=st.lists(st.integers(0, 6), max_size=6),
    order=st.integers(1, 4),
)
@settings(deadline=None)
def test_probabilities_of_all_next_tokens_sum_to_one(ids: list[int], context: list[int], order: int) -> None:
    model = KneserNey(np.array(ids), 7, 4)
    total = sum(np.exp(-model.nats(np.array([*context, token]), order)[-1]) for token in range(7))
    assert total == pytest.approx(1)


def test_a_longer_order_knows_the_text_better(toy_text: TokenizedCorpus) -> None:
    model = KneserNey(toy_text.ids["train"], len(toy_text.vocab))
    figures = [model.nats(toy_text.ids["validation"], order).mean() for order in (1, 2, 3)]
    assert figures == sorted(figures, reverse=True)


def test_too_short_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold an n-gram"):
        KneserNey(np.array([1, 2]), 5, 3)


def test_nats_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 5, 500)
    model = KneserNey(ids[:300], 5)
    whole = model.nats(ids)
    monkeypatch.setattr(ngram, "_AT_ONCE", 7)
    assert np.array_equal(model.nats(ids), whole)
