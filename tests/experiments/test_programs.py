"""The programs as a person uses them, in one process; bad input is in test_bad_input.py."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import report, train, tune
from experiments import run as runs
from experiments import study as studies
from experiments.settings import Settings
from experiments.tracking import Tracker
from lm.errors import DivergedError, UserError

ROOT = Path(__file__).parents[2]


def perplexities(tracker: Tracker, run_id: str) -> list[tuple[int, float]]:
    history = tracker.client.get_metric_history(run_id, "validation_perplexity")
    return [(m.step, m.value) for m in history]


def test_a_run_logs_all_that_is_promised(
    tracker: Tracker, flags: list[str], lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*flags, "--run-name", "mine", "--seed-text", "the otter"])
    run = tracker.find_run("mine")
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.01"
    assert int(run.data.params["n_parameters"]) > 0
    [used] = run.inputs.dataset_inputs
    assert used.dataset.name == "toy"
    assert run.data.tags["lm.corpus_digest"].startswith(used.dataset.digest)
    assert run.data.tags["lm.device"].startswith("cpu")
    artifacts = lab / "artifacts" / run.info.run_id / "artifacts"
    found = sorted(str(p.relative_to(artifacts)) for p in artifacts.rglob("*") if p.is_file())
    assert found == [
        "attention.html", "attention/epoch_000.safetensors",
        "attention/epoch_001.html", "attention/epoch_001.safetensors",
        "attention/epoch_002.html", "attention/epoch_002.safetensors",
        "checkpoints/best/config.json", "checkpoints/best/model.safetensors", "checkpoints/best/vocab.json",
        "checkpoints/last/config.json", "checkpoints/last/model.safetensors",
        "checkpoints/last/optimizer.safetensors", "checkpoints/last/vocab.json",
        "samples/epoch_001.txt", "samples/epoch_002.txt",
        "scores/test.safetensors", "scores/validation.safetensors",
    ]  # fmt: skip
    assert (artifacts / "samples/epoch_002.txt").read_text().startswith("the otter")
    [model] = tracker.client.search_logged_models([tracker.experiment_id])
    assert run.data.tags["lm.model_id"] == model.model_id
    printed = capsys.readouterr().out
    assert len(re.findall(r"^epoch \d/2  train loss .* validation loss .* tokens/s", printed, re.MULTILINE)) == 2
    assert "Next: python experiments/ui.py" in printed


def test_a_resumed_run_has_the_figures_of_an_unbroken_one(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train.main([*flags, "--epochs", "4", "--run-name", "unbroken"])

    logging = runs.TrackedRun.log_page

    def interrupt(run: runs.TrackedRun, path: str, content: str) -> None:
        if path == "attention/epoch_003.html":  # after the metrics of epoch 3, before its checkpoint
            raise KeyboardInterrupt
        logging(run, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(runs.TrackedRun, "log_page", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, "--epochs", "4", "--run-name", "broken"])
    broken = tracker.find_run("broken")
    assert broken.info.status == "KILLED"
    train.main(["--resume", "broken"])
    again = tracker.find_run("broken")
    assert (again.info.run_id, again.info.status) == (broken.info.run_id, "FINISHED")
    unbroken = tracker.find_run("unbroken").info.run_id
    assert perplexities(tracker, again.info.run_id) == perplexities(tracker, unbroken)
    assert len(perplexities(tracker, unbroken)) == 4


def test_more_epochs_go_on_in_the_same_run(tracker: Tracker, flags: list[str]) -> None:
    train.main([*flags, "--run-name", "short"])
    train.main(["--resume", "short", "--epochs", "3"])
    run = tracker.find_run("short")
    assert [step for step, _ in perplexities(tracker, run.info.run_id)] == [1, 2, 3]
    with pytest.raises(UserError, match="a finished run needs more epochs to go on: got 3 done"):
        train.main(["--resume", "short", "--epochs", "3"])
    with pytest.raises(UserError, match="a resumed run must keep its config: got --lr"):
        train.main(["--resume", "short", "--lr", "1"])
    with pytest.raises(UserError, match="a resumed run must keep its preset, name and seed"):
        train.main(["--resume", "short", "--preset", "tiny"])
    assert tracker.find_run("short").data.tags["lm.epochs"] == "3"


def test_a_run_that_cannot_go_on_says_why(tracker: Tracker, flags: list[str]) -> None:
    train.main([*flags, "--run-name", "cosine", "--schedule", "cosine"])
    with pytest.raises(UserError, match="a cosine schedule must keep its length: got --epochs 5, the run has 2"):
        train.main(["--resume", "cosine", "--epochs", "5"])
    train.main([*flags, "--run-name", "ended", "--epochs", "60", "--patience", "1", "--lr", "0.03"])
    with pytest.raises(UserError, match="a run that its patience ended needs more of it to go on: got --patience 1"):
        train.main(["--resume", "ended"])
    run = tracker.find_run("ended")
    tracker.client.update_run(run.info.run_id, status="RUNNING")
    with pytest.raises(UserError, match="a run must have ended to be resumed: got ended, which is running"):
        train.main(["--resume", "ended", "--patience", "5"])


def test_a_damaged_checkpoint_leaves_the_run_as_it_was(tracker: Tracker, flags: list[str], lab: Path) -> None:
    train.main([*flags, "--run-name", "cut"])
    run = tracker.find_run("cut")
    weights = lab / "artifacts" / run.info.run_id / "artifacts/checkpoints/last/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"got a damaged model\.safetensors"):
        train.main(["--resume", "cut", "--epochs", "9"])
    again = tracker.find_run("cut")
    assert again.info.status == "FINISHED"
    assert perplexities(tracker, run.info.run_id) == perplexities(tracker, again.info.run_id)


def test_another_runs_checkpoint_is_refused(tracker: Tracker, flags: list[str], lab: Path) -> None:
    train.main([*flags, "--run-name", "one"])
    train.main([*flags, "--run-name", "two", "--n-layers", "1"])
    one, two = (
        lab / "artifacts" / tracker.find_run(n).info.run_id / "artifacts/checkpoints/last" for n in ("one", "two")
    )
    shutil.rmtree(one)
    shutil.copytree(two, one)
    with pytest.raises(
        UserError, match="a run's checkpoint must be its own: got n_layers=1, the run was logged with 2"
    ):
        train.main(["--resume", "one", "--epochs", "3"])
    assert tracker.find_run("one").info.status == "FINISHED"


def test_a_study_whose_runs_are_gone_stops_before_training(tracker: Tracker, flags: list[str], lab: Path) -> None:
    small_study(flags, 1)
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    run_id = study.trials[0].user_attrs[studies.RUN_ID]
    tracker.client.delete_run(run_id)
    with sqlite3.connect(lab / "mlflow.db") as database:
        for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
            database.execute(f"delete from {table} where run_uuid = ?", (run_id,))
    with pytest.raises(UserError, match=f"a study's runs must be in the MLflow store: got no run {run_id}"):
        small_study(flags, 2)
    assert len(studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None).trials) == 1


def test_a_study_from_the_first_trial_to_the_champion(
    tracker: Tracker, flags: list[str], lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune.main([*flags, "--trials", "4", "--n-layers", "1", "--lr", "0.003"])
    printed = capsys.readouterr().out
    name = re.findall(r"^study (\S+): 0 of 4", printed, re.MULTILINE)[0]
    assert name.startswith("reference-toy-")
    assert len(re.findall(r"^trial \d \(\d/4 done\) ", printed, re.MULTILINE)) == 4
    assert "lm@champion is now version 1" in printed
    assert "serve    MLFLOW_TRACKING_URI=sqlite:///" in printed
    trials = tracker.runs_of_study(name)
    assert [r.data.tags["lm.trial"] for r in trials] == ["3", "2", "1", "0"]
    assert {k: float(trials[-1].data.params[k]) for k in ("n_layers", "lr", "clip_norm")} == {
        "n_layers": 1, "lr": 0.003, "clip_norm": 0.5,
    }  # fmt: skip
    [summary] = tracker.runs_of_study(name, "study")
    assert (lab / "artifacts" / summary.info.run_id / "artifacts/report.html").stat().st_size > 1_000_000
    assert (lab / "reports" / f"{name}.html").exists()
    champion = tracker.client.get_model_version_by_alias("lm", "champion")
    best = min(trials, key=lambda r: r.data.metrics["best_validation_perplexity"])
    assert champion.run_id == best.info.run_id

    tune.main([*flags, "--trials", "4", "--n-layers", "1", "--lr", "0.003"])
    assert "4 of 4 trials are there" in capsys.readouterr().out
    assert len(tracker.runs_of_study(name)) == 4
    tune.main([*flags, "--trials", "5", "--n-layers", "1", "--lr", "0.003"])
    assert len(tracker.runs_of_study(name)) == 5
    assert len(tracker.runs_of_study(name, "study")) == 1

    report.main([])
    assert f"reports/{name}.html" in capsys.readouterr().out


def small_study(flags: list[str], trials: int) -> None:
    tune.main([*flags, "--trials", str(trials), "--n-layers", "1", "--lr", "0.003"])


def test_a_pruned_trials_run_is_killed_and_says_when(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna.pruners.MedianPruner.prune", lambda _, study, trial: trial.number == 1)
    small_study(flags, 3)
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    trials = {r.data.tags["lm.trial"]: r for r in tracker.runs_of_study(study.study_name)}
    assert {n: r.info.status for n, r in trials.items()} == {"0": "FINISHED", "1": "KILLED", "2": "FINISHED"}
    assert trials["1"].data.tags["lm.reason"].startswith("pruned after epoch 1")
    assert len(perplexities(tracker, trials["1"].info.run_id)) == 1


def test_a_trial_that_reached_its_last_epoch_is_complete(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna.pruners.MedianPruner.prune", lambda *_: True)
    tune.main([*flags, "--trials", "1", "--epochs", "1", "--lr", "0.003"])
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    assert [t.state.name for t in study.trials] == ["COMPLETE"]


def test_a_diverged_trial_fails_counts_and_does_not_end_the_study(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = runs.train.fit

    def diverge(state: object, *args: object, **kwargs: object) -> object:
        if state.steps_done == 0 and next(calls) == 2:  # type: ignore[attr-defined]
            raise DivergedError("loss must stay finite: got nan by step 1")
        return training(state, *args, **kwargs)  # type: ignore[arg-type]

    calls = iter(range(9))  # the forecast, then a call for each trial
    monkeypatch.setattr(runs.train, "fit", diverge)
    small_study(flags, 3)
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    failed = next(r for r in tracker.runs_of_study(study.study_name) if r.data.tags["lm.trial"] == "1")
    assert failed.info.status == "FAILED"
    assert failed.data.tags["lm.reason"] == "DivergedError: loss must stay finite: got nan by step 1"


LONG = ["--epochs", "30", "--patience", "0", "--n-layers", "1", "--lr", "0.003"]


def begin_study(tracker: Tracker, argv: list[str], epochs: int) -> subprocess.Popen[str]:
    """A study in a process of its own, when its first trial has finished some epochs."""
    command = [sys.executable, str(ROOT / "experiments/tune.py"), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        begun = tracker.client.search_runs([tracker.experiment_id])
        if begun and len(perplexities(tracker, begun[0].info.run_id)) >= epochs:
            return process
        time.sleep(0.2)
    raise TimeoutError


def test_a_killed_trial_goes_on_in_its_run_with_equal_figures(tracker: Tracker, flags: list[str]) -> None:
    process = begin_study(tracker, [*flags, *LONG, "--trials", "2"], epochs=2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [killed] = tracker.client.search_runs([tracker.experiment_id])
    assert killed.info.status == "RUNNING"
    tune.main([*flags, *LONG, "--trials", "2"])
    tune.main([*flags, *LONG, "--trials", "2", "--study", "unbroken"])
    names = {study for study, _, _ in tracker.studies()}
    broken, unbroken = (
        {run.data.tags["lm.trial"]: run for run in tracker.runs_of_study(name)}
        for name in sorted(names, key=lambda name: name.startswith("unbroken"))
    )
    assert broken["0"].info.run_id == killed.info.run_id
    assert sorted(broken) == sorted(unbroken) == ["0", "1"]
    for number, run in broken.items():
        assert run.info.status == "FINISHED"
        assert run.data.params == unbroken[number].data.params
        figures = perplexities(tracker, run.info.run_id)
        assert figures == perplexities(tracker, unbroken[number].info.run_id)
        assert [step for step, _ in figures] == list(range(1, 31))


def test_ctrl_c_finishes_the_epoch_and_the_trial_waits(tracker: Tracker, flags: list[str]) -> None:
    process = begin_study(tracker, [*flags, *LONG, "--epochs", "4000", "--trials", "1"], epochs=1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "tune.py: interrupted; what was logged is kept."
    [run] = tracker.client.search_runs([tracker.experiment_id])
    epochs = len(perplexities(tracker, run.info.run_id))
    assert run.info.status == "KILLED"
    assert run.data.tags["lm.reason"] == f"interrupted after epoch {epochs}; the study goes on from there"
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    [trial] = study.trials
    assert (trial.state.name, len(trial.intermediate_values)) == ("WAITING", epochs)
    assert f"study {study.study_name}: 1 waiting of 1 trials" in printed
    assert f"trial 0  waiting after epoch {epochs}" in printed


def test_a_second_ctrl_c_and_sigterm_stop_at_once(tracker: Tracker, flags: list[str]) -> None:
    process = begin_study(tracker, [*flags, *LONG, "--epochs", "4000", "--trials", "1"], epochs=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    [run] = tracker.client.search_runs([tracker.experiment_id])
    assert (run.info.status, run.data.tags["lm.reason"]) == ("KILLED", "interrupted")
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    assert [t.state.name for t in study.trials] == ["WAITING"]


def test_budgets_end_a_study_at_an_epoch(
    tracker: Tracker, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tune.main([*flags, *LONG, "--trials", "3", "--until", "25"])
    assert re.search(r"^stopped: perplexity [\d.]+ is at most 25$", capsys.readouterr().out, re.MULTILINE)
    tune.main([*flags, *LONG, "--trials", "3", "--hours", "0"])
    assert "stopped: 0 hours are over" in capsys.readouterr().out
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    assert [t.state.name for t in study.trials] == ["WAITING"]
    [trial] = study.trials
    assert min(trial.intermediate_values.values()) <= 25 < trial.intermediate_values[1]


def test_a_search_of_other_fields_with_points_that_cannot_be_trained(
    tracker: Tracker, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*flags, "--trials", "6", "--epochs", "1", "--search", "n_heads=2,3", "dropout=0:0.3", "norm=pre,post"]
    tune.main(argv)
    assert "n_heads must divide d_model: got d_model=16, n_heads=3" in capsys.readouterr().out
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    ends = {t.params["n_heads"]: t.state.name for t in study.trials}
    assert ends == {2: "COMPLETE", 3: "FAIL"}
    for run in tracker.runs_of_study(study.study_name):
        trial = study.trials[int(run.data.tags["lm.trial"])]
        assert run.info.status == {"COMPLETE": "FINISHED", "FAIL": "FAILED"}[trial.state.name]


def test_a_window_that_does_not_fit_the_text_fails_its_trial_alone(tracker: Tracker, flags: list[str]) -> None:
    tune.main([*flags, "--trials", "5", "--epochs", "1", "--sampler", "random", "--search", "seq_len=8,100000"])
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    assert {t.params["seq_len"]: t.state.name for t in study.trials} == {8: "COMPLETE", 100000: "FAIL"}


def test_weights_of_losers_are_removed_and_those_of_the_best_stay(
    tracker: Tracker, flags: list[str], lab: Path
) -> None:
    tune.main([*flags, "--trials", "5", "--lr", "0.003", "--pruner", "none", "--keep", "best"])
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    best = studies.complete(study)[0].number
    kept = {
        run.data.tags["lm.trial"]
        for run in tracker.runs_of_study(study.study_name)
        if (lab / "artifacts" / run.info.run_id / "artifacts/checkpoints/best").exists()
    }
    assert kept == {str(best)}
    [model] = tracker.client.search_logged_models([tracker.experiment_id])
    assert model.source_run_id == studies.complete(study)[0].user_attrs[studies.RUN_ID]
    assert [p.name for p in (lab / "artifacts/models").iterdir()] == [model.model_id]
    losers = [run for run in tracker.runs_of_study(study.study_name) if run.data.tags["lm.trial"] != str(best)]
    assert all(run.data.tags["lm.weights"] == "removed: not among the best 1" for run in losers)
    assert all((lab / "artifacts" / run.info.run_id / "artifacts/attention.html").exists() for run in losers)


def test_workers_share_a_study(tracker: Tracker, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    tune.main([*flags, "--trials", "5", "--lr", "0.003", "--workers", "2"])
    printed = capfd.readouterr().out
    assert "2 workers of" in printed
    assert "lm@champion is now version 1" in printed
    study = studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)
    assert len(study.trials) == 5
    assert all(t.state.is_finished() for t in study.trials)
    assert {shift[0][-8:] for t in study.trials for shift in t.user_attrs[studies.SHIFTS]} == {"worker 1", "worker 2"}
