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
) -> Scores:
    """Score every target of `windows` once, whatever the batch size; dropout is off.

    Args:
        progress: the bar's label, or None for no bar.
        context: windows one after another, in which a target sees what stands before it in its own window; or a window
            that slides, so that each sees (nearly) as much as the model takes, at 32 times the cost.
    """
    was_training = model.training
    model.eval()
    parts: list[npt.NDArray[np.float32]] = []
    batch_size = max(1, _TOKENS_A_BATCH // windows.seq_len)
    batches = windows.in_order(batch_size) if context == "window" else windows.sliding(batch_size)
    bar = tqdm(total=windows.n_targets, desc=progress, unit="tokens", disable=progress is None, leave=False)
    done, total = 0, 0.0
    for inputs_BT, targets_BT in batches:
        inputs_BT, targets_BT = inputs_BT.to(model.device), targets_BT.to(model.device)
        with autocast(model.device, precision):
            logits_BTV, _ = model(inputs_BT, last=targets_BT.shape[1])
        parts.append(token_nats(logits_BTV, targets_BT).flatten().cpu().numpy())
        done, total = done + len(parts[-1]), total + float(parts[-1].sum())
        bar.update(len(parts[-1]))
        if progress is not None:
            running = Evaluation(total, done)
            bar.set_postfix(loss=f"{running.nll:.3f}", perplexity=f"{running.perplexity:.1f}", refresh=False)
    bar.close()
    model.train(was_training)
    return Scores(np.concatenate(parts))
