import math
from collections.abc import Callable

import pytest
import torch

from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus, Windows
from lm.evaluate import Evaluation, evaluate, nats


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
        expected += nats(model(inputs)[0], targets).item()
        count += targets.numel()
    result = evaluate(model, windows)
    assert result.tokens == count == 85
    assert result.nats == pytest.approx(expected, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    model = new_state(toy_config).model
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    result = evaluate(model, toy_text.windows("validation", 8))
    assert result.perplexity == pytest.approx(len(toy_text.vocab), rel=1e-5)


def test_evaluation_leaves_training_mode_as_it_was(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    model = new_state(toy_config).model.train()
    first, again = (evaluate(model, toy_text.windows("validation", 8)) for _ in range(2))
    assert first == again
    assert model.training


def test_perplexity_is_the_exponent_of_nats_over_tokens() -> None:
    assert Evaluation(nats=20.0, tokens=10).perplexity == pytest.approx(math.exp(2))
    assert Evaluation(nats=1e6, tokens=1).perplexity == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_chunked_cross_entropy_equals_torchs_own(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm.evaluate._LOGITS_A_CHUNK", rows * 50)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 3, 50, generator=generator)).to(dtype)
    targets = torch.randint(0, 50, (4, 3), generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    (expected / 12).backward()
    result = nats(ours, targets)
    (result / 12).backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
