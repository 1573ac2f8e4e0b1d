"""Score sheets: what a model paid for every token of a split, and whether two models really differ.

Knows neither MLflow nor training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lm.errors import UserError

LEAST_QUESTIONS = 20
"""Fewer questions (as many of equal length as weigh the same, Kish 1965) give intervals that are too narrow."""

_DRAWS, _DRAWS_AT_ONCE = 10_000, 500
_COLUMNS = ("tokens", "bytes", "written_nats", "group", "copied", "shared")
_ABOUT = ("tokens_digest", "corpus_digest", "seed", "epoch", "first_nats")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sheet:
    """The nats of each target [targets] of a split, and its table of records (`lm.data.TokenizedCorpus.records`).

    `first_nats` is what the first token, which is no target, costs where bytes are counted (`lm.evaluate`).
    """

    nats: npt.NDArray[np.float32]
    records: dict[str, npt.NDArray[Any]]
    tokens_digest: str
    corpus_digest: str
    seed: int
    epoch: int
    first_nats: float

    def pack(self) -> bytes:
        """As one safetensors file; `Sheet.read` is the inverse."""
        about = {name: getattr(self, name) for name in _ABOUT}
        written = {**about, "sha256": _sha256(about, self.nats, self.records)}
        return save({"nats": self.nats, **self.records}, metadata={"about": json.dumps(written)})

    @classmethod
    def read(cls, path: Path) -> Sheet:
        """Read a file that `pack` made.

        Raises:
            UserError: it is none.
        """
        try:
            with safe_open(path, framework="numpy") as f:
                about = json.loads(f.metadata()["about"])
                digest = about.pop("sha256")
                records = {name: f.get_tensor(name) for name in _COLUMNS}
                sheet = cls(f.get_tensor("nats"), records, **{name: about[name] for name in _ABOUT})
            if _sha256(about, sheet.nats, records) != digest:
                raise ValueError("the digest is another")
            n_targets = max(0, int(records["tokens"].sum()) - 1)
            if sheet.nats.shape != (n_targets,) or len({column.shape for column in records.values()}) > 1:
                raise ValueError("lengths do not fit")
            if not np.isfinite(sheet.nats).all():
                raise ValueError("a score is not finite")
            return sheet
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"a score sheet must be as it was written: got {type(e).__name__} in {path.name}. Try training again."
            ) from e

    def per_record(self) -> Floats:
        """Nats [records] of each record's targets; the very first token is none."""
        ends = np.cumsum(self.records["tokens"]) - 1
        before = np.concatenate([[0.0], np.cumsum(self.nats, dtype=np.float64)])
        return np.diff(before[np.concatenate([[0], np.maximum(ends, 0)])])


