from collections.abc import Callable

import numpy as np

from lm.attention import attention_map
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus


def test_a_map_has_the_models_own_weights_and_tokens(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    model = new_state(toy_config).model.train()
    ids = toy_text.vocab.encode("does the otter live in the river?")
    shown = attention_map(model, toy_text.vocab, ids)
    assert shown.tokens == ["does", "the", "otter", "live", "in", "the", "river", "?"]
    assert shown.weights_LHTS.shape == (2, 2, 8, 8)
    np.testing.assert_allclose(shown.weights_LHTS.sum(-1), 1, atol=1e-6)
    assert not np.triu(shown.weights_LHTS, 1).any()
    again = attention_map(model, toy_text.vocab, ids)
    np.testing.assert_array_equal(shown.weights_LHTS, again.weights_LHTS)
    assert model.training
