import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lm.config import ModelConfig
from lm.loss import token_nats
from lm.model import Decoder, Dropout, Noise, rotary_angles, rotate, sinusoidal_positions

SHAPE = ModelConfig(d_model=32, n_layers=3, n_heads=4, d_ff=64, seq_len=12)
VOCAB = 50
VARIANTS = [
    SHAPE,
    replace(SHAPE, norm="pre", activation="gelu"),
    replace(SHAPE, positions="learned"),
    replace(SHAPE, tie_embeddings=True),
    replace(SHAPE, positions="rotary"),
]


@pytest.fixture(params=VARIANTS, ids=["recipe", "pre-gelu", "learned", "tied", "rotary"])
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    return Decoder(request.param, VOCAB).eval()


def ids(batch: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("return_attention", [False, True])
def test_future_tokens_do_not_change_earlier_logits(model: Decoder, return_attention: bool) -> None:
    before = ids()
    for t in range(before.shape[1] - 1):
        after = before.clone()
        after[:, t + 1 :] = (after[:, t + 1 :] + 7) % VOCAB
        old, new = model(before, return_attention)[0], model(after, return_attention)[0]
        assert torch.equal(old[:, : t + 1], new[:, : t + 1])
        assert not torch.equal(old[:, t + 1 :], new[:, t + 1 :])


def test_gradients_do_not_reach_later_inputs(model: Decoder) -> None:
    embedded: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.embedding.register_forward_hook(keep)
    model(ids())[0][:, 5].sum().backward()
    assert embedded[0].grad is not None
    assert torch.count_nonzero(embedded[0].grad[:, 6:]) == 0
    assert torch.count_nonzero(embedded[0].grad[:, :6]) > 0


def test_attention_equals_torchs_own(model: Decoder) -> None:
    logits, none = model(ids())
    explicit, weights = model(ids(), return_attention=True)
    assert none == []
    assert len(weights) == SHAPE.n_layers
    assert torch.equal(logits, explicit)
    layer = model.layers[0].attention
    x = torch.randn(3, 12, SHAPE.d_model)
    q, k, v = layer.qkv(x).view(3, 12, 3, SHAPE.n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    theirs = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x)[0], layer.out(theirs.transpose(1, 2).reshape(3, 12, -1)), atol=1e-5, rtol=1e-5)


def test_attention_rows_sum_to_one_and_the_future_is_exactly_zero(model: Decoder) -> None:
    _, weights = model(ids(), return_attention=True)
    for layer in weights:
        assert layer.shape == (3, SHAPE.n_heads, 12, 12)
        torch.testing.assert_close(layer.sum(-1), torch.ones(3, SHAPE.n_heads, 12))
        assert torch.count_nonzero(layer.triu(1)) == 0


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_decoder_equals_torch_encoder_with_a_causal_mask(norm: str, activation: str) -> None:
    shape = replace(SHAPE, norm=norm, activation=activation)
    model = Decoder(shape, VOCAB).eval()
    layer = nn.TransformerEncoderLayer(
        shape.d_model,
        shape.n_heads,
        shape.d_ff,
        shape.dropout,
        activation,
        batch_first=True,
        norm_first=norm == "pre",
    )
    final = nn.LayerNorm(shape.d_model) if norm == "pre" else None
    theirs = nn.TransformerEncoder(layer, shape.n_layers, final, enable_nested_tensor=False).eval()
    names = {
        "self_attn.in_proj_weight": "attention.qkv.weight", "self_attn.in_proj_bias": "attention.qkv.bias",
        "self_attn.out_proj.weight": "attention.out.weight", "self_attn.out_proj.bias": "attention.out.bias",
        "linear1.weight": "up.weight", "linear1.bias": "up.bias",
        "linear2.weight": "down.weight", "linear2.bias": "down.bias",
        "norm1.weight": "norm_attention.weight", "norm1.bias": "norm_attention.bias",
        "norm2.weight": "norm_feed_forward.weight", "norm2.bias": "norm_feed_forward.bias",
    }  # fmt: skip
    own = model.state_dict()
    copied = {f"layers.{i}.{a}": own[f"layers.{i}.{b}"] for i in range(shape.n_layers) for a, b in names.items()}
    if norm == "pre":
        copied |= {"norm.weight": own["final_norm.weight"], "norm.bias": own["final_norm.bias"]}
    theirs.load_state_dict(copied)
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    x = model.embedding(ids()) + sinusoidal_positions(12, shape.d_model)
    expected = model.head(theirs(x, mask=mask, is_causal=True))
    torch.testing.assert_close(model(ids())[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"norm": "pre"}, {"tie_embeddings": True}], ids=["recipe", "pre", "tied"])
