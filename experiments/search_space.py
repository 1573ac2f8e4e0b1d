"""What a study searches: a trial's suggestions as changes to a config. Knows nothing of Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Suggester(Protocol):
    """The part of `optuna.Trial` that is used."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Draw an integer."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""
        ...


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; whole numbers if both are."""

    low: float
    high: float
    log: bool = False

    def describe(self) -> str:
        """Short and stable: part of a study's name."""
        return f"{self.low:g}:{self.high:g}{':log' if self.log else ''}"


SPACE: dict[str, Range] = {
    "n_layers": Range(1, 8),
    "lr": Range(1e-5, 3e-3, log=True),
    "clip_norm": Range(0.05, 5.0, log=True),
}
"""Depth, learning rate and clipping: the three that the recipe leaves open."""


def suggest(trial: Suggester, space: Mapping[str, Range]) -> dict[str, int | float]:
    """One value for each name of `space`."""
    values: dict[str, int | float] = {}
    for name, r in space.items():
        if isinstance(r.low, int) and isinstance(r.high, int):
            values[name] = trial.suggest_int(name, r.low, r.high, log=r.log)
        else:
            values[name] = trial.suggest_float(name, r.low, r.high, log=r.log)
    return values
