"""Records to memory-mapped ids and batches, with what there is to know of each record. Knows neither files of text nor
models.

A split's records are one text. Windows of a split are cut from that split's ids alone, one after another, so no window
can reach into another split and no token is a target twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from lm.config import DataConfig
from lm.corpus import SPLITS, Corpus
from lm.errors import UserError
from lm.ngram import KneserNey
from lm.overlap import RUN, in_train
from lm.spelling import written_nats
from lm.tables import Record, Records, batched, made_once, number
from lm.vocab import Vocab

BASELINE_ORDER = 5
"""Order of the n-gram model that every run is held against."""

BASELINE_TOKENS = 2**21
"""So much of train, from its start, is what that model and the cost of written forms are learned from."""

_CACHE_FORMAT = 5
_RECORDS_AT_ONCE = 1000
_RECORD = np.dtype(
    [("tokens", "i8"), ("bytes", "i8"), ("written_nats", "f8"), ("group", "i8"), ("copied", "?"), ("shared", "?")]
)
_STEPS_OF_CONTEXT = 32

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Memory-mapped ids of each split, the vocabulary (built from train alone), and what a figure is measured against.

    `records[split]` is a table, one row a record: tokens, bytes of its text with the end of its line, nats of the
    written forms (`lm.spelling`), the number of its question, and whether its answer, or a run of 13 words, stands in
    train (`lm.overlap`). `baseline_nats[split]` is what the Kneser-Ney model of order 5 pays for each target.
    Both are of validation and test.
    """

    vocab: Vocab
    ids: dict[str, Ids]
    records: dict[str, npt.NDArray[np.void]]
    baseline_nats: dict[str, npt.NDArray[np.float32]]

    def clean(self, split: str) -> npt.NDArray[np.bool_]:
        """Whether each record [records] has neither its answer nor a run of 13 words in train."""
        return ~(self.records[split]["copied"] | self.records[split]["shared"])

    def of_targets(self, split: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Spread a value of each record over the targets [targets] that stand in it; the first token is none."""
        return np.repeat(values, self.records[split]["tokens"])[1:]

    def windows(self, split: str, seq_len: int) -> Windows:
        """Windows of one split.

        Raises:
            UserError: the split has too few tokens for a single target.
        """
        n = len(self.ids[split])
        least = seq_len + 1 if split == "train" else 2
        if n < least:
            raise UserError(
                f"the {split} split must hold at least {least} tokens for seq_len={seq_len}: got {n}. "
                "Try a larger corpus or a smaller --seq-len."
            )
        return Windows(self.ids[split], seq_len)


@dataclass(frozen=True)
class Windows:
    """Windows of `seq_len` tokens; targets are the inputs shifted by one.

    They are consecutive, unless `starts` says where each begins: then they may overlap (`experiments/leak_study.py`).
    """

    ids: Ids
    seq_len: int
    starts: npt.NDArray[np.int64] | None = None

    @property
    def n_targets(self) -> int:
        """Targets of one evaluation pass: all tokens but the first."""
        return len(self.ids) - 1 if self.starts is None else len(self.starts) * self.seq_len

    @property
    def n_full(self) -> int:
        """Windows of full length."""
        return self.n_targets // self.seq_len

    def covered(self) -> npt.NDArray[np.bool_]:
        """Which positions of `ids` are in a window, as input or target."""
        if self.starts is None:
            return np.ones(len(self.ids), bool)
        steps = np.zeros(len(self.ids) + 1, np.int64)
        np.add.at(steps, self.starts, 1)
        np.add.at(steps, self.starts + self.seq_len + 1, -1)
        return np.cumsum(steps[:-1]) > 0

    def n_batches(self, batch_size: int) -> int:
        """Batches in one training pass."""
        return -(-self.n_full // batch_size)

    def shuffled(self, batch_size: int, seed: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One training pass: full windows in an order drawn from `seed`; the shorter last window is left out.

        `done` batches of it are left out too: those that were trained on before.

        Yields:
            inputs and targets [B, T], int64; the last batch may have fewer windows.
        """
        order = np.random.default_rng(seed).permutation(self.n_full)
        for i in range(done * batch_size, len(order), batch_size):
            yield self._cut(np.sort(order[i : i + batch_size]))

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One evaluation pass: every target exactly once, the last window as short as it is.

        Yields:
            inputs and targets [B, T], int64.
        """
        for i in range(0, self.n_full, batch_size):
            yield self._cut(np.arange(i, min(i + batch_size, self.n_full)))
        done = self.n_full * self.seq_len
        if done < self.n_targets:
            yield _tensor(self.ids[None, done:-1]), _tensor(self.ids[None, done + 1 :])

    def sliding(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One evaluation pass over consecutive ids with long contexts: windows move on by 1 / 32 of themselves.

        At seq_len 32 and below each target but the first ones has all the context that the model takes; above, at
        least 31 / 32 of it.

        Yields:
            inputs [B, T] and the targets of their last positions [B, up to T], int64, every target once and in order.
        """
        n, T = self.n_targets, self.seq_len
        yield _tensor(self.ids[None, : min(n, T)]), _tensor(self.ids[None, 1 : min(n, T) + 1])
        step = max(1, T // _STEPS_OF_CONTEXT)
        ends = np.arange(T + step, n + 1, step)
        for i in range(0, len(ends), batch_size):
            last = ends[i : i + batch_size, None]
            yield (
                _tensor(self.ids[last - T + np.arange(T)]),
                _tensor(self.ids[last - step + 1 + np.arange(step)]),
            )
        left = n - (int(ends[-1]) if len(ends) else T)
        if left > 0:
            yield _tensor(self.ids[None, n - T : n]), _tensor(self.ids[None, n - left + 1 :])

    def _cut(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        starts = rows * self.seq_len if self.starts is None else self.starts[rows]
        at = starts[:, None] + np.arange(self.seq_len)
        return _tensor(self.ids[at]), _tensor(self.ids[at + 1])


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))


def tokenize(corpus: Corpus, config: DataConfig, cache_dir: Path, progress: bool = False) -> TokenizedCorpus:
    """Build the vocabulary from train and encode each split, or take both from the cache.

    Text is read a thousand records at a time, encoded on all cores, and written on as it comes; what is held in memory
    is the vocabulary, the tables of validation and test, and models of `BASELINE_TOKENS` of train. The cache's key is
    the corpus with every setting of the tokenizer; a cache written by a process that died is never seen.
    """
    settings = {
        "format": _CACHE_FORMAT,
        "baseline": [BASELINE_ORDER, BASELINE_TOKENS],
        "run": RUN,
        "corpus": corpus.digest,
        "questions and answers": corpus.keys_digest or _keys_digest(corpus),
        "tokenizer": config.tokenizer,
        "min_count": config.min_count,
    }
    if config.tokenizer == "bpe":
        settings["bpe_vocab_size"] = config.bpe_vocab_size
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"tokens-{key}"
    return made_once(folder, _read_cache, lambda draft: _write_cache(draft, corpus, config, progress))


def _keys_digest(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for record in corpus.splits[split]:
            digest.update(f"{record.key}\t{record.answer}\n".encode())
    return digest.hexdigest()


def _read_cache(folder: Path) -> TokenizedCorpus | None:
    """What `_write_cache` wrote; None where it is not there, or damaged or half deleted, since it is only a cache."""
    try:
        vocab = Vocab.from_json((folder / "vocab.json").read_text(encoding="utf-8"))
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        ids = {split: _map(folder / f"{split}.ids", about["dtype"], about["tokens"][split]) for split in SPLITS}
        records = {s: np.load(folder / f"{s}-records.npy") for s in SPLITS[1:]}
        baseline = {s: np.load(folder / f"{s}-baseline.npy") for s in SPLITS[1:]}
    except (OSError, ValueError, EOFError, KeyError):
        return None
    return TokenizedCorpus(vocab, ids, records, baseline)


def _map(file: Path, dtype: str, n: int) -> Ids:
    if file.stat().st_size != n * np.dtype(dtype).itemsize:
        raise EOFError(file)
    return np.memmap(file, dtype, "r") if n else np.empty(0, dtype)


def _write_cache(draft: Path, corpus: Corpus, config: DataConfig, progress: bool) -> None:
    train = _watched(corpus.splits["train"], "vocabulary", progress)
    texts = (record.text + "\n" for part in train for record in part)
    vocab = Vocab.build(texts, config.tokenizer, config.min_count, config.bpe_vocab_size)
    dtype = np.dtype(np.uint16 if len(vocab) <= 2**16 else np.uint32)
    (draft / "vocab.json").write_text(vocab.to_json(), encoding="utf-8")
    tokens: dict[str, int] = {}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}  # of train's first records alone
    for split in SPLITS:
        tokens[split] = 0
        with (draft / f"{split}.ids").open("wb") as f:
            for part in _watched(corpus.splits[split], f"tokens of {split}", progress):
                encoded = vocab.encode_batch([record.text + "\n" for record in part])
                flat = np.array([i for record in encoded for i in record], dtype)
                f.write(flat.tobytes())
                if split != "train" or tokens[split] < BASELINE_TOKENS:
                    lengths[split] += map(len, encoded)
                tokens[split] += len(flat)
    (draft / "about.json").write_text(json.dumps({"dtype": dtype.name, "tokens": tokens}), encoding="utf-8")
    first = int(np.searchsorted(np.cumsum(lengths["train"]), BASELINE_TOKENS, "right")) + 1
    learned = (record.text + "\n" for record in itertools.islice(corpus.splits["train"], first))
    some = np.fromfile(draft / "train.ids", dtype, BASELINE_TOKENS)
    baseline = KneserNey(some, len(vocab), min(BASELINE_ORDER, len(some)))
    overlap = in_train(corpus)
    held = [(record.text + "\n" for record in corpus.splits[split]) for split in SPLITS[1:]]
    for split, nats in zip(SPLITS[1:], written_nats(vocab, learned, held), strict=True):
        table = np.zeros(len(lengths[split]), _RECORD)
        table["tokens"], table["written_nats"] = lengths[split], nats
        table["copied"], table["shared"] = overlap[split]
        start, keys = 0, np.zeros(len(table), np.uint64)
        for part in batched(corpus.splits[split], _RECORDS_AT_ONCE):
            rows = slice(start, start + len(part))
            table["bytes"][rows] = [len(record.text.encode()) + 1 for record in part]
            keys[rows] = [number(record.key) for record in part]
            start += len(part)
        table["group"] = np.unique(keys, return_inverse=True)[1]
        np.save(draft / f"{split}-records.npy", table)
        paid = baseline.nats(_map(draft / f"{split}.ids", dtype.name, tokens[split]))
        np.save(draft / f"{split}-baseline.npy", paid[1:].astype(np.float32))


def _watched(records: Records, what: str, progress: bool) -> Iterator[list[Record]]:
    with tqdm(total=len(records), desc=what, unit=" records", disable=not progress, leave=False) as bar:
        for part in batched(records, _RECORDS_AT_ONCE):
            yield part
            bar.update(len(part))
