"""What of a split's text stands in train already: whole answers and runs of words. Knows neither tokens nor models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lm.corpus import SPLITS, Corpus
from lm.tables import Record, Records, batched, number

RUN = 13
"""Words in a row that two texts share by copying rather than by chance.

Brown et al. 2020, appendix C, whose count leaves out punctuation and case, as here.
"""

_WORDS = re.compile(r"\w+(?:'\w+)*")
_AT_ONCE = 5000
_ODD = 0x9E3779B97F4A7C15

Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.uint64]
_NONE = np.empty(0, np.uint64)


def in_train(corpus: Corpus) -> dict[str, tuple[Flags, Flags]]:
    """Which records of validation and test have their answer in train, and which any run of 13 words.

    Case and punctuation do not count in runs, case alone in answers. No text is held: 8 bytes for each run of
    validation and test.

    Returns:
        two arrays [records] for each split. A record is clean where both are False.
    """
    held = {split: corpus.splits[split] for split in SPLITS[1:]}
    parts = [part for records in held.values() for part in _numbers(records)]
    answers, runs = (np.unique(np.concatenate([*column, _NONE])) for column in zip(*parts, (_NONE, _NONE), strict=True))
    del parts
    seen_answers, seen_runs = np.zeros(len(answers), bool), np.zeros(len(runs), bool)
    for found_answers, found_runs in _numbers(corpus.splits["train"]):
        _mark(seen_answers, answers, found_answers)
        _mark(seen_runs, runs, found_runs)
    made: dict[str, tuple[Flags, Flags]] = {}
    for split, records in held.items():
        copied, shared = np.zeros(len(records), bool), np.zeros(len(records), bool)
        start = 0
        for part in batched(records, _AT_ONCE):
            found, owner = _runs(part)
            shared[start + owner[seen_runs[np.searchsorted(runs, found)]]] = True
            copied[start : start + len(part)] = [
                bool(each.answer) and bool(seen_answers[np.searchsorted(answers, _number(each))]) for each in part
            ]
            start += len(part)
        made[split] = copied, shared
    return made


def _number(record: Record) -> np.uint64:
    return np.uint64(number(record.answer.lower()))


def _numbers(records: Records) -> Iterator[tuple[Numbers, Numbers]]:
    """Numbers of the answers, empty ones aside, and of the runs, some records at a time."""
    for part in batched(records, _AT_ONCE):
        yield np.array([_number(each) for each in part if each.answer], np.uint64), np.unique(_runs(part)[0])


def _mark(seen: Flags, numbers: Numbers, found: Numbers) -> None:
    """Mark those of the sorted numbers that were found."""
    if len(numbers):
        place = np.minimum(np.searchsorted(numbers, found), len(numbers) - 1)
        seen[place[numbers[place] == found]] = True


def _runs(records: Sequence[Record]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """A number for each run of 13 words of the records, equal for equal runs, and the place of its record."""
    words = [_WORDS.findall(each.text.lower()) for each in records]
    lengths = np.array([len(each) for each in words], np.int64)
    codes = np.array([hash(word) for each in words for word in each], np.int64).view(np.uint64)
    n = max(0, len(codes) - RUN + 1)
    made = np.zeros(n, np.uint64)
    for i in range(RUN):
        made = (made ^ (made >> np.uint64(29))) * np.uint64(_ODD) + codes[i : i + n]
    owner = np.repeat(np.arange(len(records)), lengths)
    within = np.repeat(np.cumsum(lengths), lengths)[:n] - np.arange(n) >= RUN
    return made[within], owner[:n][within]