def test_first_loss_is_near_the_logarithm_of_the_vocabulary(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(n_layers=2, **changes), 5000).eval()  # type: ignore[arg-type]
    x = torch.randint(0, 5000, (8, 33))
    loss = token_nats(model(x[:, :-1])[0], x[:, 1:]).mean().item()
    assert abs(loss - math.log(5000)) < 0.7


def test_cached_steps_equal_one_pass(model: Decoder) -> None:
    x = ids()
    whole, _ = model(x)
    cache = model.new_cache(3)
    parts = [model(x[:, a:b], cache=cache)[0] for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_more_tokens_than_the_window_are_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="the window must hold all tokens: got 13, seq_len=12"):
        model(ids(1, 13))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.99, 0.999])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    dropped = Dropout(p).train()(x, Noise(0), 3)
    zeros = (dropped == 0).double().mean().item()
    assert abs(zeros - p) < 0.001
    assert abs(dropped.mean().item() - 1) < 0.002 / (1 - p)
    dropped.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, dropped.detach())
    assert torch.equal(Dropout(p).eval()(x, Noise(0), 3), x)


def test_a_window_is_dropped_alike_wherever_it_is_computed() -> None:
    dropout, x = Dropout(0.3).train(), torch.ones(6, 5, 13)
    whole = dropout(x, Noise(7), 2)
    parts = [dropout(x[i : i + 2], Noise(7, i), 2) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(dropout(x[:2], Noise(7, 2), 2), whole[:2])


def test_draws_are_independent_of_those_beside_them() -> None:
    """Bytes are equally likely; what is dropped says nothing of the next draw, the next site, step, window or byte."""
    n = 2**18
    drawn = Noise(5).draws(3, 0, n).view(torch.uint8).view(n, 8)
    counts = torch.stack([torch.bincount(drawn[:, i].int(), minlength=256) for i in range(8)])
    chi_squared = ((counts - n / 256) ** 2 / (n / 256)).sum(1)
    assert chi_squared.min() > 170 and chi_squared.max() < 350  # 255 on average, standard deviation 22.6
    dropped = (drawn < 26).double() - 26 / 256
    others = {
        "site": Noise(5).draws(4, 0, n), "step": Noise(6).draws(3, 0, n), "next": Noise(5).draws(3, 1, n),
        "window": Noise(5).draws(3, 64, n), "channel": Noise(5).draws(-4, 0, n),
    }  # fmt: skip
    for name, other in others.items():
        beside = (other.view(torch.uint8).view(n, 8) < 26).double() - 26 / 256
        correlation = (dropped[:, :, None] * beside[:, None, :]).mean(0) / dropped.var()
        assert correlation.abs().max() < 6 / n**0.5, name


def test_a_tied_head_shares_the_matrix() -> None:
    untied, tied = Decoder(SHAPE, VOCAB), Decoder(replace(SHAPE, tie_embeddings=True), VOCAB)
    assert untied.n_parameters() - tied.n_parameters() == VOCAB * SHAPE.d_model


def test_the_tiny_preset_has_under_two_million_weights() -> None:
    from lm.config import PRESETS, Config

    assert Decoder(Config.from_flat(PRESETS["tiny"]).model, 18_707).n_parameters() < 2_000_000


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    angles = rotary_angles(20, 8)
    q, k = torch.randn(8), torch.randn(8)

    def score(query_at: int, key_at: int) -> float:
        turned_q, turned_k = (rotate(x[None], angles[:, at : at + 1])[0] for x, at in ((q, query_at), (k, key_at)))
        return float(turned_q @ turned_k)

    assert score(7, 4) == pytest.approx(score(19, 16), abs=1e-5)
    assert score(7, 4) != pytest.approx(score(7, 5), abs=1e-3)


def test_the_last_positions_can_be_asked_for_alone(model: Decoder) -> None:
    torch.testing.assert_close(model(ids(), last=2)[0], model(ids())[0][:, -2:])
