import os
import signal
import time
from collections.abc import Callable

import pytest

from experiments import budget
from experiments.budget import Stop
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus


def never() -> float:
    raise AssertionError("the best perplexity costs a query, and is asked for only where it counts")


def test_a_study_stops_for_a_wish_the_time_or_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Stop().reason(never) == ""
    assert Stop(until=50).reason(lambda: 50.1) == ""
    assert Stop(until=50).reason(lambda: 49.999) == "perplexity 50.00 is at most 50"
    late = Stop(hours=2)
    assert late.reason(never) == ""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7201)
    assert late.reason(never) == "2 hours are over"


def test_the_first_ctrl_c_is_a_wish_and_the_second_an_order() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason(never) == "interrupted"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_worker_stops_when_its_parent_has_died_and_a_study_under_nohup_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, study = Stop(with_parent=True), Stop()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert worker.reason(never) == "interrupted"
    assert study.reason(never) == ""


def test_the_forecast_is_in_the_right_order(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState]
) -> None:
    windows = toy_text.windows("train", toy_config.model.seq_len)
    few = toy_text.windows("validation", toy_config.model.seq_len)
    seconds = budget.seconds_an_epoch(toy_config, len(toy_text.vocab), windows, few)
    twice = toy_config.override({"n_layers": 16})
    assert 0 < seconds < 60
    assert budget.seconds_an_epoch(twice, len(toy_text.vocab), windows, few) > 1.5 * seconds
    weights = new_state(toy_config).model.n_parameters()
    assert budget.checkpoint_bytes(toy_config, len(toy_text.vocab)) == 20 * weights