def _sha256(about: dict[str, Any], nats: npt.NDArray[np.float32], records: dict[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(about).encode())
    for column in (nats, *(records[name] for name in _COLUMNS)):
        digest.update(f"{column.dtype} {column.shape}".encode() + np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Side:
    """One configuration: the score sheets of its runs, a seed each."""

    name: str
    sheets: Sequence[Sheet]

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs."""
        return [sheet.seed for sheet in self.sheets]


@dataclass(frozen=True)
class Difference:
    """How much less B pays than A, in nats a token (or a byte).

    The 95 % interval and the two-sided p are over resampled questions and, if both sides have several, over seeds.
    """

    unit: str
    a: list[float]
    b: list[float]
    less: float
    low: float
    high: float
    n_questions: int
    n_effective: float
    n_targets: int
    p: float
    has_seeds: bool

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes 0, over questions enough for it to be one."""
        return (self.low > 0 or self.high < 0) and self.n_effective >= LEAST_QUESTIONS

    @property
    def is_real(self) -> bool:
        """Whether the configurations differ: shown, by an interval that holds the spread of seeds too."""
        return self.is_shown and self.has_seeds


def compare(a: Side, b: Side, clean: bool = False) -> Difference:
    """Paired bootstrap (Koehn 2004) of the difference between two sides on one split.

    Tokens of one question stand and fall together, so whole questions are drawn. Where both sides have the same tokens
    the unit is a token; on one text with two vocabularies it is a byte, with written forms paid for. With several seeds
    a side's nats are their mean, and the spread of seeds widens the interval: that of the differences where both sides
    have the same seeds, of both sides otherwise (Welch 1947).

    Args:
        clean: count only records that have neither their answer nor a run of 13 words in train.

    Raises:
        UserError: the sides were measured on different text, or no clean record is left.
    """
    sheets = [*a.sheets, *b.sheets]
    if len({sheet.corpus_digest for sheet in sheets}) > 1:
        raise UserError(
            f"runs must be measured on the same text: got {a.name} and {b.name} on texts of different digests. "
            "Try two runs of one --corpus."
        )
    per_byte = len({sheet.tokens_digest for sheet in sheets}) > 1
    records = sheets[0].records
    kept = ~(records["copied"] | records["shared"]) if clean else np.ones(len(records["group"]), bool)
    kept = kept & (records["tokens"] > 0)
    if not kept.any():
        raise UserError("a comparison needs records: got no clean one. Try all records.")
    groups = np.unique(records["group"][kept], return_inverse=True)[1]

    def sums(values: npt.NDArray[Any]) -> Floats:
        return np.bincount(groups, values[kept].astype(np.float64)).astype(np.float64)

    def paid(sheet: Sheet) -> Floats:
        nats = sheet.per_record()
        if per_byte:
            nats += sheet.records["written_nats"]
            nats[0] += sheet.first_nats
        return sums(nats)

    targets = records["tokens"].copy()
    targets[0] -= 1
    weight_G = sums(records["bytes"] if per_byte else targets)
    paid_a, paid_b = ([paid(sheet) for sheet in side.sheets] for side in (a, b))
    less_G = np.mean(paid_a, axis=0) - np.mean(paid_b, axis=0)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([_draw(rng, less_G, weight_G) for _ in range(_DRAWS // _DRAWS_AT_ONCE)])
    mean_a, mean_b = ([float(p.sum() / weight_G.sum()) for p in side] for side in (paid_a, paid_b))
    has_seeds = min(len(mean_a), len(mean_b)) > 1
    if has_seeds:
        error, freedom = _spread_of_seeds(a, mean_a, b, mean_b)
        drawn += error * rng.standard_t(freedom, size=_DRAWS)
    low, high = (float(x) for x in np.quantile(drawn, [0.025, 0.975]))
    return Difference(
        unit="byte" if per_byte else "token",
        a=mean_a,
        b=mean_b,
        less=float(less_G.sum() / weight_G.sum()),
        low=low,
        high=high,
        n_questions=len(weight_G),
        n_effective=float(weight_G.sum() ** 2 / (weight_G**2).sum()),
        n_targets=int(sums(targets).sum()),
        p=float(min(1.0, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))),
        has_seeds=has_seeds,
    )


def _draw(rng: np.random.Generator, less_G: Floats, weight_G: Floats) -> Floats:
    n = len(weight_G)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS_AT_ONCE)
    return (counts @ less_G) / (counts @ weight_G)


def _spread_of_seeds(a: Side, mean_a: list[float], b: Side, mean_b: list[float]) -> tuple[float, float]:
    """Standard error of the difference of the sides' means, and its degrees of freedom."""
    if sorted(a.seeds) == sorted(b.seeds):
        by_seed_a, by_seed_b = (
            [m for _, m in sorted(zip(s.seeds, x, strict=True))] for s, x in ((a, mean_a), (b, mean_b))
        )
        differences = np.subtract(by_seed_a, by_seed_b)
        return float(differences.std(ddof=1) / math.sqrt(len(differences))), len(differences) - 1.0
    parts = [float(np.var(x, ddof=1)) / len(x) for x in (mean_a, mean_b)]
    weights = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (mean_a, mean_b), strict=True))
    return math.sqrt(sum(parts)), sum(parts) ** 2 / weights if weights else math.inf
