"""Interpolated modified Kneser-Ney n-gram models over sequences of ids. Knows neither text nor networks.

Chen and Goodman 1999, section 3 ("An empirical study of smoothing techniques for language modeling"): three discounts
an order from the counts of counts, continuation counts below the highest order, the lowest order interpolated with the
uniform distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]

_AT_ONCE = 2**18
_FALLBACK = (0.5, 1.0, 1.5)
"""Discounts of an order whose counts of counts have a gap (a tiny text); those that KenLM falls back to."""


@dataclass(frozen=True)
class _Level:
    """All n-grams of one length: `key` is prefix * vocab_size + last id, sorted; the others run along it."""

    key: Ints
    prefix: Ints
    count: Ints
    continuations: Ints


@dataclass(frozen=True)
class _Weights:
    """What an order gives: to each n-gram by itself, and to the order below by its context."""

    own: Floats
    below: Floats


class KneserNey:
    """A model of every order from 1 to `order`, trained on one sequence."""

    def __init__(self, ids: Ints, vocab_size: int, order: int = 5) -> None:
        """Count `ids` [N], each below `vocab_size`."""
        if order < 1 or len(ids) < order:
            raise ValueError(f"a sequence must hold an n-gram of order 1 or above: got order={order}, {len(ids)} ids")
        self.vocab_size, self.order = vocab_size, order
        tokens = np.asarray(ids, np.int64)
        found: list[tuple[Ints, Ints, Ints]] = []
        suffixes: list[Ints] = []
        at = np.zeros(len(tokens), np.int64)  # the n-gram that ends at each position, of the length below
        for length in range(1, order + 1):
            combined = at[: len(tokens) - length + 1] * vocab_size + tokens[length - 1 :]
            key, first, inverse, count = np.unique(combined, return_index=True, return_inverse=True, return_counts=True)
            suffixes.append(at[1:][first] if length > 1 else np.zeros(len(key), np.int64))
            found.append((key, key // vocab_size, count))
            at = inverse
        self._levels: list[_Level] = []
        for i, (key, prefix, count) in enumerate(found):
            longer = np.bincount(suffixes[i + 1], minlength=len(key)) if i + 1 < order else count
            self._levels.append(_Level(key, prefix, count, longer))
        lower = [_weights(level.continuations, level.prefix) for level in self._levels]
        highest = [_weights(level.count, level.prefix) for level in self._levels]
        self._lower, self._highest = lower, highest

    def nats(self, ids: Ints, order: int | None = None) -> Floats:
        """Negative log-likelihood [N] of each id given those before it, by the model of `order` (default: highest)."""
        order = order or self.order
        parts = [np.empty(0)]
        for start in range(0, len(ids), _AT_ONCE):
            before = min(start, order - 1)
            parts.append(self._nats(np.asarray(ids[start - before : start + _AT_ONCE], np.int64), order)[before:])
        return np.concatenate(parts)

    def _nats(self, tokens: Ints, order: int) -> Floats:
        p = np.full(len(tokens), 1 / self.vocab_size)
        context = np.zeros(len(tokens), np.int64)  # the known n-gram that ends before each position, or -1
        for length in range(1, order + 1):
            level = self._levels[length - 1]
            weights = (self._highest if length == order else self._lower)[length - 1]
            known = (context >= 0) & (context < len(weights.below))
            key = np.where(known, context * self.vocab_size + tokens, -1)
            place = np.minimum(np.searchsorted(level.key, key), len(level.key) - 1)
            seen = known & (level.key[place] == key)
            p = np.where(known, weights.below[np.where(known, context, 0)] * p, p) + np.where(
                seen, weights.own[place], 0
            )
            ends_here = np.where(seen, place, -1)
            context = np.concatenate([[-1], ends_here[:-1]])
        return -np.log(p)


def _weights(counts: Ints, prefix: Ints) -> _Weights:
    """Discounted shares of each n-gram, and what each context leaves to the order below (1 where it was never seen)."""
    n = [int((counts == i).sum()) for i in range(1, 5)]
    discounts = np.array([0.0, *_FALLBACK])
    if all(n):
        y = n[0] / (n[0] + 2 * n[1])
        discounts[1:] = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
    if (discounts[1:] <= 0).any() or (discounts > np.arange(4)).any():  # at 0 an unseen n-gram would be impossible
        discounts[1:] = _FALLBACK
    discount = discounts[np.minimum(counts, 3)]
    total = np.bincount(prefix, counts)
    taken = np.bincount(prefix, discount)
    seen = total > 0
    below = np.where(seen, taken / np.where(seen, total, 1), 1.0)
    own = (counts - discount) / np.where(seen, total, 1)[prefix]
    return _Weights(own, below)
