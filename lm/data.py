"""Records to memory-mapped ids and batches. Knows neither files of text nor models.

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
from lm.vocab import Vocab

_CACHE_FORMAT = 1

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Memory-mapped ids of each split, and the vocabulary (built from train alone)."""

    vocab: Vocab
    ids: dict[str, Ids]

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
    """Consecutive windows of `seq_len` tokens; targets are the inputs shifted by one."""

    ids: Ids
    seq_len: int

    @property
    def n_targets(self) -> int:
        """Tokens that are predicted in one pass: all but the first."""
        return len(self.ids) - 1

    @property
    def n_full(self) -> int:
        """Windows of full length."""
        return self.n_targets // self.seq_len

    def n_batches(self, batch_size: int, tail: bool) -> int:
        """Batches in one pass; `tail` counts the last, shorter window as one of its own."""
        return -(-self.n_full // batch_size) + (tail and self.n_targets % self.seq_len > 0)

    def shuffled(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One training pass: full windows in an order drawn from `seed`; the shorter last window is left out.

        Yields:
            inputs and targets [B, T], int64; the last batch may have fewer windows.
        """
        order = np.random.default_rng(seed).permutation(self.n_full)
        inputs, targets = self._full()
        for i in range(0, len(order), batch_size):
            rows = np.sort(order[i : i + batch_size])
            yield _tensor(inputs[rows]), _tensor(targets[rows])

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One evaluation pass: every target exactly once, the last window as short as it is.

        Yields:
            inputs and targets [B, T], int64.
        """
        inputs, targets = self._full()
        for i in range(0, self.n_full, batch_size):
            yield _tensor(inputs[i : i + batch_size]), _tensor(targets[i : i + batch_size])
        done = self.n_full * self.seq_len
        if done < self.n_targets:
            yield _tensor(self.ids[None, done:-1]), _tensor(self.ids[None, done + 1 :])

    def _full(self) -> tuple[Ids, Ids]:
        n = self.n_full * self.seq_len
        return self.ids[:n].reshape(-1, self.seq_len), self.ids[1 : n + 1].reshape(-1, self.seq_len)


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))


def tokenize(corpus: Corpus, config: DataConfig, cache_dir: Path) -> TokenizedCorpus:
    """Build the vocabulary from train and encode each split, or take both from the cache.

    The cache's key is the corpus digest with every setting of the tokenizer; a cache written by a process
    that died is never seen, since the folder is renamed into place when complete.
    """
    settings = {
        "format": _CACHE_FORMAT,
        "corpus": corpus.digest,
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
        except (OSError, ValueError):  # damaged or half deleted: it is only a cache
            shutil.rmtree(folder, ignore_errors=True)
    _write_cache(folder, corpus, config)
    return _read_cache(folder)


def _read_cache(folder: Path) -> TokenizedCorpus:
    vocab = Vocab.from_json((folder / "vocab.json").read_text(encoding="utf-8"))
    ids = {s: cast(Ids, np.load(folder / f"{s}.npy", mmap_mode="r")) for s in SPLITS}
    return TokenizedCorpus(vocab, ids)


def _write_cache(folder: Path, corpus: Corpus, config: DataConfig) -> None:
    vocab = Vocab.build(corpus.splits["train"], config.tokenizer, config.min_count, config.bpe_vocab_size)
    dtype = np.uint16 if len(vocab) <= 2**16 else np.uint32
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
    try:
        (draft / "vocab.json").write_text(vocab.to_json(), encoding="utf-8")
        for split in SPLITS:
            encoded = vocab.encode_batch([record + "\n" for record in corpus.splits[split]])
            flat = [np.asarray(ids, dtype) for ids in encoded]
            np.save(draft / f"{split}.npy", np.concatenate(flat) if flat else np.empty(0, dtype))
        draft.rename(folder)
    except OSError:
        if not folder.exists():  # another process may have put the same content there first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
