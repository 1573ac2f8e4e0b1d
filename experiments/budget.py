"""When a study stops before its total, and what it will cost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import torch

from lm import runtime, train
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import Windows

_PROBED_BATCHES = 4
_BYTES_A_WEIGHT = {"best": 4, "last": 12, "model": 4}  # fp32, with two moments in `last`


class Stop:
    """Why to stop at the end of the epoch: a person's wish, the time, or a good enough result.

    The first Ctrl-C is a wish; the next, and SIGTERM, stop at once. `with_parent` stops a worker whose parent has died.
    """

    def __init__(self, hours: float | None = None, until: float | None = None, with_parent: bool = False) -> None:
        self._deadline = time.time() + hours * 3600 if hours is not None else None
        self._hours, self._until, self._parent = hours, until, os.getppid() if with_parent else None
        self.wished = False

    def __enter__(self) -> Stop:
        """Take Ctrl-C from here on."""
        self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if self.wished:
            raise KeyboardInterrupt
        self.wished = True
        print("\nfinishing the epoch, then stopping; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def reason(self, best: Callable[[], float]) -> str:
        """Why to stop now, in words; empty to go on.

        Args:
            best: asks for the study's lowest perplexity so far.
        """
        if self.wished or (self._parent is not None and os.getppid() != self._parent):
            return "interrupted"
        if self._deadline is not None and time.time() > self._deadline:
            return f"{self._hours:g} hours are over"
        if self._until is not None and (reached := best()) <= self._until:
            return f"perplexity {reached:.2f} is at most {self._until:g}"
        return ""


def seconds_an_epoch(config: Config, vocab_size: int, windows: Windows, validation: Windows) -> float:
    """An estimate of an epoch's time: a throwaway model trains on a few batches; evaluation counts a third."""
    runtime.seed_everything(config.train.seed)
    state = TrainState.new(config, vocab_size, runtime.resolve_device(config.train.device))
    a_batch = config.train.batch_size * config.model.seq_len
    few = Windows(windows.ids[: _PROBED_BATCHES * a_batch + 1], config.model.seq_len)
    probe = replace(config.train, epochs=2, patience=0, steps_per_epoch=0)
    *_, second = train.fit(state, few, Windows(few.ids[: config.model.seq_len + 1], config.model.seq_len), probe)
    trained = config.train.steps_per_epoch * a_batch or windows.n_targets
    return (trained + validation.n_targets / 3) / second.tokens_per_second


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Disk that a finished trial's weights take: best, last with the optimiser's moments, and the served model."""
    with torch.device("meta"):
        state = TrainState.new(config, vocab_size, torch.device("meta"))
    return state.model.n_parameters() * sum(_BYTES_A_WEIGHT.values())
