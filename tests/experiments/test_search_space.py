import pytest

from experiments.search_space import SPACE, Choice, Range, parse, suggest
from lm.config import Config
from lm.errors import UserError


class Lowest:
    """A trial that suggests the lower end."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return low

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert log
        return low


def test_the_space_is_the_documented_one() -> None:
    described = {name: r.describe() for name, r in SPACE.items()}
    assert described == {"n_layers": "1:8", "lr": "1e-05:0.003:log", "clip_norm": "0.05:5:log"}


def test_suggestions_have_the_names_and_kinds_of_config_fields() -> None:
    assert suggest(Lowest(), SPACE) == {"n_layers": 1, "lr": 1e-5, "clip_norm": 0.05}


CONFIG = Config.from_flat({})


def test_a_space_as_a_person_writes_it() -> None:
    space = parse(["lr=1e-4:1e-2:log", "n_heads=4,8,16", "dropout=0:0.3", "n-layers=2:8", "norm=pre,post"], CONFIG)
    assert space == {
        "lr": Range(1e-4, 1e-2, log=True),
        "n_heads": Choice((4, 8, 16)),
        "dropout": Range(0.0, 0.3),
        "n_layers": Range(2, 8),
        "norm": Choice(("pre", "post")),
    }
    assert parse(["tie_embeddings=true,false"], CONFIG) == {"tie_embeddings": Choice((True, False))}
    assert space["n_heads"].has(8)
    assert not space["n_heads"].has(7)
    assert not space["norm"].has("other")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lrr=1:2", "got 'lrr', which is no field of the config. Try lr."),
        ("epochs=1:9", "got 'epochs', which is the same for all trials"),
        ("corpus=a,b", "got 'corpus', which is the same for all trials"),
        ("lr=1e-2:1e-4", "got lr=1e-2:1e-4. Try lr=1e-4:1e-2:log or lr=0.1,0.2."),
        ("lr=0:1:log", "got lr=0:1:log"),
        ("lr=1e-4:inf", "got lr=1e-4:inf"),
        ("lr=1e-4:1e-2:linear", "got lr=1e-4:1e-2:linear"),
        ("n_layers=1.5:3", "got n_layers=1.5:3. Try n_layers=2:8 or n_layers=2,4,8."),
        ("n_layers=4", "got n_layers=4."),
        ("n_layers", "got n_layers=."),
        ("n_layers=2,2", "got n_layers=2,2."),
        ("tie_embeddings=yes,no", "got tie_embeddings=yes,no. Try tie_embeddings=true,false."),
        ("lr=-1:1", "a search must hold values that its field allows: lr must be a number above 0"),
        ("norm=pre,past", "a search must hold values that its field allows: norm must be"),
    ],
)
def test_a_space_that_cannot_be_searched(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([spec], CONFIG)
    assert message in str(caught.value)
