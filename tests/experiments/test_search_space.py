from experiments.search_space import SPACE, suggest


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
