from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from experiments import study as studies
from experiments import study_page, tune
from experiments.search_space import SPACE, suggest
from experiments.settings import Settings
from lm.errors import UserError

POINT = {"n_layers": 4, "lr": 1e-4, "clip_norm": 0.5}


@pytest.fixture
def study(lab: Path) -> optuna.Study:
    storage = studies.open_storage(Settings.load().optuna_storage)
    studies.open_study(storage, "test", POINT, 20)
    return optuna.load_study(
        study_name="test", storage=Settings.load().optuna_storage, sampler=studies.Plans().new_sampler(0)
    )


def complete(study: optuna.Study, value: float) -> optuna.Trial:
    trial = study.ask()
    suggest(trial, SPACE)
    trial.report(value, 1)
    study.tell(trial, value)
    return trial


def test_trial_zero_is_the_recipes_own_point(study: optuna.Study) -> None:
    assert suggest(study.ask(), SPACE) == POINT


def test_trial_zero_is_compared_with_once_it_has_an_epoch(study: optuna.Study) -> None:
    trial = study.ask()
    assert studies.origin(study) is None
    trial.report(7.0, 1)
    found = studies.origin(study)
    assert found is not None
    assert found.number == 0


@pytest.mark.parametrize(("pruner", "ends"), [("median", 2), ("halving", 2), ("none", None)])
def test_a_bad_trial_is_pruned_from_the_second_epoch(study: optuna.Study, pruner: str, ends: int | None) -> None:
    study.pruner = studies.Plans(pruner=pruner).new_pruner()

    def learn(values: list[float]) -> int | None:
        trial = study.ask()
        suggest(trial, SPACE)
        for epoch, value in enumerate(values, 1):
            trial.report(value, epoch)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                return epoch
        study.tell(trial, values[-1])
        return None

    learned = [learn([100.0 - i, 50.0 - i, 20.0 - i]) for i in range(4)]
    if pruner != "halving":
        assert learned == [None] * 4
    assert learn([900.0, 800.0, 700.0]) == ends
    assert learn([1.0, 1.0, 1.0]) is None


def test_two_samplers_of_one_seed_draw_alike(study: optuna.Study) -> None:
    for kind in ("tpe", "random"):
        points: list[dict[str, object]] = []
        for _ in range(2):
            again = optuna.create_study(sampler=studies.Plans(sampler=kind).new_sampler(3))
            points.append(dict(suggest(again.ask(), SPACE)))
        assert points[0] == points[1]


def test_the_ranking_counts_a_trials_best_epoch(study: optuna.Study) -> None:
    complete(study, 10.0)
    trial = study.ask()
    suggest(trial, SPACE)
    for epoch, value in enumerate((12.0, 9.0, 11.0), 1):
        trial.report(value, epoch)
    study.tell(trial, state=TrialState.PRUNED)
    assert [t.number for t in studies.finished(study)] == [1, 0]
    assert studies.best_value(study.trials[1]) == 9.0


def test_figures_can_be_made_of_one_trial_and_of_many(study: optuna.Study) -> None:
    complete(study, 10.0)
    assert "Importances" not in [heading for heading, _, _ in study_page.figures(study, baseline=134.4)]
    for _ in range(20):
        trial = study.ask()
        value = suggest(trial, SPACE)["n_layers"]
        assert isinstance(value, int)
        trial.report(value, 1)
        study.tell(trial, value)
    headings = [heading for heading, _, _ in study_page.figures(study, baseline=134.4)]
    assert headings == ["History", "Epoch by epoch", "Importances", "Parallel coordinates", "Slices", "Timeline"]
    shares, ranges = study_page.importances(study), study_page.importance_ranges(study)
    assert max(shares, key=lambda name: shares[name]) == "n_layers"
    for low, high in ranges.values():
        assert 0 <= low < high <= 1
    assert ranges["n_layers"][1] > ranges["clip_norm"][1]


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
    with pytest.raises(UserError, match="OPTUNA_STORAGE must be sqlite:///FILE or postgresql://"):
        studies.open_storage("mysql://user@host/database")


def test_status_of_a_laboratory_without_a_study_makes_nothing(
    tmp_path: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_MLRUNS_DIR", str(tmp_path / "new"))
    with pytest.raises(UserError, match="a report needs a study: got an empty storage. Try python experiments/tune.py"):
        tune.main(["--status"])
    assert not (tmp_path / "new").exists()
    (lab / "optuna.db").write_bytes(b"")
    monkeypatch.setenv("LM_MLRUNS_DIR", str(lab))
    with pytest.raises(UserError, match="a report needs a study: got an empty storage. Try python experiments/tune.py"):
        tune.main(["--status"])
    assert (lab / "optuna.db").stat().st_size == 0


def test_status_says_that_what_waits_is_not_wanted_once_until_is_reached(
    study: optuna.Study, capsys: pytest.CaptureFixture[str]
) -> None:
    complete(study, 30.0)
    study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
    storage = studies.open_storage(Settings.load().optuna_storage)
    for until, said in (
        (20.0, "Next: the same tune.py command goes on with what waits"),
        (35.0, "Reached --until 35: what waits, waits for a tune.py without it"),
        (None, "Next: the same tune.py command goes on with what waits"),
    ):
        studies.open_study(storage, "test", POINT, 20, until)
        tune.main(["--status"])
        assert capsys.readouterr().out.splitlines()[-1] == said


def test_a_trial_of_another_program_is_named_where_its_run_is_needed(study: optuna.Study) -> None:
    complete(study, 30.0)
    with pytest.raises(UserError, match=r"must be runs in MLflow: got trial 0 without one, .*\. Try --study another"):
        studies.run_id(study.trials[0])
