import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import generate
from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import Decoder
from lm.vocab import Vocab

VOCAB = Vocab.build(["the cat sat on the mat . a dog ran to the house and slept ."], min_count=1)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=32, seq_len=8), len(VOCAB)).eval()


def uncached(model: Decoder, ids: list[int], n: int) -> list[int]:
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-model.seq_len :]]))[0][0, -1].argmax()))
    return ids


def test_greedy_with_the_cache_equals_greedy_without_also_past_the_window(model: Decoder) -> None:
    prompt = VOCAB.encode("the cat sat")
    made = list(generate.generate_ids(model, prompt, max_length=20, temperature=0))
    assert prompt + made == uncached(model, prompt, 20)


def test_equal_seeds_give_equal_text(model: Decoder) -> None:
    first, same, other = (
        generate.generate_text(model, VOCAB, "the cat", max_length=12, temperature=1.5, seed=s) for s in (1, 1, 2)
    )
    assert first == same != other
    assert first.startswith("the cat")


def test_only_the_likeliest_token_is_left_by_top_k_one_and_by_a_small_top_p(model: Decoder) -> None:
    prompt = VOCAB.encode("a dog")
    greedy = list(generate.generate_ids(model, prompt, 10, temperature=0))
    assert list(generate.generate_ids(model, prompt, 10, temperature=2.0, top_k=1, seed=3)) == greedy
    assert list(generate.generate_ids(model, prompt, 10, temperature=2.0, top_p=1e-6, seed=3)) == greedy


@given(st.integers(0, 2**32), st.integers(0, 12), st.floats(0.01, 1), st.floats(0.05, 5))
@settings(deadline=None)
def test_sampling_keeps_to_the_tokens_that_are_left(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(seed))
    drawn = generate.sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(seed))
    order = logits.argsort(descending=True).tolist()
    probabilities = (logits / temperature).softmax(-1)
    if top_k:
        assert drawn in order[:top_k]
    likelier = sum(p for p in probabilities.tolist() if p > probabilities[drawn])
    assert top_k or likelier < top_p + 1e-6


def test_the_unknown_token_is_never_written(model: Decoder) -> None:
    with torch.no_grad():
        model.head.bias[VOCAB.unk_id] += 100
    try:
        text = generate.generate_text(model, VOCAB, "the", max_length=30, seed=0)
    finally:
        with torch.no_grad():
            model.head.bias[VOCAB.unk_id] -= 100
    assert "<unk>" not in text


def test_the_model_is_left_in_its_mode(model: Decoder) -> None:
    for mode in (True, False):
        model.train(mode)
        list(generate.generate_ids(model, [1], 3))
        assert model.training is mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or 0.001 to 1000: got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1e-40}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1: got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"max_length": 0}, "max_length must be at least 1: got 0"),
        ({"seed": -5}, "seed must be from 0"),
    ],
)
def test_a_parameter_out_of_range_is_refused(model: Decoder, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate.generate_text(model, VOCAB, "the cat", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "   ", "qwxz vvvv"])
def test_a_seed_text_without_a_known_word_is_refused(model: Decoder, text: str) -> None:
    with pytest.raises(UserError, match="the seed text must hold"):
        generate.generate_text(model, VOCAB, text)
