import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus, Windows
from lm.evaluate import Evaluation, Scores, bits_per_byte, evaluate
from lm.loss import token_nats


def test_the_short_last_batch_is_weighed_by_its_tokens(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    ids = toy_text.ids["validation"][:86]  # 10 windows of 8 and one of 5
    windows, model = Windows(ids, 8), new_state(toy_config).model.eval()
    expected, count = 0.0, 0
    for start in range(0, 85, 8):
        inputs = torch.tensor(ids[start : start + 8].astype("int64"))[None]
        targets = torch.tensor(ids[start + 1 : start + 9].astype("int64"))[None]
        inputs = inputs[:, : targets.shape[1]]
        expected += token_nats(model(inputs)[0], targets).sum().item()
        count += targets.numel()
    result = evaluate(model, windows).total
    assert result.tokens == count == 85
    assert result.nats == pytest.approx(expected, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    model = new_state(toy_config).model
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    result = evaluate(model, toy_text.windows("validation", 8)).total
    assert result.perplexity == pytest.approx(len(toy_text.vocab), rel=1e-5)


def test_evaluation_leaves_training_mode_as_it_was(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    model = new_state(toy_config).model.train()
    first, again = (evaluate(model, toy_text.windows("validation", 8)) for _ in range(2))
    assert (first.nats_N == again.nats_N).all()
    assert model.training


def test_perplexity_is_the_exponent_of_nats_over_tokens() -> None:
    assert Evaluation(nats=20.0, tokens=10).perplexity == pytest.approx(math.exp(2))
    assert Evaluation(nats=1e6, tokens=1).perplexity == math.inf


@pytest.mark.parametrize("n_tokens", [5, 9, 30, 86])
def test_sliding_gives_each_target_all_the_context_that_the_model_takes(
    n_tokens: int, toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    ids, model = toy_text.ids["validation"][:n_tokens], new_state(toy_config).model.eval()
    expected: list[float] = []
    for t in range(1, n_tokens):
        context = torch.tensor(ids[max(0, t - 8) : t].astype("int64"))[None]
        expected.append(token_nats(model(context)[0][:, -1:], torch.tensor([[int(ids[t])]])).item())
    result = evaluate(model, Windows(ids, 8), context="sliding")
    assert result.nats_N == pytest.approx(expected, rel=1e-5)


def test_a_long_window_slides_by_a_thirty_second_of_itself_and_misses_no_target() -> None:
    windows = Windows(np.arange(1000, dtype=np.uint16), 128)
    batches = list(windows.sliding(7))
    assert [int(t) for _, y in batches for t in y.flatten()] == list(range(1, 1000))
    assert all((y == x[:, -y.shape[1] :] + 1).all() for x, y in batches)
    assert all(x.shape[1] == 128 and y.shape[1] <= 4 for x, y in batches[1:])


def test_part_of_the_targets_can_be_summed_and_none_is_no_number() -> None:
    scores = Scores(np.array([1.0, 2.0, 4.0], np.float32))
    assert scores.where(np.array([True, False, True])) == Evaluation(5.0, 2)
    assert scores.where(np.zeros(3, bool)) is None


def test_bits_per_byte_pays_for_the_first_token_and_for_what_tokens_do_not_tell() -> None:
    scores = Scores(np.full(9, math.log(2), np.float32))
    assert bits_per_byte(scores, vocab_size=4, written_nats=0.0, n_bytes=11) == pytest.approx(1.0)
    assert bits_per_byte(scores, vocab_size=4, written_nats=11 * math.log(2), n_bytes=11) == pytest.approx(2.0)
