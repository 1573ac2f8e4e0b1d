import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from experiments import study as studies
from experiments.settings import Settings
from lm.errors import UserError

POINT = {"n_layers": 4, "lr": 1e-4, "clip_norm": 0.5}


@pytest.fixture
def storage(lab: Path) -> optuna.storages.RDBStorage:
    return studies.open_storage(Settings.load().optuna_storage)


@pytest.fixture
def study(storage: optuna.storages.RDBStorage) -> optuna.Study:
    return studies.open_study(storage, "test", 0, POINT)


def suggest(trial: optuna.Trial) -> dict[str, float]:
    from experiments.search_space import SPACE, suggest

    return dict(suggest(trial, SPACE))


def complete(study: optuna.Study, value: float) -> optuna.Trial:
    trial = studies.ask(study)
    suggest(trial)
    trial.report(value, 1)
    study.tell(trial, value)
    return trial


def test_trial_zero_is_the_recipes_own_point(study: optuna.Study) -> None:
    assert suggest(studies.ask(study)) == POINT


def test_the_total_counts_all_but_interrupted_trials(study: optuna.Study) -> None:
    complete(study, 10.0)
    pruned, failed, interrupted, running = (studies.ask(study) for _ in range(4))
    for trial in (pruned, failed, interrupted, running):
        suggest(trial)
    studies.tell_pruned(study, pruned)
    studies.tell_failed(study, failed)
    studies.requeue(study, interrupted)
    assert studies.count(study) == 4
    again = studies.ask(study)
    assert suggest(again) == study.trials[interrupted.number].params
    assert studies.count(study) == 5


def test_a_dead_process_gives_its_trial_back(study: optuna.Study) -> None:
    trial, mine = studies.ask(study), studies.ask(study)
    point = suggest(trial)
    suggest(mine)
    trial.set_user_attr(studies.RUN_ID, "run of the dead")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = trial.user_attrs["owner"].split(":")[0]
    trial.set_user_attr("owner", f"{host}:{gone.stdout.strip()}")
    assert studies.release_dead(study) == ["run of the dead"]
    states = [t.state for t in study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert suggest(studies.ask(study)) == point


def test_a_continued_study_draws_new_points(storage: optuna.storages.RDBStorage) -> None:
    points: list[dict[str, float]] = []
    for _ in range(2):
        study = studies.open_study(storage, "again", 0, POINT)
        for _ in range(3):
            trial = studies.ask(study)
            points.append(suggest(trial))
            study.tell(trial, 1.0)
    assert len({tuple(p.values()) for p in points}) == 6


def test_the_ranking_counts_a_trials_best_epoch(study: optuna.Study) -> None:
    complete(study, 10.0)
    trial = studies.ask(study)
    suggest(trial)
    for epoch, value in enumerate((12.0, 9.0, 11.0), 1):
        trial.report(value, epoch)
    studies.tell_pruned(study, trial)
    assert [t.number for t in studies.finished(study)] == [1, 0]
    assert studies.best_value(study.trials[1]) == 9.0


def test_figures_can_be_made_of_one_trial_and_of_many(study: optuna.Study) -> None:
    complete(study, 10.0)
    assert "Importances" not in [heading for heading, _, _ in studies.figures(study)]
    for _ in range(20):
        trial = studies.ask(study)
        value = suggest(trial)["n_layers"]
        trial.report(value, 1)
        study.tell(trial, value)
    headings = [heading for heading, _, _ in studies.figures(study)]
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
