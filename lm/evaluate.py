"""Exact measures: the nats of every target are kept, summed over a whole split, and divided once.

Shape suffixes: B batch, T query position, V vocabulary, N all targets of a split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lm.data import Windows
from lm.loss import token_nats
from lm.model import Decoder
from lm.parallel import ALONE, Ranks
from lm.runtime import autocast

_TOKENS_A_BATCH = 2048


@dataclass(frozen=True)
class Evaluation:
    """A sum of negative log-likelihoods (nats) over a number of tokens."""

    nats: float
    tokens: int

    @property
    def nll(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where a float cannot hold it."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Scores:
    """The negative log-likelihood of each target of a split, in their order: nats [targets]."""

    nats_N: npt.NDArray[np.float32]

    @property
    def total(self) -> Evaluation:
        """All targets."""
        return Evaluation(float(self.nats_N.sum(dtype=np.float64)), len(self.nats_N))

    def where(self, keep_N: npt.NDArray[np.bool_]) -> Evaluation | None:
        """The targets marked in `keep_N`; None where there is none, since there is nothing to divide by."""
        return Scores(self.nats_N[keep_N]).total if keep_N.any() else None


def bits_per_byte(scores: Scores, vocab_size: int, written_nats: float, n_bytes: int) -> float:
    """Bits that a code by this model needs for a byte of the text: comparable between vocabularies.

    The first token, which is no target, is paid for at ln `vocab_size`; `written_nats` is the cost of what the tokens
    do not tell of the text (`lm.spelling`).
    """
    return (scores.total.nats + math.log(vocab_size) + written_nats) / (math.log(2) * n_bytes)


@torch.inference_mode()
def evaluate(
    model: Decoder,
    windows: Windows,
    precision: torch.dtype = torch.float32,
    progress: str | None = None,
    context: Literal["window", "sliding"] = "window",
    ranks: Ranks = ALONE,
) -> Scores:
    """Score every target of `windows` once, whatever the batch size; dropout is off.

    Args:
        progress: the bar's label, or None for no bar.
        context: windows one after another, in which a target sees what stands before it in its own window; or a window
            that slides, so that each sees (nearly) as much as the model takes, at 32 times the cost.
        ranks: processes that share the batches, and all have the scores; a batch is the same whoever takes it.
    """
    was_training = model.training
    model.eval()
    nats_N = torch.zeros(windows.n_targets)
    batch_size = max(1, _TOKENS_A_BATCH // windows.seq_len)
    batches = windows.in_order(batch_size) if context == "window" else windows.sliding(batch_size)
    bar = tqdm(total=windows.n_targets, desc=progress, unit="tokens", disable=progress is None, leave=False)
    start, mine, total, i, inputs_BT = 0, 0, 0.0, 0, torch.zeros(1, 1, dtype=torch.int64)
    for i, (inputs_BT, targets_BT) in enumerate(batches):
        if i % ranks.size == ranks.rank:
            inputs_BT, on_device_BT = inputs_BT.to(model.device), targets_BT.to(model.device)
            with autocast(model.device, precision):
                logits_BTV, _ = model(inputs_BT, last=targets_BT.shape[1])
            part_N = token_nats(logits_BTV, on_device_BT).flatten().cpu()
            nats_N[start : start + len(part_N)] = part_N
            mine, total = mine + len(part_N), total + float(part_N.sum())
        start += targets_BT.numel()
        bar.update(targets_BT.numel())
        if progress is not None and mine:
            running = Evaluation(total, mine)
            bar.set_postfix(loss=f"{running.nll:.3f}", perplexity=f"{running.perplexity:.1f}", refresh=False)
    if ranks.rank > i % ranks.size:  # where weights are shared out a pass is made by all or none
        model(inputs_BT.to(model.device))
    bar.close()
    model.train(was_training)
    return Scores(ranks.summed(nats_N).numpy())
