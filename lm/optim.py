"""The optimiser's parameter groups, and the learning rate at a step. Knows no data and no loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from lm.config import TrainConfig


def build_optimizer(model: nn.Module, recipe: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), which at weight_decay 0 is Adam; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=next(model.parameters()).device.type != "mps")


def lr_at(step: int, total_steps: int, recipe: TrainConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then constant or a cosine to 0."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (step - recipe.warmup_steps) / max(1, total_steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
