import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from urllib3.connection import HTTPConnection

from experiments.process import TakenOverError
from experiments.settings import Settings
from experiments.steady import RUNS, steadied
from experiments.tracking import PrunedError, Tracker, is_passing
from lm.errors import DivergedError, UserError
from lm.evaluate import Evaluation
from lm.train import EpochReport


def report(epoch: int) -> EpochReport:
    e = Evaluation(20.0, 10)
    return EpochReport(epoch, 7 * epoch, e, e, True, 2.0, 1e-3, 0.4, 0.25, 1000.0, 1.5)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "FINISHED", None),
        (PrunedError("pruned after epoch 3"), "KILLED", "pruned after epoch 3"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
        (DivergedError("loss must stay finite"), "FAILED", "DivergedError: loss must stay finite"),
        (RuntimeError("ours"), "FAILED", "RuntimeError: ours"),
    ],
)
def test_a_run_ends_with_its_true_status(
    tracker: Tracker, error: BaseException | None, status: str, reason: str | None
) -> None:
    run_id = ""
    try:
        with tracker.run("test", {}) as run:
            run_id = run.id
            if error:
                raise error
    except BaseException as e:
        assert e is error
    ended = tracker.client.get_run(run_id)
    assert ended.info.status == status
    assert ended.info.end_time is not None
    assert ended.data.tags.get("lm.reason") == reason


def test_a_resumed_run_that_ends_well_loses_its_old_reason(tracker: Tracker) -> None:
    with pytest.raises(KeyboardInterrupt), tracker.run("test", {}) as run:
        raise KeyboardInterrupt
    with tracker.run("test", {}, run.id) as again:
        assert tracker.client.get_run(run.id).info.status == "RUNNING"
    assert again.id == run.id
    ended = tracker.client.get_run(run.id)
    assert (ended.info.status, ended.data.tags["lm.reason"]) == ("FINISHED", "")


def test_an_epoch_is_logged_once_with_all_its_figures(tracker: Tracker) -> None:
    with tracker.run("test", {}) as run:
        for epoch in (1, 2, 2, 1, 3):
            run.log_epoch(report(epoch), {"validation_loss": 1.5, "validation_perplexity": 4.5})
    names = {"train_loss", "train_perplexity", "validation_loss", "validation_perplexity", "lr", "grad_norm",
             "clipped_share", "tokens_per_second", "epoch_seconds"}  # fmt: skip
    logged = tracker.client.get_run(run.id).data.metrics
    assert set(logged) == names
    for name in names:
        assert [m.step for m in tracker.client.get_metric_history(run.id, name)] == [1, 2, 3]


def test_more_metrics_than_mlflow_takes_at_once_are_all_logged(tracker: Tracker) -> None:
    with tracker.run("test", {}) as run:
        many = {f"m{i}": float(i) for i in range(2000)}
        run.log_metrics({name: many[name] for name in list(many)[1800:]}, 1)  # by a process that died then
        for _ in range(2):
            run.log_once(many, 1)
    assert run.metrics() == many
    assert all(len(tracker.client.get_metric_history(run.id, name)) == 1 for name in ("m0", "m899", "m900", "m1999"))


def test_every_figure_of_a_leaking_run_says_so(tracker: Tracker) -> None:
    with tracker.run("test", {}) as run:
        run.mark_leaking(["training path: it leaks"])
        for _ in range(2):
            run.log_epoch(report(1), {"validation_perplexity": 1.29})
    logged = tracker.client.get_run(run.id).data
    assert logged.tags["lm.leak"] == "training path: it leaks"
    assert logged.metrics["leaking_validation_perplexity"] == 1.29
    assert all(name.startswith("leaking_") for name in logged.metrics)
    assert len(tracker.client.get_metric_history(run.id, "leaking_validation_perplexity")) == 1
    assert tracker.open_run(run.id).leaks


def test_a_run_says_what_it_was_made_with(tracker: Tracker) -> None:
    with tracker.run("test", {"lm.kind": "train"}) as run:
        pass
    tags = run.tags()
    assert tags["lm.kind"] == "train"
    assert tags["version.torch"]
    assert tags["version.python"]


def test_runs_are_found_by_id_and_by_name(tracker: Tracker) -> None:
    with tracker.run("its mine", {}):
        pass
    with tracker.run("it's mine", {}) as run:
        pass
    assert tracker.find_run(run.id).info.run_id == run.id
    assert tracker.find_run("it's mine").info.run_id == run.id
    with pytest.raises(UserError, match=r"a run must be named by its id or name: got 'nothing'.*Try it"):
        tracker.find_run("nothing")


def test_everything_is_under_the_folder_of_the_laboratory(tracker: Tracker, lab: Path) -> None:
    with tracker.run("test", {}) as run:
        run.log_page("a/b.txt", "text")
    assert run.checkpoints == lab / "artifacts" / run.id / "artifacts" / "checkpoints"
    assert (lab / "artifacts" / run.id / "artifacts" / "a" / "b.txt").read_text() == "text"


def test_links_hold_the_experiment_and_the_runs(tracker: Tracker) -> None:
    link = tracker.compare_link("http://x", ["a", "b"])
    assert (
        link == f"http://x/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%22{tracker.experiment_id}%22%5D"
    )
    assert "compareRunsMode=CHART" in tracker.charts_link("http://x")


