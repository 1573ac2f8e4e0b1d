"""Exact measures: nats and tokens are summed over a whole split and divided once.

Shape suffixes: B batch, T query position, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from tqdm import tqdm

from lm.data import Windows
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


def nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Summed negative log-likelihood of the targets, a scalar in fp32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")


@torch.inference_mode()
def evaluate(
    model: Decoder, windows: Windows, precision: torch.dtype = torch.float32, progress: str | None = None
) -> Evaluation:
    """Evaluate every target of `windows` once, whatever the batch size; dropout is off.

    Args:
        progress: the bar's label, or None for no bar.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    batch_size = max(1, _TOKENS_A_BATCH // windows.seq_len)
    bar = tqdm(
        windows.in_order(batch_size),
        desc=progress,
        total=windows.n_batches(batch_size, tail=True),
        disable=progress is None,
        leave=False,
    )
    for i, (inputs_BT, targets_BT) in enumerate(bar):
        inputs_BT, targets_BT = inputs_BT.to(model.device), targets_BT.to(model.device)
        with autocast(model.device, precision):
            logits_BTV, _ = model(inputs_BT)
        total += nats(logits_BTV, targets_BT).double().cpu()
        tokens += targets_BT.numel()
        if progress is not None and i % 10 == 0:
            running = Evaluation(total.item(), tokens)
            bar.set_postfix(loss=f"{running.nll:.3f}", perplexity=f"{running.perplexity:.1f}")
    model.train(was_training)
    return Evaluation(total.item(), tokens)
