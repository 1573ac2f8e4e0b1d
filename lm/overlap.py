"""What of a split's text stands in train already: whole answers and runs of words. Knows neither tokens nor models."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lm.corpus import Corpus

RUN = 13
"""Words in a row that two texts share by copying rather than by chance.

Brown et al. 2020, appendix C, whose count leaves out punctuation and case, as here.
"""

_WORDS = re.compile(r"\w+(?:'\w+)*")


def in_train(corpus: Corpus, split: str) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which records of a split have their answer in train, and which any run of 13 words.

    Case and punctuation do not count in runs, case alone in answers.

    Returns:
        two arrays [records]. A record is clean where both are False.
    """
    answers = {record.answer.lower() for record in corpus.splits["train"]}
    runs = {run for record in corpus.splits["train"] for run in _runs(record.text)}
    records = corpus.splits[split]
    copied = np.array([bool(record.answer) and record.answer.lower() in answers for record in records], dtype=bool)
    shared = np.array([not runs.isdisjoint(_runs(record.text)) for record in records], dtype=bool)
    return copied, shared


def _runs(text: str) -> Iterator[int]:
    words = _WORDS.findall(text.lower())
    return (hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1))
