"""What of a split's text stands in train already: whole answers and runs of words. Knows neither tokens nor models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lm.corpus import SPLITS, Corpus
from lm.tables import Record

RUN = 13
"""Words in a row that two texts share by copying rather than by chance.

Brown et al. 2020, appendix C, whose count leaves out punctuation and case, as here.
"""

_WORDS = re.compile(r"\w+(?:'\w+)*")
_AT_ONCE = 5000
_ODD = 0x9E3779B97F4A7C15

Flags = npt.NDArray[np.bool_]


def in_train(corpus: Corpus) -> dict[str, tuple[Flags, Flags]]:
    """Which records of validation and test have their answer in train, and which any run of 13 words.

    Case and punctuation do not count in runs, case alone in answers. Train is gone through once and not held.

    Returns:
        two arrays [records] for each split. A record is clean where both are False.
    """
    held = {split: list(corpus.splits[split]) for split in SPLITS[1:]}
    answers = {each.answer.lower() for records in held.values() for each in records if each.answer}
    of_record = {split: _runs(records) for split, records in held.items()}
    runs = np.unique(np.concatenate([found for found, _ in of_record.values()]))
    seen_answers: set[str] = set()
    seen_runs = np.zeros(len(runs), bool)
    for part in batched(corpus.splits["train"], _AT_ONCE):
        seen_answers.update(answers.intersection(each.answer.lower() for each in part))
        if len(runs):
            found, _ = _runs(part)
            place = np.minimum(np.searchsorted(runs, found), len(runs) - 1)
            seen_runs[place[runs[place] == found]] = True
    made: dict[str, tuple[Flags, Flags]] = {}
    for split, records in held.items():
        found, owner = of_record[split]
        shared = np.zeros(len(records), bool)
        if len(found):
            shared[owner[seen_runs[np.searchsorted(runs, found)]]] = True
        copied = np.array([each.answer.lower() in seen_answers for each in records], dtype=bool)
        made[split] = copied, shared
    return made


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


def batched(records: Iterable[Record], n: int) -> Iterator[list[Record]]:
    """The records in lists of up to `n`."""
    part: list[Record] = []
    for each in records:
        part.append(each)
        if len(part) == n:
            yield part
            part = []
    if part:
        yield part