def test_an_unreachable_store_is_one_line_without_the_password(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:1")
    with pytest.raises(UserError, match="the store must be reachable and writable") as caught:
        Tracker(Settings.load())
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


OPEN = """
from experiments.process import TakenOverError
from experiments.settings import Settings
from experiments.locks import store_lock
from experiments.tracking import Tracker
from experiments import study
settings = Settings.load()
tracker = Tracker(settings)
with tracker.run("run", {}) as run:
    run.log_metrics({"x": 1.0}, 1)
with store_lock(settings):
    opened = study.open_study(study.open_storage(settings.optuna_storage), "one", {"lr": 1e-3}, 1)
"""


def test_a_file_that_is_no_database_is_one_line(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab / "text.db").write_text("this is no database, and long enough to be sure of it\n" * 50)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{lab}/text.db")
    with pytest.raises(UserError, match="the store must be reachable and writable") as caught:
        Tracker(Settings.load())
    assert "\n" not in str(caught.value)


def test_an_artifact_root_that_cannot_be_written_stops_before_any_run(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_ARTIFACT_ROOT", "/proc/nope")
    with pytest.raises(UserError, match=r"the store must be writable: got .* for /proc/nope"):
        Tracker(Settings.load())


def test_a_run_is_possible_without_git(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with tracker.run("test", {}) as run:
        pass
    assert run.tags()["lm.code_version"].startswith("unknown: ")


def test_a_remote_ui_has_its_own_address_without_a_password(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(Settings.load())
    assert tracker.ui_address(5050) == "http://127.0.0.1:5050"
    monkeypatch.setattr(
        tracker, "settings", replace(tracker.settings, tracking_uri="https://bob:secret@host:8/mlflow/")
    )
    assert tracker.ui_address() == "https://host:8/mlflow"


def test_processes_that_start_at_once_on_an_empty_store_all_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_MLRUNS_DIR", str(tmp_path / "new"))
    started: list[subprocess.Popen[Any]] = [
        subprocess.Popen([sys.executable, "-c", OPEN], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [p.communicate()[1] for p in started]
    assert [p.returncode for p in started] == [0, 0], errors
    tracker = Tracker(Settings.load())
    runs = tracker.client.search_runs([tracker.experiment_id])
    assert [r.info.status for r in runs] == ["FINISHED", "FINISHED"]
    from experiments import study

    opened = study.latest_study(study.open_storage(Settings.load().optuna_storage), "one")
    assert len(opened.trials) == 1


def test_an_error_in_a_run_that_was_taken_over_is_not_the_runs(tracker: Tracker) -> None:
    run_id, told = "", ""
    try:
        with tracker.run("test", {}) as run:
            run_id = run.id
            tracker.client.set_tag(run_id, "lm.process", "elsewhere:1:1")
            raise RuntimeError("the other process has removed what this one was writing")
    except TakenOverError as e:
        told = str(e)
    assert told == "run test was taken over by elsewhere:1:1"
    assert tracker.client.get_run(run_id).info.status == "RUNNING"


def test_an_experiment_that_another_host_has_just_made_is_taken(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "both")
    here = Tracker(Settings.load())
    looked: list[str] = []

    class Late:
        """A client whose first look came before the other host's experiment."""

        def get_experiment_by_name(self, name: str) -> object:
            looked.append(name)
            return None if len(looked) == 1 else here._plain.get_experiment_by_name(name)

        def __getattr__(self, name: str) -> object:
            return getattr(here._plain, name)

    there = Tracker(Settings.load())
    monkeypatch.setattr(there, "client", Late())
    assert there._experiment() == here.experiment_id
    assert len(looked) == 2


def test_weights_that_another_host_is_removing_are_removed_once(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracker.run("loser", {}) as run:
        model = tracker.client.create_logged_model(tracker.experiment_id, name="model", source_run_id=run.id)
    plain, lost = tracker._plain, [requests.exceptions.ConnectionError("the answer was lost")]

    class Lossy:
        """A client whose first deletion is done, twice over, without an answer."""

        def delete_logged_model(self, model_id: str) -> None:
            plain.delete_logged_model(model_id)
            while lost:
                raise lost.pop()
            plain.delete_logged_model(model_id)  # what the other host's would meet

        def __getattr__(self, name: str) -> object:
            return getattr(plain, name)

    monkeypatch.setattr(tracker, "_plain", Lossy())
    tracker.remove_weights(plain.get_run(run.id), "not among the best 3")
    assert plain.search_logged_models([tracker.experiment_id]) == []
    assert tracker.tags(run.id)["lm.weights"] == "removed: not among the best 3"
    other = tracker.client.create_logged_model(tracker.experiment_id, name="model", source_run_id=run.id)
    plain.delete_tag(run.id, "lm.weights")
    tracker.remove_weights(plain.get_run(run.id), "not among the best 3")
    assert plain.search_logged_models([tracker.experiment_id]) == []
    assert other.model_id != model.model_id


def test_a_step_that_another_host_logged_in_an_outage_is_not_logged_again(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracker.run("cut off", {}) as run:
        plain, away = tracker._plain, [requests.exceptions.ConnectionError("the link is down")]

        class CutOff:
            """A client that is cut off between its look and its point, which the run's heir logs meanwhile."""

            def log_batch(self, run_id: str, **what: Any) -> None:
                while away:
                    plain.log_metric(run_id, "validation_loss", 2.0, step=3)
                    raise away.pop()
                plain.log_batch(run_id, **what)

            def __getattr__(self, name: str) -> object:
                return getattr(plain, name)

        run.client = steadied(CutOff(), is_passing, RUNS)  # type: ignore[assignment]
        run.log_once({"validation_loss": 2.0, "train_loss": 1.0}, step=3)
        assert [p.step for p in plain.get_metric_history(run.id, "validation_loss")] == [3]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs Linux")
def test_a_request_is_dropped_before_its_host_is_given_up(tracker: Tracker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = HTTPConnection("127.0.0.1", server.getsockname()[1])
        connection.connect()
        set_to = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        connection.close()
    assert 0 < set_to < 6000 * tracker.settings.heartbeat_seconds
