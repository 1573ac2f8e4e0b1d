import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import UserError
from lm.vocab import UNK, Vocab

TEXTS = ["The cat's mat, the rat!", "the cat sat on 3 mats", "don't sit: the cat sat"]


@pytest.fixture(params=["word", "bpe"])
def vocab(request: pytest.FixtureRequest) -> Vocab:
    return Vocab.build(TEXTS, request.param, min_count=1, bpe_vocab_size=300)


def test_words_keep_their_suffix_and_marks_stand_alone() -> None:
    vocab = Vocab.build(TEXTS, "word", min_count=1)
    assert vocab.tokens(vocab.encode("The CAT's mat, don't!")) == ["the", "cat's", "mat", ",", "don't", "!"]


def test_rare_words_become_unknown() -> None:
    vocab = Vocab.build(TEXTS, "word", min_count=2)
    assert vocab.encode("rat the") == [vocab.unk_id, vocab.encode("the")[0]]
    assert vocab.tokens([0]) == [UNK]


def test_json_round_trip_keeps_every_id(vocab: Vocab) -> None:
    again = Vocab.from_json(vocab.to_json())
    assert len(again) == len(vocab)
    assert again.encode(TEXTS[0]) == vocab.encode(TEXTS[0])
    assert again.kind == vocab.kind


def test_batch_equals_one_by_one(vocab: Vocab) -> None:
    assert vocab.encode_batch(TEXTS) == [vocab.encode(t) for t in TEXTS]


@given(st.text())
def test_bpe_gives_back_any_text(text: str) -> None:
    vocab = Vocab.build(TEXTS, "bpe", min_count=1, bpe_vocab_size=300)
    assert vocab.decode(vocab.encode(text)) == text


@given(st.text())
def test_word_ids_stay_inside_the_vocabulary(text: str) -> None:
    vocab = Vocab.build(TEXTS, "word", min_count=1)
    assert all(0 <= i < len(vocab) for i in vocab.encode(text))


def test_decoding_puts_marks_where_people_do() -> None:
    vocab = Vocab.build(["( a ) b , c . d ?"], "word", min_count=1)
    assert vocab.decode(vocab.encode("(a) b, c. d?")) == "(a) b, c. d?"


def test_a_text_without_repeated_words_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary must hold a word seen 2 times"):
        Vocab.build(["one two three"], "word", min_count=2)


def test_an_id_outside_is_refused(vocab: Vocab) -> None:
    with pytest.raises(UserError, match="below the vocabulary's size"):
        vocab.tokens([len(vocab)])


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"kind": "word", "tokenizer": {"version": "9"}})])
def test_a_damaged_vocabulary_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="vocabulary must be the JSON"):
        Vocab.from_json(text)
