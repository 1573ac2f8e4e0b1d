"""Exact measures: the nats of every target are kept, summed over a whole split, and divided once.

Shape suffixes: B batch, T query position, V vocabulary, N all positions of a batch, C some of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from tqdm import tqdm

from lm.data import Windows
from lm.model import Decoder
from lm.runtime import autocast

_TOKENS_A_BATCH = 2048
_LOGITS_A_CHUNK = 2**20


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


class _SummedNats(torch.autograd.Function):
    """Cross-entropy in fp32 a few rows at a time, with the gradient made in the same pass.

    The values are those of `F.cross_entropy(logits.float(), targets, reduction="sum")`; what differs is that no
    second matrix of the size of the logits is written and read in fp32, which at a vocabulary of 18,707 takes
    60 ms of a step.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        rows = _rows_a_chunk(logits_NV)
        total = torch.zeros((), device=logits_NV.device)
        gradient_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        for i in range(0, len(logits_NV), rows):
            targets_C1 = targets_N[i : i + rows, None]
            log_p_CV = F.log_softmax(logits_NV[i : i + rows].float(), dim=-1)
            total -= log_p_CV.gather(1, targets_C1).sum()
            if gradient_NV is not None:
                p_CV = log_p_CV.exp_()
                gradient_NV[i : i + rows] = p_CV.scatter_add_(
                    1, targets_C1, -torch.ones_like(targets_C1, dtype=p_CV.dtype)
                )
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * outputs[0], None


def _rows_a_chunk(logits_NV: Tensor) -> int:
    return max(1, _LOGITS_A_CHUNK // logits_NV.shape[1])


def token_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood [B, T] of each target in fp32, a few rows at a time."""
    logits_NV, targets_N1 = logits_BTV.flatten(0, 1), targets_BT.flatten()[:, None]
    rows = _rows_a_chunk(logits_NV)
    parts = [
        F.log_softmax(chunk_CV.float(), dim=-1).gather(1, targets_C1)
        for chunk_CV, targets_C1 in zip(logits_NV.split(rows), targets_N1.split(rows), strict=True)
    ]
    return -torch.cat(parts).view_as(targets_BT)


def nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Summed negative log-likelihood of the targets, a scalar in fp32."""
    total: Tensor = _SummedNats.apply(logits_BTV.flatten(0, 1), targets_BT.flatten())  # pyright: ignore[reportAssignmentType]
    return total


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
