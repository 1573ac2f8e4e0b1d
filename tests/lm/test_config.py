import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import PRESETS, Config, names, refuse_unknown
from lm.errors import UserError


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n_layers": st.integers(1, 64),
            "n_heads": st.sampled_from([1, 2, 4, 8, 16]),
            "lr": st.floats(1e-9, 10),
            "clip_norm": st.floats(1e-3, 100),
            "dropout": st.floats(0, 0.99),
            "tie_embeddings": st.booleans(),
            "tokenizer": st.sampled_from(["word", "bpe"]),
            "corpus": st.text(min_size=1),
        },
    )
)
def test_flat_and_from_flat_are_inverse(changes: dict[str, object]) -> None:
    config = Config.from_flat(changes)
    assert Config.from_flat(config.flat()) == config
    assert Config().override(changes) == config


def test_defaults_are_the_reference_recipe() -> None:
    flat = Config().flat()
    expected = {
        "d_model": 512, "n_layers": 4, "n_heads": 8, "d_ff": 2048, "seq_len": 32, "lr": 1e-4, "clip_norm": 0.5,
        "epochs": 10, "batch_size": 32, "dropout": 0.1, "activation": "relu", "norm": "post",
        "positions": "sinusoidal", "tie_embeddings": False, "tokenizer": "word", "min_count": 2,
    }  # fmt: skip
    assert {name: flat[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 38}, "n_heads must divide d_model: got d_model=512, n_heads=38. Try --n-heads 8."),
        ({"lr": 0.0}, "lr must be a number above 0: got lr=0.0. Try --lr 0.0001."),
        ({"lr": float("nan")}, "lr must be a number above 0: got lr=nan. Try --lr 0.0001."),
        ({"clip_norm": -1.0}, "clip_norm must be a number above 0: got clip_norm=-1.0. Try --clip-norm 0.5."),
        ({"seed": 5_000_000_000}, "seed must be below 2**31: got 5000000000. Try --seed 0."),
        ({"split_seed": -1}, "split_seed must not be negative: got split_seed=-1."),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1: got dropout=1.0. Try --dropout 0.1."),
        (
            {"activation": "swish"},
            "activation must be one of relu, gelu: got 'swish'. Try --activation relu.",
        ),
        ({"epochs": 2.5}, "epochs must be int: got 2.5. Try --epochs 10."),
        ({"n_layer": 3}, "config has no field of that name: got 'n_layer'. Try n_layers."),
        (
            {"validation_fraction": 0.6, "test_fraction": 0.5},
            "validation_fraction and test_fraction must leave",
        ),
        ({"d_model": 15, "n_heads": 3}, "sinusoidal positions need an even d_model: got d_model=15."),
    ],
)
def test_a_value_against_its_rule_is_refused_with_rule_value_and_remedy(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        Config.from_flat(changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_every_preset_is_a_config() -> None:
    for changes in PRESETS.values():
        Config.from_flat(changes)


def test_names_are_unique_over_the_sections() -> None:
    assert len(set(names())) == len(names()) == len(Config().flat())
    refuse_unknown(names())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_params_as_text_give_the_config_back(preset: str) -> None:
    config = Config.from_flat({**PRESETS[preset], "lr": 0.1 + 0.2})
    assert Config.from_text({**{k: str(v) for k, v in config.flat().items()}, "vocab_size": "9"}) == config
    with pytest.raises(UserError, match="a logged config must be as it was written: got .*'much'"):
        Config.from_text({"lr": "much"})
