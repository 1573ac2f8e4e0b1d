import pytest
import torch

from lm.config import ModelConfig, TrainConfig
from lm.model import Decoder
from lm.optim import build_optimizers, clip_and_step, lr_at


def test_without_decay_it_is_adam() -> None:
    shape = ModelConfig(d_model=8, n_layers=1, n_heads=2, d_ff=16, seq_len=4, dropout=0.0)
    torch.manual_seed(0)
    ours, theirs = Decoder(shape, 11), Decoder(shape, 11)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randint(0, 11, (2, 4))
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for model, optimizer in ((ours, build_optimizers(ours, TrainConfig(lr=1e-2))[0]), (theirs, adam)):
        for _ in range(5):
            optimizer.zero_grad()
            model(x)[0].logsumexp(-1).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])  # key biases move by rounding alone; logits do not see them


def test_only_matrices_decay() -> None:
    model = Decoder(ModelConfig(d_model=8, n_layers=1, n_heads=2, d_ff=16, seq_len=4), 11)
    matrices, vectors = build_optimizers(model, TrainConfig(weight_decay=0.1))[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_lr_rises_then_stays_or_falls_to_zero() -> None:
    constant = TrainConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(s, 100, constant) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = TrainConfig(lr=1.0, schedule="cosine")
    assert lr_at(0, 100, cosine) == 1.0
    assert lr_at(50, 100, cosine) == pytest.approx(0.5)
    assert lr_at(100, 100, cosine) == pytest.approx(0.0)


def test_muon_takes_the_layers_matrices_and_leaves_the_rest_to_adam() -> None:
    model = Decoder(ModelConfig(d_model=8, n_layers=2, n_heads=2, d_ff=16, seq_len=4), 11)
    adam, muon = build_optimizers(model, TrainConfig(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    parts = ("attention.qkv", "attention.out", "up", "down")
    assert taken == {f"layers.{i}.{part}.weight" for i in range(2) for part in parts}
    rest = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert rest | taken == set(names.values())
    assert not rest & taken


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_clipping_within_the_step_equals_clipping_before_it(optimizer: str, clip_norm: float) -> None:
    shape = ModelConfig(d_model=8, n_layers=2, n_heads=2, d_ff=16, seq_len=4, dropout=0.0)
    recipe = TrainConfig(optimizer=optimizer, lr=1e-2)
    torch.manual_seed(0)
    ours, theirs = Decoder(shape, 11), Decoder(shape, 11)
    theirs.load_state_dict(ours.state_dict())
    own, reference = build_optimizers(ours, recipe), build_optimizers(theirs, recipe)
    for _ in range(3):
        x = torch.randint(0, 11, (2, 4))
        for model in (ours, theirs):
            model(x)[0].logsumexp(-1).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        for o in reference:
            o.step()
            o.zero_grad()
        torch.testing.assert_close(clip_and_step(own, clip_norm), norm)
        assert all(p.grad is None for p in ours.parameters())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
