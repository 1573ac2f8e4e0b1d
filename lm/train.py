"""The training loop: a generator that yields one report an epoch; the caller logs, prunes or stops.

The order of a pass follows from the run's seed and the pass's number, dropout from the seed and the step's. So a run
resumed at an epoch's end takes the same steps as one that was never broken, and so do, on the CPU, several processes.

Shape suffixes: B batch, T query position, D model width.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm import parallel, runtime
from lm.checkpoint import TrainState
from lm.config import TrainConfig
from lm.data import Windows
from lm.errors import DivergedError, UserError
from lm.evaluate import Evaluation, Scores, evaluate
from lm.loss import mean_nats
from lm.model import Decoder, Noise
from lm.optim import clip_and_step, lr_at
from lm.parallel import ALONE, Ranks

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


def seed_of(seed: int, number: int) -> int:
    """The seed of one pass's order, or of one step's dropout."""
    return (seed * 1_000_003 + number + 1) % 2**63


def fit(
    state: TrainState,
    train: Windows,
    validation: Windows,
    config: TrainConfig,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[EpochReport]:
    """Train `state` in place from where it stands to `config.epochs`, or until patience ends.

    With `ranks` all processes of a group train together: each calls this with the same text and config, and begins
    with the state of the first.

    Yields:
        one report after each epoch; at that moment `state` is what a checkpoint should hold (with FSDP in the first
        process alone).

    Raises:
        DivergedError: a loss or a gradient that is not finite.
        LostRankError: another process has ended.
        MemoryError: a step does not fit.
        UserError: a state without optimizers, as of a checkpoint `best`.
    """
    if not state.optimizers:
        raise UserError("training needs the optimizer's state: got a checkpoint without. Try the run's last.")
    runtime.keep_memory()
    with parallel.together(ranks), runtime.telling_of_memory():
        state.level(ranks)
        working = state.in_shares(config, ranks) if parallel.shares_weights(config.parallel, ranks) else state
        loss: nn.Module = Loss(working.model, runtime.resolve_precision(config.precision, working.model.device))
        if working is state:
            loss = parallel.replicated(loss, ranks)
        epoch_steps = config.steps_per_epoch or train.n_batches(config.batch_size)
        while state.epochs_done < config.epochs and not out_of_patience(state, config):
            epoch = state.epochs_done + 1
            started = time.perf_counter()
            trained, lr, norms = _train_epoch(working, loss, train, config, epoch_steps, progress, ranks)
            train_seconds = time.perf_counter() - started
            label = f"epoch {epoch}/{config.epochs} validation" if progress else None
            precision = runtime.resolve_precision(config.precision, working.model.device)
            scores = evaluate(working.model, validation, precision, label, ranks=ranks)
            validated = scores.total
            if not math.isfinite(validated.nats):
                raise DivergedError(_diverged("validation loss", validated.nats, working))
            is_best = validated.nll < working.best_nll
            if is_best:
                working.best_nll, working.best_epoch = validated.nll, epoch
            working.epochs_done += 1
            if working is not state:
                state.gather(working, ranks)
            yield EpochReport(
                epoch=epoch,
                step=state.steps_done,
                train=trained,
                scores=scores,
                is_best=is_best,
                best_nll=state.best_nll,
                lr=lr,
                grad_norm=float(norms.mean()),
                clipped_share=float((norms > config.clip_norm).mean()),
                tokens_per_second=trained.tokens / train_seconds,
                seconds=time.perf_counter() - started,
            )


def out_of_patience(state: TrainState, config: TrainConfig) -> bool:
    """Whether so many epochs have passed without a better validation loss that training ends."""
    return config.patience > 0 and state.epochs_done - state.best_epoch >= config.patience


class Loss(nn.Module):
    """A model with its loss: the module whose forward and backward pass are a step's."""

    def __init__(self, model: Decoder, precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, divisor: float, noise: Noise) -> Tensor:
        """The targets' nats over `divisor`, a scalar."""
        with runtime.autocast(self.model.device, self.precision):
            x_BTD, _ = self.model.hidden(inputs_BT, noise=noise)
        return mean_nats(self.model.head, x_BTD, targets_BT, self.precision, divisor)


