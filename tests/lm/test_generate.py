import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import generate
from lm.config import ModelConfig
from lm.errors import DivergedError, UserError
from lm.generate import Prompt, Sampling
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


def asked(prompts: list[list[int]], n: int, seed: int | None = None, **sampling: float) -> list[Prompt]:
    return [Prompt(ids, n, Sampling(**sampling), seed) for ids in prompts]  # type: ignore[arg-type]


def continued(model: Decoder, prompts: list[list[int]], n: int, **sampling: float) -> list[list[int]]:
    texts = [list(prompt) for prompt in prompts]
    for token in generate.generate_ids(model, asked(prompts, n, **sampling)):
        texts[token.text].append(token.id)
    return texts


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_of_different_lengths_go_on_as_each_would_alone(model: Decoder, temperature: float) -> None:
    prompts = [VOCAB.encode(text) for text in ("the cat sat on", "a", "the house and slept . a dog ran to the", "dog")]
    together = continued(model, prompts, 10, temperature=temperature, seed=3)
    assert together == [continued(model, [prompt], 10, temperature=temperature, seed=3)[0] for prompt in prompts]
    assert [len(text) - len(prompt) for text, prompt in zip(together, prompts, strict=True)] == [10] * 4


def test_each_token_is_drawn_as_often_as_it_is_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]])
    n = 20_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = generate.sample(logits.expand(n, 5), Sampling(1.0), uniform)
    torch.testing.assert_close(drawn.bincount(minlength=5) / n, logits[0].softmax(0), atol=0.01, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert generate.sample(logits.expand(2, 5), Sampling(1.0), ends).tolist() == [0, 4]


def test_a_token_within_the_window_costs_one_position(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    honest = Decoder.hidden

    def hidden(self: Decoder, ids: torch.Tensor, *args: object) -> object:
        seen.append(ids.shape[1])
        return honest(self, ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "hidden", hidden)
    list(generate.generate_ids(model, asked([[1, 2, 3]], 8)))
    assert seen == [3, 1, 1, 1, 1, 1, 8, 8]


def test_greedy_with_the_cache_equals_greedy_without_also_past_the_window(model: Decoder) -> None:
    prompt = VOCAB.encode("the cat sat")
    made = continued(model, [prompt], 20, temperature=0)
    assert made == [uncached(model, prompt, 20)]


def test_equal_seeds_give_equal_text(model: Decoder) -> None:
    first, same, other = (
        generate.generate_text(model, VOCAB, "the cat", max_length=12, temperature=1.5, seed=s) for s in (1, 1, 2)
    )
    assert first == same != other
    assert first.startswith("the cat")


def test_only_the_likeliest_token_is_left_by_top_k_one_and_by_a_small_top_p(model: Decoder) -> None:
    prompt = VOCAB.encode("a dog")
    greedy = continued(model, [prompt], 10, temperature=0)
    assert continued(model, [prompt], 10, temperature=2.0, top_k=1, seed=3) == greedy
    assert continued(model, [prompt], 10, temperature=2.0, top_p=1e-6, seed=3) == greedy


@given(st.integers(0, 2**32), st.integers(0, 12), st.floats(0.01, 1), st.floats(0.05, 5))
@settings(deadline=None)
def test_sampling_keeps_to_the_tokens_that_are_left(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(10, generator=torch.Generator().manual_seed(seed))
    uniform = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    drawn = int(generate.sample(logits[None], Sampling(temperature, top_k, top_p), uniform))
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
        list(generate.generate_ids(model, asked([[1]], 3)))
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


def test_a_copy_for_generation_keeps_its_matrices_in_bf16_and_says_nearly_the_same(model: Decoder) -> None:
    copied = generate.for_generation(model, torch.bfloat16)
    assert copied.head.weight.dtype == copied.layers[0].up.weight.dtype == torch.bfloat16
    assert copied.embedding.weight.dtype == model.head.weight.dtype == torch.float32
    prompts = [VOCAB.encode("the cat sat"), VOCAB.encode("a dog")]
    logits, _ = generate.next_token_logits(model, [prompts[0]], None)
    rounded, cache = generate.next_token_logits(copied, [prompts[0]], None)
    torch.testing.assert_close(rounded, logits, atol=0.05, rtol=0)
    assert cache is not None
    assert cache.keys[0].dtype == torch.float32
    exact = generate.for_generation(model, torch.float32)
    assert continued(exact, prompts, 9, seed=1) == continued(model, prompts, 9, seed=1)


def test_a_text_that_has_its_tokens_costs_no_more(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    honest = Decoder.hidden

    def hidden(self: Decoder, ids: torch.Tensor, *args: object) -> object:
        seen.append((ids.shape[0], ids.shape[1]))
        return honest(self, ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "hidden", hidden)
    list(generate.generate_ids(model, asked([[1], [2], [1, 2, 3, 4, 5, 6]], 2)))
    assert seen == [(3, 1), (3, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_edges_of_generation(model: Decoder) -> None:
    assert list(generate.generate_ids(model, [])) == []
    assert generate.generate_texts(model, VOCAB, []) == []
    ties = torch.zeros(200, 10)
    drawn = generate.sample(ties, Sampling(1.0, top_k=2), torch.linspace(0, 0.999, 200, dtype=torch.float64))
    assert len(drawn.unique()) == 2
    with pytest.raises(DivergedError, match="a model must give finite logits: got nan"):
        generate.sample(torch.full((1, 4), torch.nan), Sampling(), torch.zeros(1, dtype=torch.float64))


def test_min_p_keeps_what_is_likely_enough_and_penalty_lowers_what_stands_there(model: Decoder) -> None:
    logits = torch.tensor([[3.0, 2.9, 0.0, -5.0]]).expand(200, 4)
    uniform = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    assert generate.sample(logits, Sampling(1.0, min_p=0.5), uniform).unique().tolist() == [0, 1]
    prompt = VOCAB.encode("the cat")
    free = continued(model, [prompt], 12, temperature=0)[0]
    penalised = continued(model, [prompt], 12, temperature=0, repetition_penalty=10.0)[0]
    assert len(set(penalised)) > len(set(free))


def test_log_probabilities_are_the_models_own(model: Decoder) -> None:
    prompt = VOCAB.encode("the cat sat")
    tokens = list(generate.generate_ids(model, asked([prompt], 3, temperature=0.3, top_k=3, seed=0)))
    ids = list(prompt)
    for token in tokens:
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)[token.id]
        assert token.log_p == pytest.approx(float(expected), abs=1e-5)
        ids.append(token.id)
    whole = generate.perplexity(model, ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0][0]
    assert whole == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).exp()), rel=1e-5
    )
    assert generate.perplexity(model, [1]) is None


def test_a_text_that_was_ended_gets_no_more(model: Decoder) -> None:
    ended: set[int] = set()
    drawn = [0, 0]
    for token in generate.generate_ids(model, asked([[1], [2]], 6), ended=ended):
        drawn[token.text] += 1
        if drawn[0] == 2:
            ended.add(0)
    assert drawn == [2, 6]
