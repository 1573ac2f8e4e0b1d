"""What it costs to write a text out, once its tokens are known: capitals, spaces, and the words that became `<unk>`.

A word-level vocabulary drops all of these. To compare it with another vocabulary by bits per byte they must be paid
for, as Brown et al. 1992 ("An estimate of an upper bound for the entropy of English") pay for spelling, case and
spacing beside their tokens. Here one model serves the three. A token's written form is the text from the end of the
token before it to its own end (" The"); its probability is its share among the forms that this token had in train,
mixed with a spelling byte by byte, in the proportion of Witten and Bell 1991 (method C):

    p(form | token) = (count(token, form) + kinds(token) * spell(form)) / (count(token) + kinds(token))

`spell` is a Kneser-Ney model over the bytes of the forms that `<unk>` had in train. Byte-level BPE loses nothing, and
its cost is 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lm.ngram import KneserNey
from lm.tables import batched
from lm.vocab import Vocab

_END = 256
_BYTE_ORDER = 5
_AT_ONCE = 1000


def written_nats(vocab: Vocab, train: Iterable[str], splits: Sequence[Iterable[str]]) -> list[npt.NDArray[np.float64]]:
    """Cost of the written forms of each record [records], in nats, for each of `splits`; a line ends each record."""
    if vocab.kind == "bpe":
        return [np.zeros(sum(1 for _ in split)) for split in splits]
    counts: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for part in _forms(vocab, train):
        for forms in part:
            for token, form in forms:
                counts[token][form] += 1
    totals = {token: sum(seen.values()) for token, seen in counts.items()}
    rare = list(counts[vocab.unk_id]) or [form for seen in counts.values() for form in seen]
    speller = KneserNey(_bytes(rare), 257, _BYTE_ORDER)
    costs: list[npt.NDArray[np.float64]] = []

    def cost(token: int, form: str, spelled: dict[str, float]) -> float:
        seen = counts[token]
        if not seen:
            return spelled[form]
        counted = math.log(seen[form]) if form in seen else -math.inf
        # In logarithms: a long word is spelled with a probability that a float cannot hold.
        mixed = float(np.logaddexp(counted, math.log(len(seen)) - spelled[form]))
        return math.log(totals[token] + len(seen)) - mixed

    for split in splits:
        paid: list[float] = []
        for part in _forms(vocab, split):
            spelled = _spell(speller, {form for forms in part for _, form in forms})
            paid += [sum(cost(token, form, spelled) for token, form in forms) for forms in part]
        costs.append(np.array(paid))
    return costs


def _forms(vocab: Vocab, records: Iterable[str]) -> Iterator[list[list[tuple[int, str]]]]:
    """Some records at a time, each token with its written form; the first begins with the end of the line before."""
    for part in batched(records, _AT_ONCE):
        made: list[list[tuple[int, str]]] = []
        for record, encoded in zip(part, vocab.encode_with_places(part), strict=True):
            forms: list[tuple[int, str]] = []
            done = 0
            for token, end in encoded:
                forms.append((token, ("" if forms else "\n") + record[done : max(done, end)]))
                done = max(done, end)
            made.append(forms)
        yield made


def _bytes(forms: Sequence[str]) -> npt.NDArray[np.int64]:
    """Forms one after another, so many ends between them that no form is seen from the next."""
    gap = [_END] * (_BYTE_ORDER - 1)
    return np.array([*gap, *(b for form in forms for b in (*form.encode(), *gap))], np.int64)


def _spell(speller: KneserNey, forms: set[str]) -> dict[str, float]:
    """Nats of each form: its bytes, and the end after them."""
    ordered = sorted(forms)
    before = np.concatenate([[0.0], np.cumsum(speller.nats(_bytes(ordered)))])
    lengths = np.array([len(form.encode()) for form in ordered], np.int64)
    gap = _BYTE_ORDER - 1
    starts = gap + np.concatenate([[0], np.cumsum(lengths + gap)[:-1]]).astype(np.int64)[: len(ordered)]
    return dict(zip(ordered, (before[starts + lengths + 1] - before[starts]).tolist(), strict=True))
