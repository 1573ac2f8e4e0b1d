import copy

import pytest
import torch
from torch import nn

from lm import loss
from lm.loss import mean_nats, token_nats

VOCAB, WIDTH = 50, 16


def head_and_batch() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCAB), torch.randn(4, 3, WIDTH), torch.randint(0, VOCAB, (4, 3))


def reference(
    head: nn.Linear, x: torch.Tensor, targets: torch.Tensor, factor: float, precision: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Loss and gradients as torch makes them."""
    head, x = copy.deepcopy(head), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        logits = head(x)
    total = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    (factor * total).backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    return total.detach(), x.grad, head.weight.grad, head.bias.grad


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("at_once", "a_chunk"), [(1, 1), (5, 2), (5, 64), (64, 5)])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_loss_and_gradients_equal_torchs_own(
    precision: torch.dtype, at_once: int, a_chunk: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", at_once * VOCAB)
    monkeypatch.setattr(loss, "_LOGITS_A_CHUNK", a_chunk * VOCAB)
    head, x, targets = head_and_batch()
    expected = reference(head, x, targets, factor, precision)
    x.requires_grad_()
    ours = mean_nats(head, x, targets, precision)
    (factor * ours).backward()
    tolerance = 1e-6 if precision == torch.float32 else 2e-2
    for mine, theirs in zip((ours.detach(), x.grad, head.weight.grad, head.bias.grad), expected, strict=True):
        assert mine is not None
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_target_that_the_model_rules_out_costs_what_it_costs() -> None:
    head, x, targets = head_and_batch()
    with torch.no_grad():
        head.bias[targets[0, 0]] -= 300.0
    expected = reference(head, x, targets, 1.0, torch.float32)[0]
    assert expected > 20
    torch.testing.assert_close(mean_nats(head, x, targets, torch.float32).detach(), expected)


def test_a_shared_matrix_collects_the_gradients_of_both_uses() -> None:
    embedding, head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
    head.weight = embedding.weight
    ids, targets = torch.randint(0, VOCAB, (2, 3)), torch.randint(0, VOCAB, (2, 3))
    mean_nats(head, embedding(ids), targets, torch.float32).backward()
    ours = embedding.weight.grad
    embedding.weight.grad = None
    nn.functional.cross_entropy(head(embedding(ids)).flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(ours, embedding.weight.grad)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_nats_of_each_target_sum_to_the_training_loss(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_LOGITS_A_CHUNK", rows * VOCAB)
    head, x, targets = head_and_batch()
    each = token_nats(head(x), targets)
    expected = nn.functional.cross_entropy(head(x).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(each, expected.view(4, 3))
    torch.testing.assert_close(each.mean(), mean_nats(head, x, targets, torch.float32))
