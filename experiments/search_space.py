"""What a study searches: a trial's suggestions as changes to a config. Knows nothing of Optuna."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Protocol

from lm.config import PLACEMENT, Config, DataConfig, Scalar, names
from lm.errors import UserError


class Suggester(Protocol):
    """The part of `optuna.Trial` that is used."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Draw an integer."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Draw a number."""
        ...

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Draw one of some values."""
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

    def has(self, value: Scalar) -> bool:
        """Whether a value can be drawn."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def ends(self) -> tuple[Scalar, ...]:
        """The values to check a config with."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Scalar, ...]

    def describe(self) -> str:
        """Short and stable: part of a study's name."""
        return ",".join(str(value) for value in self.values)

    def has(self, value: Scalar) -> bool:
        """Whether a value can be drawn."""
        return value in self.values

    def ends(self) -> tuple[Scalar, ...]:
        """The values to check a config with."""
        return self.values


Space = Mapping[str, Range | Choice]

PATIENCE = 2
"""Trials stop after so many epochs without a better validation loss; a trial's value is its best epoch's."""
SPACE: dict[str, Range | Choice] = {
    "n_layers": Range(1, 8),
    "lr": Range(1e-5, 3e-3, log=True),
    "clip_norm": Range(0.05, 5.0, log=True),
}
"""Depth, learning rate and clipping: the three that the recipe leaves open."""

_FIXED = {
    *(f.name for f in fields(DataConfig)),
    "epochs",
    "patience",
    "seed",
    "precision",
    "steps_per_epoch",
    *PLACEMENT,
}
"""What all trials of a study share, so that their perplexities compare and their cost does."""


def suggest(trial: Suggester, space: Space) -> dict[str, Scalar]:
    """One value for each name of `space`."""
    values: dict[str, Scalar] = {}
    for name, r in space.items():
        if isinstance(r, Choice):
            values[name] = trial.suggest_categorical(name, r.values)
        elif isinstance(r.low, int) and isinstance(r.high, int):
            values[name] = trial.suggest_int(name, r.low, r.high, log=r.log)
        else:
            values[name] = trial.suggest_float(name, r.low, r.high, log=r.log)
    return values


def short(value: object) -> str:
    """A drawn value as tables and lines show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(point: Mapping[str, object]) -> str:
    """What a trial drew, in one line."""
    return "  ".join(f"{name}={short(value)}" for name, value in point.items())


def parse(specs: Sequence[str], config: Config) -> dict[str, Range | Choice]:
    """A space as a person writes it: `lr=1e-5:1e-2:log`, `n_heads=4,8,16`, `dropout=0:0.3`.

    Raises:
        UserError: no such field, one that all trials share, or a value against the field's kind or rule.
    """
    space: dict[str, Range | Choice] = {}
    for spec in specs:
        name, _, text = spec.partition("=")
        name = name.strip().replace("-", "_")
        searchable = [n for n in names() if n not in _FIXED]
        if name not in searchable:
            near = get_close_matches(name, searchable, n=1)
            what = "is the same for all trials" if name in _FIXED else "is no field of the config"
            raise UserError(
                f"a search must name a field that trials may differ in: got {name!r}, which {what}. "
                f"Try {near[0] if near else ', '.join(searchable)}."
            )
        space[name] = _parse_one(name, text.strip(), type(config.flat()[name]))
        for value in space[name].ends():
            _check_alone(name, value)
    return space


def _check_alone(name: str, value: Scalar) -> None:
    """Raise UserError if a value breaks its own field's rule; rules between fields make single trials fail."""
    try:
        Config().override({name: value})
    except UserError as e:
        named = re.search(r": got (\w+)=", str(e))
        if named is None or named[1] == name:
            raise UserError(f"a search must hold values that its field allows: {e}") from e


def _parse_one(name: str, text: str, kind: type) -> Range | Choice:
    example = {
        int: f"{name}=2:8 or {name}=2,4,8",
        float: f"{name}=1e-4:1e-2:log or {name}=0.1,0.2",
        bool: f"{name}=true,false",
    }.get(kind, f"{name}=this,that")
    wrong = UserError(
        f"a search must be NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B: got {name}={text}. Try {example}."
    )
    try:
        if ":" in text and kind in (int, float):
            low, high, *log = text.split(":")
            numbers = Range(kind(low), kind(high), log=bool(log))
            if log not in ([], ["log"]) or not numbers.low < numbers.high or not math.isfinite(numbers.high):
                raise wrong
            if log and numbers.low <= 0:
                raise wrong
            return numbers
        values = tuple(_value(part.strip(), kind) for part in text.split(","))
    except ValueError as e:
        raise wrong from e
    if len(values) < 2 or len(set(values)) < len(values):
        raise wrong
    return Choice(values)


def _value(text: str, kind: type) -> Scalar:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _no(text)
    value: Scalar = kind(text)
    return value if text else _no(text)


def _no(text: str) -> Scalar:
    raise ValueError(text)
