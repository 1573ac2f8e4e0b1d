"""Attention over training: maps of the same texts, epoch by epoch, as files of a run and as arrays.

    from experiments.captures import load_attention
    history = load_attention("RUN")                # by name or id
    history.weights["validation 1"]                # [epochs, layers, heads, query, key]

A map is kept as the lower triangle of its weights in fp16, so that a weight is stored to within one part in 2,048 (or
3e-8 where it is below 6e-5), and the zeros above are exact. What is measured on texts is measured on what is stored;
kinds of heads are measured on random tokens (`lm.attention.head_kinds`).
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

from experiments.settings import Settings
from experiments.tracking import TrackedRun, Tracker
from lm import attention
from lm.attention import AttentionMap
from lm.errors import UserError

_FILE = "attention/epoch_{:03d}.safetensors"

Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class History:
    """Maps of some texts at some epochs of a run; epoch 0 is before training.

    `tokens[text]` has the T tokens of a text, `weights[text]` is [E, L, H, T, S] fp16, and `measures[name]` [E, L, H]
    has what `lm.attention` measures, on the validation texts or on random tokens (NaN where it is not defined).
    """

    run: str
    epochs: list[int]
    tokens: dict[str, list[str]]
    weights: dict[str, Halves]
    measures: dict[str, npt.NDArray[np.float32]]

    def verdict(self) -> str:
        """When attention settled, by the rule of `lm.attention.settled`, in words; empty where one epoch is all."""
        if len(self.epochs) < 2:
            return ""
        if "change" not in self.measures:
            return "not measured: the validation text is shorter than two tokens"
        if self.epochs != list(range(len(self.epochs))):
            return "not measured: the maps of an epoch are missing"
        changes = [float(x) for x in self.measures["change"][1:].mean((1, 2))]
        epoch = attention.settled(changes)
        if epoch is not None:
            return f"settled at epoch {epoch}: no later epoch changed the maps by {attention.SETTLED} bits or more"
        return f"not settled: epoch {len(changes)} still changed the maps by {changes[-1]:.3f} bits"


@dataclass(frozen=True)
class Capture:
    """One epoch of a history, in memory and as a file: tokens and [L, H, T, S] of each text, and measures [L, H]."""

    epoch: int
    tokens: dict[str, list[str]]
    weights: dict[str, Halves]
    measures: dict[str, npt.NDArray[np.float32]]

    def pack(self) -> bytes:
        """As one safetensors file; `Capture.read` is the inverse."""
        tensors: dict[str, npt.NDArray[Any]] = {f"measure.{name}": values for name, values in self.measures.items()}
        for i, weights in enumerate(self.weights.values()):
            tensors[f"text.{i}"] = attention.triangle(weights)
        return save(tensors, metadata={"about": json.dumps({"epoch": self.epoch, "tokens": self.tokens})})

    @classmethod
    def read(cls, path: Path) -> Capture:
        """Read a file that `pack` made.

        Raises:
            UserError: it is none.
        """
        try:
            with safe_open(path, framework="numpy") as f:
                about = json.loads(f.metadata()["about"])
                tokens = {str(name): [str(token) for token in of_text] for name, of_text in about["tokens"].items()}
                weights = {
                    name: _square(f.get_tensor(f"text.{i}"), len(of_text))
                    for i, (name, of_text) in enumerate(tokens.items())
                }
                names = [key for key in f.keys() if key.startswith("measure.")]  # noqa: SIM118 (no mapping)
                measured = {key.removeprefix("measure."): f.get_tensor(key) for key in names}
            return cls(int(about["epoch"]), tokens, weights, measured)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as e:
            raise UserError(
                f"an attention file must be as it was written: got {type(e).__name__} in {path}. "
                "Try removing it: the run then goes on without that epoch's maps."
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
        before: the capture made last; what changed is measured if it is of the epoch before.
        kinds: measures of the model that need no text.
    """
    rounded = {name: shown.weights_LHTS.astype(np.float16) for name, shown in maps.items()}
    found: dict[str, list[attention.Floats]] = {}
    for name in shared:
        measured = attention.measures(rounded[name])
        if rounded[name].shape[1] > 1:
            measured["agreement"] = attention.agreement(rounded[name])
        if before is not None and before.epoch == epoch - 1:
            measured["change"] = attention.divergence(before.weights[name], rounded[name])
        for key, values in measured.items():
            found.setdefault(key, []).append(values)
    means = {key: np.mean(values, axis=0) for key, values in found.items()}
    measures = {key: values.astype(np.float32) for key, values in {**means, **kinds}.items()}
    return Capture(epoch, {name: shown.tokens for name, shown in maps.items()}, rounded, measures)


def join(run: str, captures: Sequence[Capture]) -> History:
    """The captures of a run, one an epoch in order, as arrays.

    Raises:
        UserError: they are of different texts.
    """
    first = captures[0]
    if any(capture.tokens != first.tokens for capture in captures):
        raise UserError(f"attention over epochs must be of the same texts: got others in {run}. Try another run.")
    names = {name for capture in captures for name in capture.measures}
    missing = np.full(next(iter(first.weights.values())).shape[:2], np.nan, np.float32)
    return History(
        run=run,
        epochs=[capture.epoch for capture in captures],
        tokens=first.tokens,
        weights={name: np.stack([capture.weights[name] for capture in captures]) for name in first.weights},
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
    """The captures of a run in the order of their epochs, all or up to one."""
    files = [
        file
        for name in sorted(run.artifacts("attention"))
        if name.endswith(".safetensors") and (file := run.fetch_artifact(f"attention/{name}")) is not None
    ]
    return [capture for capture in map(Capture.read, files) if last is None or capture.epoch <= last]


def load_attention(run: TrackedRun | str) -> History:
    """Attention of a run over its epochs.

    Args:
        run: the run, or its name or id in the store that the environment names.

    Raises:
        UserError: no such run, one without attention, or a damaged file.
    """
    if isinstance(run, str):
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
