"""The training loop: a generator that yields one report an epoch; the caller logs, prunes or stops.

Each epoch seeds torch from the run's seed and its own number, so a run resumed at an epoch's end takes the
same steps as one that was never broken.

Shape suffixes: B batch, T query position, D model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from lm import runtime
from lm.checkpoint import TrainState
from lm.config import TrainConfig
from lm.data import Windows
from lm.errors import DivergedError, UserError
from lm.evaluate import Evaluation, Scores, evaluate
from lm.loss import mean_nats
from lm.optim import clip_and_step, lr_at

_STEPS_A_GLANCE = 20


@dataclass(frozen=True)
class EpochReport:
    """What one epoch (from 1) came to. Train figures are of the moving model with dropout, as it learned."""

    epoch: int
    step: int
    train: Evaluation
    scores: Scores
    is_best: bool
    best_nll: float
    lr: float
    grad_norm: float
    clipped_share: float
    tokens_per_second: float
    seconds: float

    @property
    def validation(self) -> Evaluation:
        """All validation targets."""
        return self.scores.total

    def describe(self, epochs: int) -> str:
        """The epoch's summary in one line."""
        return (
            f"epoch {self.epoch}/{epochs}  "
            f"train loss {self.train.nll:.4f} perplexity {self.train.perplexity:.2f}  "
            f"validation loss {self.validation.nll:.4f} perplexity {self.validation.perplexity:.2f}"
            f"{' *' if self.is_best else '  '} {self.tokens_per_second:,.0f} tokens/s  {self.seconds:.1f} s"
        )


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch's order and dropout."""
    return (seed * 1_000_003 + epoch + 1) % 2**63


def fit(
    state: TrainState, train: Windows, validation: Windows, config: TrainConfig, progress: bool = False
) -> Iterator[EpochReport]:
    """Train `state` in place from where it stands to `config.epochs`, or until patience ends.

    Yields:
        one report after each epoch; at that moment `state` is what a checkpoint should hold.

    Raises:
        DivergedError: a loss or a gradient that is not finite.
        UserError: a state without optimizers, as of a checkpoint `best`.
    """
    if not state.optimizers:
        raise UserError("training needs the optimizer's state: got a checkpoint without. Try the run's last.")
    runtime.keep_memory()
    device = state.model.device
    precision = runtime.resolve_precision(config.precision, device)
    total_steps = config.epochs * train.n_batches(config.batch_size)
    while state.epochs_done < config.epochs and not out_of_patience(state, config):
        epoch = state.epochs_done + 1
        started = time.perf_counter()
        trained, lr, norms = _train_epoch(state, train, config, total_steps, precision, progress)
        train_seconds = time.perf_counter() - started
        label = f"epoch {epoch}/{config.epochs} validation" if progress else None
        scores = evaluate(state.model, validation, precision, label)
        validated = scores.total
        if not math.isfinite(validated.nats):
            raise DivergedError(_diverged("validation loss", validated.nats, state))
        is_best = validated.nll < state.best_nll
        if is_best:
            state.best_nll, state.best_epoch = validated.nll, epoch
        state.epochs_done += 1
        yield EpochReport(
            epoch=epoch,
            step=state.steps_done,
            train=trained,
            scores=scores,
            is_best=is_best,
            best_nll=state.best_nll,
            lr=lr,
            grad_norm=norms.mean().item(),
            clipped_share=(norms > config.clip_norm).double().mean().item(),
            tokens_per_second=trained.tokens / train_seconds,
            seconds=time.perf_counter() - started,
        )


def out_of_patience(state: TrainState, config: TrainConfig) -> bool:
    """Whether so many epochs have passed without a better validation loss that training ends."""
    return config.patience > 0 and state.epochs_done - state.best_epoch >= config.patience


def train_step(
    state: TrainState, inputs_BT: Tensor, targets_BT: Tensor, clip_norm: float, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Forward, backward, clip and step on one batch.

    Returns:
        its mean loss and the norm of its gradient before clipping, scalars left on the device.
    """
    inputs_BT, targets_BT = inputs_BT.to(state.model.device), targets_BT.to(state.model.device)
    with runtime.autocast(state.model.device, precision):
        x_BTD, _ = state.model.hidden(inputs_BT)
    loss = mean_nats(state.model.head, x_BTD, targets_BT, precision)
    loss.backward()
    return loss.detach(), clip_and_step(state.optimizers, clip_norm)


def _train_epoch(
    state: TrainState,
    train: Windows,
    config: TrainConfig,
    total_steps: int,
    precision: torch.dtype,
    progress: bool,
) -> tuple[Evaluation, float, Tensor]:
    """One pass; returns its summed loss, the last lr and the gradient norm of each step."""
    state.model.train()
    seed = epoch_seed(config.seed, state.epochs_done)
    runtime.seed_everything(seed)
    tokens, lr = 0, config.lr
    losses: list[Tensor] = []  # left on the device until glanced at: each read would wait for it
    norms: list[Tensor] = []
    bar = tqdm(
        train.shuffled(config.batch_size, seed),
        total=train.n_batches(config.batch_size),
        desc=f"epoch {state.epochs_done + 1}/{config.epochs} train",
        disable=not progress,
        leave=False,
    )
    for i, (inputs_BT, targets_BT) in enumerate(bar):
        lr = lr_at(state.steps_done, total_steps, config)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss, norm = train_step(state, inputs_BT, targets_BT, config.clip_norm, precision)
        losses.append(loss * targets_BT.numel())
        norms.append(norm)
        tokens += targets_BT.numel()
        state.steps_done += 1
        if i % _STEPS_A_GLANCE == 0 or i + 1 == bar.total:
            running = Evaluation(_sum(losses), tokens)
            _require_finite(running.nats, norms[-_STEPS_A_GLANCE:], state)
            bar.set_postfix(loss=f"{running.nll:.3f}", perplexity=f"{running.perplexity:.1f}")
    return Evaluation(_sum(losses), tokens), lr, torch.stack(norms).float().cpu()


def _sum(losses: list[Tensor]) -> float:
    return torch.stack(losses).cpu().double().sum().item()


def _require_finite(total: float, norms: list[Tensor], state: TrainState) -> None:
    if not math.isfinite(total):
        raise DivergedError(_diverged("loss", total, state))
    for norm in norms:
        if not math.isfinite(norm.item()):
            raise DivergedError(_diverged("gradient norm", norm.item(), state))


def _diverged(what: str, value: float, state: TrainState) -> str:
    return (
        f"{what} must stay finite: got {value} by step {state.steps_done} (epoch {state.epochs_done + 1}). "
        "Try a smaller --lr or --clip-norm, or --precision fp32."
    )
