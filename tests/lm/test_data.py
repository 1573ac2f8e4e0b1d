from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import data
from lm.config import DataConfig
from lm.corpus import Record, load_corpus
from lm.data import Windows
from lm.errors import UserError


def test_vocabulary_comes_from_train_alone(toy_csv: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus=str(toy_csv), min_count=1)
    corpus = load_corpus(config, tmp_path / "cache")
    corpus.splits["validation"].append(Record("zebra", "zebra zebra zebra", "zebra"))
    tokens = data.tokenize(corpus, config, tmp_path / "cache")
    assert tokens.vocab.encode("zebra") == [tokens.vocab.unk_id]
    assert tokens.ids["validation"][-3:].tolist() == [0, 0, 0]


def test_tokens_are_read_from_the_cache_the_second_time(
    toy_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(corpus=str(toy_csv))
    corpus = load_corpus(config, tmp_path / "cache")
    first = data.tokenize(corpus, config, tmp_path / "cache")
    monkeypatch.setattr(data.Vocab, "build", lambda *_: pytest.fail("the cache was not used"))
    again = data.tokenize(corpus, config, tmp_path / "cache")
    assert isinstance(again.ids["train"], np.memmap)
    assert np.array_equal(first.ids["train"], again.ids["train"])
    assert not list((tmp_path / "cache").glob(".draft-*"))


def test_another_tokenizer_has_another_cache(toy_csv: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus=str(toy_csv))
    corpus = load_corpus(config, tmp_path / "cache")
    word = data.tokenize(corpus, config, tmp_path / "cache")
    bpe = data.tokenize(corpus, replace(config, tokenizer="bpe", bpe_vocab_size=300), tmp_path / "cache")
    assert (word.vocab.kind, bpe.vocab.kind) == ("word", "bpe")
    assert not np.count_nonzero(bpe.ids["test"] == bpe.vocab.unk_id)


@given(n=st.integers(2, 200), seq_len=st.integers(1, 20), batch_size=st.integers(1, 9))
@settings(deadline=None)
def test_evaluation_windows_hold_each_target_once_in_order(n: int, seq_len: int, batch_size: int) -> None:
    windows = Windows(np.arange(n, dtype=np.uint16), seq_len)
    batches = list(windows.in_order(batch_size))
    assert [int(t) for _, y in batches for t in y.flatten()] == list(range(1, n))
    assert all((y == x + 1).all() for x, y in batches)


@given(n=st.integers(21, 200), seq_len=st.integers(1, 20), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_training_pass_takes_each_full_window_once(n: int, seq_len: int, batch_size: int, seed: int) -> None:
    windows = Windows(np.arange(n, dtype=np.uint16), seq_len)
    batches = list(windows.shuffled(batch_size, seed))
    targets = sorted(int(t) for _, y in batches for t in y.flatten())
    assert targets == list(range(1, 1 + (n - 1) // seq_len * seq_len))
    assert all((y == x + 1).all() for x, y in batches)
    assert len(batches) == windows.n_batches(batch_size)


def test_the_order_changes_with_the_seed() -> None:
    windows = Windows(np.arange(100, dtype=np.uint16), 4)
    first, same, other = (next(windows.shuffled(4, seed))[0] for seed in (1, 1, 2))
    assert first.equal(same)
    assert not first.equal(other)


def test_too_few_tokens_for_a_window_are_refused(toy_text: data.TokenizedCorpus) -> None:
    with pytest.raises(UserError, match="the train split must hold at least 100001 tokens"):
        toy_text.windows("train", 100_000)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_cache_is_made_again(damage: str, toy_csv: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus=str(toy_csv))
    corpus = load_corpus(config, tmp_path / "cache")
    first = np.array(data.tokenize(corpus, config, tmp_path / "cache").ids["train"])
    [folder] = (tmp_path / "cache").glob("tokens-*")
    if damage == "cut":
        (folder / "train.ids").write_bytes((folder / "train.ids").read_bytes()[:200])
    else:
        (folder / "vocab.json").unlink()
    assert np.array_equal(data.tokenize(corpus, config, tmp_path / "cache").ids["train"], first)