def train_step(
    loss: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    inputs_BT: Tensor,
    targets_BT: Tensor,
    config: TrainConfig,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """Forward, backward, clip and step on one batch, of which this process takes its share, some windows at once.

    Args:
        loss: `Loss`, as `parallel.replicated` returns it.
        inputs_BT, targets_BT: the whole batch, on the CPU.
        seed: of dropout.

    Returns:
        this process's part of the batch's mean loss, and the norm of the whole gradient before clipping: scalars left
        on the device.
    """
    device = next(loss.parameters()).device
    mine, largest = ranks.share(len(inputs_BT)), -(-len(inputs_BT) // ranks.size)
    rows = config.micro_batch_size or largest
    n_parts = -(-largest // rows)  # of all alike, since each pass may be one of all processes
    total = torch.zeros((), device=device)
    for i in range(n_parts):
        part = mine[i * rows : (i + 1) * rows]
        # The mean over processes is the batch's. One without a window takes part with one that does not count.
        divisor = targets_BT.numel() / ranks.size if part else math.inf
        at = slice(part.start, part.stop) if part else slice(0, 1)
        with parallel.exchange(loss, due=i + 1 == n_parts):
            nats = loss(inputs_BT[at].to(device), targets_BT[at].to(device), divisor, Noise(seed, at.start))
            nats.backward()
        total += nats.detach()
    return total / ranks.size, clip_and_step(optimizers, config.clip_norm)


def _train_epoch(
    state: TrainState,
    loss: nn.Module,
    train: Windows,
    config: TrainConfig,
    epoch_steps: int,
    progress: bool,
    ranks: Ranks,
) -> tuple[Evaluation, float, npt.NDArray[np.float64]]:
    """The steps of one epoch; returns their summed loss, the last lr and the gradient norm of each."""
    state.model.train()
    runtime.seed_everything(
        seed_of(seed_of(config.seed, state.epochs_done), ranks.rank)
    )  # for what Noise does not serve
    tokens, nats, lr = 0, 0.0, config.lr
    losses: list[Tensor] = []  # left on the device until glanced at: each read would wait for it
    norms: list[Tensor] = []
    norms_read: list[npt.NDArray[np.float64]] = []
    bar = tqdm(
        itertools.islice(batches(train, config, state.steps_done), epoch_steps),
        total=epoch_steps,
        desc=f"epoch {state.epochs_done + 1}/{config.epochs} train",
        disable=not progress,
        leave=False,
    )
    for i, (inputs_BT, targets_BT) in enumerate(bar):
        lr = lr_at(state.steps_done, config.epochs * epoch_steps, config)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        seed = seed_of(config.seed, state.steps_done)
        mean, norm = train_step(loss, state.optimizers, inputs_BT, targets_BT, config, seed, ranks)
        losses.append(mean * targets_BT.numel())
        norms.append(norm)
        tokens += targets_BT.numel()
        state.steps_done += 1
        if i % _STEPS_A_GLANCE == 0 or i + 1 == epoch_steps:
            nats += float(ranks.summed(torch.stack(losses)).cpu().double().sum())
            norms_read.append(torch.stack(norms).double().cpu().numpy())
            losses.clear()
            norms.clear()
            _require_finite(nats, norms_read[-1], state)
            running = Evaluation(nats, tokens)
            bar.set_postfix(loss=f"{running.nll:.3f}", perplexity=f"{running.perplexity:.1f}")
    return Evaluation(nats, tokens), lr, np.concatenate(norms_read)


def batches(train: Windows, config: TrainConfig, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [B, T] of the steps from `step` on, pass after pass, each in an order of its own."""
    done, place = divmod(step, train.n_batches(config.batch_size))
    while True:
        yield from train.shuffled(config.batch_size, seed_of(config.seed, done), place)
        done, place = done + 1, 0


def _require_finite(nats: float, norms: npt.NDArray[np.float64], state: TrainState) -> None:
    if not math.isfinite(nats):
        raise DivergedError(_diverged("loss", nats, state))
    for norm in norms:
        if not math.isfinite(norm):
            raise DivergedError(_diverged("gradient norm", norm, state))


def _diverged(what: str, value: float, state: TrainState) -> str:
    return (
        f"{what} must stay finite: got {value} by step {state.steps_done} (epoch {state.epochs_done + 1}). "
        "Try a smaller --lr or --clip-norm, or --precision fp32."
    )
