import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from experiments import study as studies
from experiments.process import is_gone, own_name
from experiments.settings import Settings
from lm.errors import UserError

GONE = "from experiments.process import own_name; print(own_name())"
POINT = {"n_layers": 4, "lr": 1e-4, "clip_norm": 0.5}


@pytest.fixture
def storage(lab: Path) -> optuna.storages.RDBStorage:
    return studies.open_storage(Settings.load().optuna_storage)


@pytest.fixture
def study(storage: optuna.storages.RDBStorage) -> optuna.Study:
    return studies.open_study(storage, "test", POINT)


def ask(study: optuna.Study) -> optuna.Trial:
    trial = studies.ask(study, total=99, seed=0)
    assert trial is not None
    return trial


def suggest(trial: optuna.Trial) -> dict[str, float]:
    from experiments.search_space import SPACE, suggest

    return dict(suggest(trial, SPACE))


def complete(study: optuna.Study, value: float) -> optuna.Trial:
    trial = ask(study)
    suggest(trial)
    trial.report(value, 1)
    study.tell(trial, value)
    return trial


def test_trial_zero_is_the_recipes_own_point(study: optuna.Study) -> None:
    assert suggest(ask(study)) == POINT


def test_the_total_counts_all_but_interrupted_trials(study: optuna.Study) -> None:
    complete(study, 10.0)
    pruned, failed, interrupted, running = (ask(study) for _ in range(4))
    for trial in (pruned, failed, interrupted, running):
        suggest(trial)
    studies.tell_pruned(study, pruned)
    studies.tell_failed(study, failed)
    studies.requeue(study, interrupted)
    assert studies.count(study) == 4
    again = ask(study)
    assert suggest(again) == study.trials[interrupted.number].params
    assert studies.count(study) == 5


def test_a_dead_process_gives_its_trial_back(study: optuna.Study) -> None:
    trial, mine = ask(study), ask(study)
    point = suggest(trial)
    suggest(mine)
    gone = subprocess.run([sys.executable, "-c", GONE], capture_output=True, text=True, check=True)
    trial.set_user_attr("owner", gone.stdout.strip())
    studies.release_dead(study)
    states = [t.state for t in study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert suggest(ask(study)) == point


def test_a_process_of_the_same_pid_that_began_later_is_another(study: optuna.Study) -> None:
    host, pid, start = own_name().rsplit(":", 2)
    assert not is_gone(f"{host}:{pid}:{start}")
    assert is_gone(f"{host}:{pid}:{int(start) - 1}")
    assert not is_gone(f"elsewhere:{pid}:{start}")
    assert not is_gone("")


def test_a_process_that_died_while_asking_or_telling_loses_no_trial(study: optuna.Study) -> None:
    study.ask()  # died before it signed the trial
    studies.release_dead(study)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    again = ask(study)
    study.enqueue_trial(POINT, user_attrs={"requeued": again.number})  # died between queueing and telling
    studies.requeue(study, again)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.WAITING]
    assert suggest(ask(study)) == POINT


def test_no_trial_beyond_the_total_is_given_out(study: optuna.Study) -> None:
    given = [studies.ask(study, total=2, seed=0) for _ in range(3)]
    assert [t.number if t else None for t in given] == [0, 1, None]


def test_an_interrupted_trial_zero_stays_the_one_to_compare_with(study: optuna.Study) -> None:
    studies.requeue(study, ask(study))  # before it drew anything
    assert studies.origin(study) is None
    again = ask(study)
    assert suggest(again) == POINT
    again.report(7.0, 1)
    study.tell(again, 7.0)
    found = studies.origin(study)
    assert found is not None
    assert found.number == again.number


def test_the_median_rule_prunes_from_the_second_epoch_and_after_four_trials(study: optuna.Study) -> None:
    def learn(values: list[float]) -> int | None:
        trial = ask(study)
        suggest(trial)
        for epoch, value in enumerate(values, 1):
            trial.report(value, epoch)
            if trial.should_prune():
                studies.tell_pruned(study, trial)
                return epoch
        study.tell(trial, values[-1])
        return None

    assert [learn([100.0, 50.0, 20.0]) for _ in range(4)] == [None] * 4
    assert learn([900.0, 800.0, 700.0]) == 2
    assert learn([90.0, 40.0, 10.0]) is None


def test_a_continued_study_draws_new_points(storage: optuna.storages.RDBStorage) -> None:
    points: list[dict[str, float]] = []
    for _ in range(2):
        study = studies.open_study(storage, "again", POINT)
        for _ in range(3):
            trial = ask(study)
            points.append(suggest(trial))
            study.tell(trial, 1.0)
    assert len({tuple(p.values()) for p in points}) == 6


def test_the_ranking_counts_a_trials_best_epoch(study: optuna.Study) -> None:
    complete(study, 10.0)
    trial = ask(study)
    suggest(trial)
    for epoch, value in enumerate((12.0, 9.0, 11.0), 1):
        trial.report(value, epoch)
    studies.tell_pruned(study, trial)
    assert [t.number for t in studies.finished(study)] == [1, 0]
    assert studies.best_value(study.trials[1]) == 9.0


def test_figures_can_be_made_of_one_trial_and_of_many(study: optuna.Study) -> None:
    complete(study, 10.0)
    assert "Importances" not in [heading for heading, _, _ in studies.figures(study, baseline=134.4)]
    for _ in range(20):
        trial = ask(study)
        value = suggest(trial)["n_layers"]
        trial.report(value, 1)
        study.tell(trial, value)
    headings = [heading for heading, _, _ in studies.figures(study, baseline=134.4)]
    assert headings == ["History", "Epoch by epoch", "Importances", "Parallel coordinates", "Slices"]
    assert max(studies.importances(study).items(), key=lambda item: item[1])[0] == "n_layers"


def test_a_study_that_is_not_there_is_named_with_one_that_is(study: optuna.Study) -> None:
    storage = studies.open_storage(Settings.load().optuna_storage)
    with pytest.raises(UserError, match="a study must be named as it is stored: got 'other'. Try test"):
        studies.latest_study(storage, "other")
    assert studies.latest_study(storage, None).study_name == "test"


def test_an_empty_or_unreachable_storage_is_one_line(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a report needs a study"):
        studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    with pytest.raises(UserError, match="Optuna's storage must be reachable and writable") as caught:
        studies.open_storage(f"sqlite:///{tmp_path}/no/such/folder/optuna.db")
    assert "\n" not in str(caught.value)
