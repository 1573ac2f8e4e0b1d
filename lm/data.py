"""Records to memory-mapped ids and batches, with what there is to know of each record. Knows neither files of text nor
models.

A split's records are one text. Windows of a split are cut from that split's ids alone, one after another, so no window
can reach into another split and no token is a target twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lm.config import DataConfig
from lm.corpus import SPLITS, Corpus
from lm.errors import UserError
from lm.ngram import KneserNey
from lm.overlap import RUN, in_train
from lm.spelling import written_nats
from lm.vocab import Vocab

BASELINE_ORDER = 5
"""Order of the n-gram model that every run is held against."""

_CACHE_FORMAT = 3
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


def tokenize(corpus: Corpus, config: DataConfig, cache_dir: Path) -> TokenizedCorpus:
    """Build the vocabulary from train and encode each split, or take both from the cache.

    The cache's key is the corpus with every setting of the tokenizer; a cache written by a process that died is never
    seen, since the folder is renamed into place when complete.
    """
    parts = "\n".join(f"{record.key}\t{record.answer}" for split in SPLITS for record in corpus.splits[split])
    settings = {
        "format": _CACHE_FORMAT,
        "baseline_order": BASELINE_ORDER,
        "run": RUN,
        "corpus": corpus.digest,
        "questions and answers": hashlib.sha256(parts.encode()).hexdigest(),
        "tokenizer": config.tokenizer,
        "min_count": config.min_count,
    }
    if config.tokenizer == "bpe":
        settings["bpe_vocab_size"] = config.bpe_vocab_size
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"tokens-{key}"
    if folder.exists():
        try:
            return _read_cache(folder)
        except (OSError, ValueError, EOFError):  # damaged or half deleted: it is only a cache
            shutil.rmtree(folder, ignore_errors=True)
    _write_cache(folder, corpus, config)
    return _read_cache(folder)


def _read_cache(folder: Path) -> TokenizedCorpus:
    vocab = Vocab.from_json((folder / "vocab.json").read_text(encoding="utf-8"))
    ids = {s: cast(Ids, np.load(folder / f"{s}.npy", mmap_mode="r")) for s in SPLITS}
    records = {s: np.load(folder / f"{s}-records.npy") for s in SPLITS[1:]}
    baseline = {s: np.load(folder / f"{s}-baseline.npy") for s in SPLITS[1:]}
    return TokenizedCorpus(vocab, ids, records, baseline)


def _write_cache(folder: Path, corpus: Corpus, config: DataConfig) -> None:
    texts = {split: [record.text + "\n" for record in corpus.splits[split]] for split in SPLITS}
    vocab = Vocab.build(texts["train"], config.tokenizer, config.min_count, config.bpe_vocab_size)
    dtype = np.uint16 if len(vocab) <= 2**16 else np.uint32
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
    try:
        (draft / "vocab.json").write_text(vocab.to_json(), encoding="utf-8")
        written = written_nats(vocab, texts["train"], [texts[split] for split in SPLITS[1:]])
        ids: dict[str, Ids] = {}
        for split in SPLITS:
            encoded = vocab.encode_batch(texts[split])
            flat = [np.asarray(record, dtype) for record in encoded]
            ids[split] = np.concatenate(flat) if flat else np.empty(0, dtype)
            np.save(draft / f"{split}.npy", ids[split])
            if split != "train":
                table = np.zeros(len(encoded), _RECORD)
                table["tokens"] = [len(record) for record in encoded]
                table["bytes"] = [len(text.encode()) for text in texts[split]]
                table["written_nats"] = written[SPLITS.index(split) - 1]
                table["group"] = np.unique([record.key for record in corpus.splits[split]], return_inverse=True)[1]
                table["copied"], table["shared"] = in_train(corpus, split)
                np.save(draft / f"{split}-records.npy", table)
        baseline = KneserNey(ids["train"], len(vocab), min(BASELINE_ORDER, len(ids["train"])))
        for split in SPLITS[1:]:
            np.save(draft / f"{split}-baseline.npy", baseline.nats(ids[split])[1:].astype(np.float32))
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # another process may have put the same content there first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
