import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lm import checkpoint, train
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus, Windows
from lm.errors import DivergedError, UserError

New = Callable[[Config], TrainState]


def run(state: TrainState, text: TokenizedCorpus, config: Config) -> list[train.EpochReport]:
    windows = [text.windows(split, config.model.seq_len) for split in ("train", "validation")]
    return list(train.fit(state, windows[0], windows[1], config.train))


def test_one_batch_is_learned_by_heart(toy_config: Config, toy_text: TokenizedCorpus, new_state: New) -> None:
    batch = Windows(toy_text.ids["train"][:65], 8)
    config = toy_config.override({"epochs": 150, "dropout": 0.0, "clip_norm": 5.0, "d_model": 32})
    reports = list(train.fit(new_state(config), batch, batch, config.train))
    assert reports[0].validation.nll > 2
    assert reports[-1].validation.nll < 0.1


def test_learning_beats_the_uniform_guess(toy_config: Config, toy_text: TokenizedCorpus, new_state: New) -> None:
    reports = run(new_state(toy_config), toy_text, toy_config.override({"epochs": 6}))
    assert reports[-1].validation.nll < 0.6 * math.log(len(toy_text.vocab))
    assert [r.epoch for r in reports] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"schedule": "cosine", "warmup_steps": 5}, {"steps_per_epoch": 7}]
)
def test_two_epochs_and_two_resumed_equal_four(
    changes: dict[str, object], toy_config: Config, toy_text: TokenizedCorpus, new_state: New, tmp_path: Path
) -> None:
    config = toy_config.override({**changes, "epochs": 4})
    unbroken = run(new_state(config), toy_text, config)

    state = new_state(config)
    windows = [toy_text.windows(split, 8) for split in ("train", "validation")]
    first: list[train.EpochReport] = []
    for report in train.fit(state, windows[0], windows[1], config.train):
        first.append(report)
        if report.epoch == 2:
            break
    checkpoint.save(tmp_path / "last", config, toy_text.vocab, state, "digest")
    torch.manual_seed(999)
    loaded = checkpoint.load(tmp_path / "last")
    second = run(loaded.state, toy_text, loaded.config)

    def figures(reports: list[train.EpochReport]) -> list[tuple[float, ...]]:
        return [(r.epoch, r.step, r.train.nats, r.validation.nats, r.grad_norm, r.lr, r.best_nll) for r in reports]

    assert figures(first + second) == figures(unbroken)


def test_an_epoch_of_some_steps_goes_on_where_the_last_one_stopped(
    toy_config: Config, toy_text: TokenizedCorpus
) -> None:
    windows = toy_text.windows("train", 8)
    config = toy_config.override({"batch_size": 6}).train
    a_pass = windows.n_batches(6)
    whole = list(itertools.islice(train.batches(windows, config, 0), 2 * a_pass))
    for step in (0, 5, a_pass - 1, a_pass, a_pass + 3):
        inputs, targets = next(train.batches(windows, config, step))
        assert inputs.equal(whole[step][0]) and targets.equal(whole[step][1])
    first = torch.cat([targets.flatten() for _, targets in whole[:a_pass]])
    second = torch.cat([targets.flatten() for _, targets in whole[a_pass:]])
    assert first.sort()[0].equal(second.sort()[0]) and not first.equal(second)


def test_equal_seeds_give_equal_figures_and_others_do_not(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: New
) -> None:
    first, same, other = (
        run(new_state(c), toy_text, c)[-1].validation.nats
        for c in (toy_config, toy_config, toy_config.override({"seed": 1}))
    )
    assert first == same != other


def test_a_loss_that_is_not_finite_stops_the_training(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: New
) -> None:
    state = new_state(toy_config)
    with torch.no_grad():
        state.model.head.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"loss must stay finite: got nan by step 1 \(epoch 1\)"):
        run(state, toy_text, toy_config)


def test_patience_stops_after_epochs_without_a_better_loss(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: New
) -> None:
    config = toy_config.override({"epochs": 50, "patience": 2, "lr": 3e-2})
    reports = run(new_state(config), toy_text, config)
    losses = [r.validation.nll for r in reports]
    assert len(reports) < 50
    assert len(losses) - 1 - int(np.argmin(losses)) == 2


def test_clipping_is_reported(toy_config: Config, toy_text: TokenizedCorpus, new_state: New) -> None:
    tight = run(new_state(toy_config), toy_text, toy_config.override({"clip_norm": 1e-6}))[0]
    loose = run(new_state(toy_config), toy_text, toy_config.override({"clip_norm": 1e6}))[0]
    assert (tight.clipped_share, loose.clipped_share) == (1.0, 0.0)
    assert loose.grad_norm > 0


def test_bf16_comes_near_fp32(toy_config: Config, toy_text: TokenizedCorpus, new_state: New) -> None:
    exact, rounded = (
        run(new_state(c), toy_text, c)[-1].validation.perplexity
        for c in (toy_config, toy_config.override({"precision": "bf16"}))
    )
    assert rounded == pytest.approx(exact, rel=0.05)


def test_a_state_without_optimizers_is_refused(toy_config: Config, toy_text: TokenizedCorpus, new_state: New) -> None:
    state = new_state(toy_config)
    state.optimizers = []
    with pytest.raises(UserError, match="training needs the optimizer's state: got a checkpoint without"):
        run(state, toy_text, toy_config)


def test_a_step_that_does_not_fit_into_memory_is_told_as_that(toy_config: Config, new_state: New) -> None:
    config = toy_config.override({"seq_len": 2048, "batch_size": 4096})  # attention weights of 137 GB
    windows = Windows(np.zeros(4096 * 2048 + 1, np.uint8), 2048)
    with pytest.raises(MemoryError, match=r"a step must fit into memory: got .* Try --micro-batch-size 8"):
        next(train.fit(new_state(config), windows, windows, config.train))
