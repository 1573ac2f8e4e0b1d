"""The optimisers and their parameter groups, and the learning rate at a step. Knows no data and no loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm.parallel import whole

if TYPE_CHECKING:
    from lm.config import TrainConfig


def build_optimizers(model: nn.Module, recipe: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019), which at weight_decay 0 is Adam; only matrices decay.

    With `optimizer="muon"` the matrices within the layers are left to Muon (Jordan et al. 2024), scaled so that the
    size of its steps is AdamW's and one lr serves both (Liu et al. 2025, equation 4).
    """
    parameters = dict(model.named_parameters())
    hidden = [p for name, p in parameters.items() if recipe.optimizer == "muon" and "layers." in name and p.ndim == 2]
    taken = {id(p) for p in hidden}
    rest = [p for p in parameters.values() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.lr, fused=next(model.parameters()).device.type != "mps")
    if not hidden:
        return [adam]
    muon = torch.optim.Muon(hidden, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


def clip_and_step(optimizers: Sequence[torch.optim.Optimizer], clip_norm: float) -> Tensor:
    """Scale all gradients down to a norm of `clip_norm` together (Pascanu et al. 2013), step, and drop them.

    A fused optimizer scales them as it reads them, which saves a pass over all weights.

    Returns:
        the norm before clipping, a scalar.
    """
    gradients = {id(o): [p.grad for g in o.param_groups for p in g["params"] if p.grad is not None] for o in optimizers}
    norm = whole(torch.nn.utils.get_total_norm([gradient for part in gradients.values() for gradient in part]))
    divisor = ((norm + 1e-6) / clip_norm).clamp(min=1.0)
    for optimizer in optimizers:
        if optimizer.defaults.get("fused"):
            optimizer.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]
        else:
            for gradient in gradients[id(optimizer)]:
                gradient.div_(divisor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if optimizer.defaults.get("fused"):
            optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    return norm


def lr_at(step: int, total_steps: int, recipe: TrainConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then constant or a cosine to 0."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
