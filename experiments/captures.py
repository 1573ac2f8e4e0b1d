"""Attention over training: maps of the same texts, epoch by epoch, as files of a run and as arrays.

    from experiments.captures import load_attention
    history = load_attention("RUN")                # by name or id
    history.weights["validation 1"]                # [epochs, layers, heads, query, key]

A map is kept as the lower triangle of its weights in fp16, so that a weight is stored to within one part in 2,048 (or
3e-8 where it is below 6e-5), and the zeros above are exact. All measures are made from what is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from experiments.tracking import TrackedRun
from lm import attention
from lm.attention import AttentionMap
from lm.errors import UserError

_FILE = "attention/epoch_{:03d}.safetensors"

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class History:
    """Maps of some texts at some epochs of a run; epoch 0 is before training.

    `tokens[text]` has the T tokens of a text, `weights[text]` is [E, L, H, T, S] fp16, and `measures[name]` [E, L, H]
    has what `lm.attention` measures, over the texts that every run on the corpus reads (NaN where it is not defined).
    """

    run: str
    epochs: list[int]
    tokens: dict[str, list[str]]
    weights: dict[str, Halves]
    measures: dict[str, npt.NDArray[np.float32]]

    @property
    def changes(self) -> list[float]:
        """The mean divergence of each epoch's maps from those of the epoch before, for epochs 1, 2, ..."""
        if "change" not in self.measures:
            return []
        return [float(x) for x in self.measures["change"][1:].mean((1, 2))]

    def verdict(self) -> str:
        """When attention settled, by the rule of `lm.attention.settled`, in words."""
        changes = self.changes
        if not changes:
            return "not measured: the validation text is shorter than two tokens"
        epoch = attention.settled(changes)
        if epoch is not None:
            return f"settled at epoch {epoch}: no later epoch changed the maps by {attention.SETTLED} bits or more"
        return f"not settled: epoch {len(changes)} still changed the maps by {changes[-1]:.3f} bits"


@dataclass(frozen=True)
class Capture:
    """One epoch of a history, before and after it is a file."""

    epoch: int
    maps: dict[str, AttentionMap]
    measures: dict[str, npt.NDArray[np.float32]]

    def pack(self) -> bytes:
        """As one safetensors file; `Capture.read` is the inverse."""
        tensors: dict[str, npt.NDArray[Any]] = {f"measure.{name}": values for name, values in self.measures.items()}
        texts: list[dict[str, Any]] = []
        for name, shown in self.maps.items():
            tensors[f"text.{len(texts)}"] = attention.triangle(shown.weights_LHTS.astype(np.float16))
            texts.append({"name": name, "tokens": shown.tokens})
        return save(tensors, metadata={"about": json.dumps({"epoch": self.epoch, "texts": texts})})

    @classmethod
    def read(cls, path: Path) -> Capture:
        """Read a file that `pack` made.

        Raises:
            UserError: it is none.
        """
        try:
            with safe_open(path, framework="numpy") as f:
                about = json.loads(f.metadata()["about"])
                maps = {
                    str(text["name"]): AttentionMap(
                        [str(token) for token in text["tokens"]],
                        _square(f.get_tensor(f"text.{i}"), len(text["tokens"])).astype(np.float32),
                    )
                    for i, text in enumerate(about["texts"])
                }
                names = [key for key in f.keys() if key.startswith("measure.")]  # noqa: SIM118 (no mapping)
                measured = {key.removeprefix("measure."): f.get_tensor(key) for key in names}
            return cls(int(about["epoch"]), maps, measured)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as e:
            raise UserError(
                f"an attention file must be as it was written: got {type(e).__name__} in {path.name}. Try another run."
            ) from e


def take(
    epoch: int,
    maps: Mapping[str, AttentionMap],
    shared: Sequence[str],
    before: Capture | None,
    kinds: Mapping[str, attention.Floats],
) -> Capture:
    """Round maps to what is stored, and measure them.

    Args:
        maps: by the text's name.
        shared: the texts that are measured; each of two tokens or more.
        before: the capture of the epoch before.
        kinds: measures of the model that need no text.
    """
    rounded = {
        name: AttentionMap(m.tokens, m.weights_LHTS.astype(np.float16).astype(np.float32)) for name, m in maps.items()
    }
    found: dict[str, list[attention.Floats]] = {}
    for name in shared:
        weights_LHTS = rounded[name].weights_LHTS
        measured = attention.measures(weights_LHTS)
        if weights_LHTS.shape[1] > 1:
            measured["agreement"] = attention.agreement(weights_LHTS)
        if before is not None:
            measured["change"] = attention.divergence(before.maps[name].weights_LHTS, weights_LHTS)
        for key, values in measured.items():
            found.setdefault(key, []).append(values)
    means = {key: np.mean(values, axis=0) for key, values in found.items()}
    return Capture(epoch, rounded, {key: values.astype(np.float32) for key, values in {**means, **kinds}.items()})


def join(run: str, captures: Sequence[Capture]) -> History:
    """The captures of a run, one an epoch in order, as arrays."""
    first = captures[0]
    names = {name for capture in captures for name in capture.measures}
    missing = np.full(next(iter(first.maps.values())).weights_LHTS.shape[:2], np.nan, np.float32)
    return History(
        run=run,
        epochs=[capture.epoch for capture in captures],
        tokens={name: shown.tokens for name, shown in first.maps.items()},
        weights={
            name: np.stack([c.maps[name].weights_LHTS for c in captures]).astype(np.float16) for name in first.maps
        },
        measures={name: np.stack([c.measures.get(name, missing) for c in captures]) for name in sorted(names)},
    )


def metrics(capture: Capture) -> dict[str, float]:
    """Its measures as metrics: `attention/entropy`, the mean over heads, and `attention_entropy/layer1_head1`."""
    made: dict[str, float] = {}
    for name, values_LH in capture.measures.items():
        made[f"attention/{name}"] = float(values_LH.mean())
        for (layer, head), value in np.ndenumerate(values_LH):
            made[f"attention_{name}/layer{layer + 1}_head{head + 1}"] = float(value)
    return made


def log(run: TrackedRun, capture: Capture) -> None:
    """Store a capture with its run."""
    run.log_bytes(_FILE.format(capture.epoch), capture.pack())


def read(run: TrackedRun, last: int | None = None) -> list[Capture]:
    """The captures of a run up to an epoch, or all; they end where one is missing."""
    captures: list[Capture] = []
    while last is None or len(captures) <= last:
        file = run.fetch_artifact(_FILE.format(len(captures)))
        if file is None:
            break
        captures.append(Capture.read(file))
    return captures


def load_attention(run: TrackedRun | str) -> History:
    """Attention of a run over its epochs.

    Args:
        run: the run, or its name or id in the store that the environment names.

    Raises:
        UserError: no such run, one without attention, or a damaged file.
    """
    if isinstance(run, str):
        from experiments.settings import Settings
        from experiments.tracking import Tracker

        tracker = Tracker(Settings.load())
        run = tracker.open_run(tracker.find_run(run).info.run_id)
    captures = read(run)
    if not captures:
        raise UserError(
            f"a run must have attention files to be shown: got {run.name}, which has none. "
            "Try a run that train.py or tune.py made."
        )
    return join(run.name, captures)


def _square(packed: Halves, n: int) -> Halves:
    weights = np.zeros((*packed.shape[:-1], n, n), packed.dtype)
    rows, columns = np.tril_indices(n)
    weights[..., rows, columns] = packed
    return weights
