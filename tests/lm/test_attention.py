import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lm import attention
from lm.attention import attention_map
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus

T = 8
UNIFORM = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
SELF = np.eye(T)
PREVIOUS = np.eye(T, k=-1) + np.diag([1.0] + [0.0] * (T - 1))
FIRST = np.eye(T)[:, :1] * 0 + np.eye(T)[0]


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


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (
            UNIFORM,
            {"entropy_share": 1, "self": np.mean(1 / np.arange(2, T + 1)), "distance": np.mean(np.arange(1, T) / 2)},
        ),
        (SELF, {"entropy": 0, "entropy_share": 0, "distance": 0, "self": 1, "previous": 0, "first": 0}),
        (PREVIOUS, {"entropy": 0, "distance": 1, "self": 0, "previous": 1, "first": 1 / (T - 1)}),
        (FIRST, {"entropy": 0, "distance": np.mean(np.arange(1, T)), "self": 0, "previous": 1 / (T - 1), "first": 1}),
        ((SELF + PREVIOUS) / 2, {"entropy": 1, "distance": 0.5, "self": 0.5, "previous": 0.5}),
    ],
)
def test_measures_of_patterns_made_by_hand(pattern: np.ndarray, expected: dict[str, float]) -> None:
    found = attention.measures(np.stack([[pattern, SELF], [SELF, pattern]]))
    for name, value in expected.items():
        assert found[name].shape == (2, 2)
        np.testing.assert_allclose(found[name][[0, 1], [0, 1]], value, err_msg=name)
        np.testing.assert_allclose(found[name][[0, 1], [1, 0]], attention.measures(SELF)[name])


def test_the_entropy_of_a_uniform_row_is_the_log_of_its_length() -> None:
    assert attention.measures(UNIFORM)["entropy"] == pytest.approx(np.mean([math.log2(n) for n in range(2, T + 1)]))


def test_divergence_is_0_for_equal_1_for_disjoint_and_between_for_others() -> None:
    np.testing.assert_allclose(attention.divergence(np.stack([UNIFORM, SELF, PREVIOUS]), SELF)[[1, 2]], [0, 1])
    assert 0 < attention.divergence(UNIFORM, SELF) < 1
    assert attention.divergence(UNIFORM, SELF) == pytest.approx(attention.divergence(SELF, UNIFORM))
    one, other = np.array([[1, 0], [0.5, 0.5]]), np.array([[1, 0], [0, 1.0]])
    mixed = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert attention.divergence(one, other) == pytest.approx(mixed - 0.5)


def test_heads_that_look_alike_agree() -> None:
    found = attention.agreement(np.stack([[SELF, SELF, PREVIOUS], [PREVIOUS, PREVIOUS, PREVIOUS]]))
    np.testing.assert_allclose(found, [[0.5, 0.5, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("changes", "epoch"),
    [
        ([], None),
        ([0.5], None),
        ([0.001], 0),  # the untrained network's, which did not change
        ([0.5, 0.2, 0.1, 0.009], 3),
        ([0.5, 0.2, 0.1], None),
        ([0.5, 0.2, 0.009], 2),
        ([0.5, 0.001, 0.2, 0.001, 0.002], 3),
        ([0.001, 0.002], 0),
    ],
)
def test_attention_has_settled_when_no_later_epoch_changes_it(changes: list[float], epoch: int | None) -> None:
    assert attention.settled(changes) == epoch


def test_kinds_of_heads_are_found_where_they_are(
    toy_config: Config, new_state: Callable[[Config], TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_state(toy_config).model

    def made(_model: object, ids_BT: torch.Tensor) -> np.ndarray:
        assert torch.equal(ids_BT[:, :4], ids_BT[:, 4:])
        assert (ids_BT > 0).all()
        assert all(len(set(row)) == 4 for row in ids_BT[:, :4].tolist())
        kinds = [np.eye(8, k=-1), np.eye(8, k=-4), np.eye(8, k=-3), UNIFORM]
        return np.broadcast_to(np.stack(kinds), (len(ids_BT), 1, 4, 8, 8))

    monkeypatch.setattr(attention, "_weights", made)
    found = attention.head_kinds(model, 50)
    np.testing.assert_allclose(found["previous_token"][0, :3], [1, 0, 0])
    np.testing.assert_allclose(found["duplicate_token"][0, :3], [0, 1, 0])
    np.testing.assert_allclose(found["induction"][0, :3], [0, 0, 1])
    np.testing.assert_allclose(found["induction"][0, 3], np.mean(1 / np.arange(5, 9)))


def test_kinds_need_a_window_of_six(toy_config: Config, new_state: Callable[[Config], TrainState]) -> None:
    assert attention.head_kinds(new_state(toy_config.override({"seq_len": 5})).model, 50) == {}
    found = attention.head_kinds(new_state(toy_config).model, 3)  # fewer words than a half
    assert {values.shape for values in found.values()} == {(2, 2)}
