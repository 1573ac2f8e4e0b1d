"""Cross-entropy of a language model's head without a second matrix of the size of its logits. Knows only torch.

Shape suffixes: B batch, T query position, D model width, V vocabulary, N all positions of a batch, C some of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOGITS_AT_ONCE = 2**25
"""As many as a matrix product is given: 64 MiB in bf16. Fewer than 512 positions would slow it."""
_LOGITS_A_CHUNK = 2**20
"""As many as stay in a processor's cache in fp32."""
_LEAST = 1e-30
"""A probability below which fp32 loses digits: its logarithm is then made from the logits."""


class _HeadNats(torch.autograd.Function):
    """Loss and gradients in one pass, so that logits become their own gradient in place.

    Products are made in `precision`, all else in fp32. A matrix of positions by vocabulary is written once and read
    twice; torch's own steps write, clear or scale four of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        divisor: float,
        precision: torch.dtype,
    ) -> Tensor:
        x_ND, cast_VD = x_ND.to(precision), weight_VD.to(precision)
        total = torch.zeros((), device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight_VD: Tensor | None = None
        grad_bias_V = torch.zeros_like(bias_V)
        rows = _rows(_LOGITS_AT_ONCE, len(bias_V))
        for i in range(0, len(x_ND), rows):
            x_CD = x_ND[i : i + rows]
            logits_CV = x_CD @ cast_VD.t()
            total += _to_gradients(logits_CV, bias_V, targets_N[i : i + rows])
            grad_x_ND[i : i + rows] = (logits_CV @ cast_VD).div_(divisor)
            part_VD = (logits_CV.t() @ (x_CD / divisor)).to(weight_VD.dtype)
            grad_weight_VD = part_VD if grad_weight_VD is None else grad_weight_VD.add_(part_VD)
            grad_bias_V += (x_CD.new_ones(1, len(x_CD)) @ logits_CV)[0].to(bias_V.dtype).div_(divisor)
        ctx.save_for_backward(grad_x_ND, grad_weight_VD, grad_bias_V)
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the name of ctx
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        factor, gradients = outputs[0], ctx.saved_tensors
        if factor.device.type != "cpu" or factor.item() != 1:
            gradients = tuple(gradient * factor for gradient in gradients)
        return *gradients, None, None, None


def _to_gradients(logits_CV: Tensor, bias_V: Tensor, targets_C: Tensor) -> Tensor:
    """Turn logits without their bias into the gradient of their summed nats, in place; returns that sum."""
    total = torch.zeros((), device=logits_CV.device)
    on_cpu = logits_CV.device.type == "cpu"
    rows = _rows(_LOGITS_A_CHUNK, len(bias_V)) if on_cpu else len(logits_CV)
    for part_CV, targets_part_C in zip(logits_CV.split(rows), targets_C.split(rows), strict=True):
        targets_C1 = targets_part_C[:, None]
        biased_CV = part_CV.float().add_(bias_V)
        p_CV = biased_CV.softmax(dim=-1)  # half the time of log_softmax with exp
        p_target_C1 = p_CV.gather(1, targets_C1)
        if not on_cpu or (p_target_C1 < _LEAST).any():  # elsewhere the question would wait for the device
            total -= biased_CV.log_softmax(dim=-1).gather(1, targets_C1).sum()
        else:
            total -= p_target_C1.log().sum()
        part_CV.copy_(p_CV.scatter_add_(1, targets_C1, p_CV.new_full(targets_C1.shape, -1)))
    return total


def _rows(logits: int, vocab_size: int) -> int:
    return max(1, logits // vocab_size)


def mean_nats(
    head: torch.nn.Linear, x_BTD: Tensor, targets_BT: Tensor, precision: torch.dtype, divisor: float | None = None
) -> Tensor:
    """Negative log-likelihood a target, a scalar in fp32: cross-entropy of `head(x_BTD)`, with its gradients.

    They are made at once, so that this may be differentiated once, and `backward` be called once.

    Args:
        head: from D to V, with a bias.
        precision: of the matrix products; of the logits too, before the bias is added in fp32.
        divisor: what the sum is divided by, where these targets are part of more; by default their number.
    """
    with torch.autocast(x_BTD.device.type, enabled=False):
        loss: Tensor = _HeadNats.apply(  # pyright: ignore[reportAssignmentType]
            x_BTD.flatten(0, 1),
            head.weight,
            head.bias,
            targets_BT.flatten(),
            divisor or float(targets_BT.numel()),
            precision,
        )
    return loss


def token_nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood [B, T] of each target in fp32, a few rows at a time."""
    logits_NV, targets_N1 = logits_BTV.flatten(0, 1), targets_BT.flatten()[:, None]
    rows = _rows(_LOGITS_A_CHUNK, logits_NV.shape[1])
    parts = [
        F.log_softmax(chunk_CV.float(), dim=-1).gather(1, targets_C1)
        for chunk_CV, targets_C1 in zip(logits_NV.split(rows), targets_N1.split(rows), strict=True)
    ]
    return -torch.cat(parts).view_as(targets_BT)
