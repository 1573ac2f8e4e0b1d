"""One training over several processes, as `torchrun` starts it: one run, logged once, whoever is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lm.train
from experiments import train, tune
from experiments.settings import Settings
from experiments.tracking import TrackedRun, Tracker
from lm.errors import DivergedError, UserError
from tests.conftest import free_port

TRAIN = str(Path(__file__).parents[2] / "experiments/train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = ["--epochs", "8", "--n-layers", "3", "--d-model", "128", "--d-ff", "512"]


def start(argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as f:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(argv, stdout=f, stderr=subprocess.STDOUT, env=environment)


def rank_of(pid: int) -> str | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return None
    return next((v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")), None)


def the_run() -> TrackedRun:
    tracker = Tracker(Settings.load())
    (found,) = tracker.client.search_runs([tracker.experiment_id])
    return tracker.open_run(found.info.run_id)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0", "1"])
def test_after_kill_9_of_a_rank_the_same_run_goes_on_and_nothing_is_logged_twice(
    killed: str, lab: Path, flags: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "torchrun.log"
    job = start([*TORCHRUN, "--max-restarts", "2", TRAIN, *flags, *LONG], log)
    try:
        deadline = time.monotonic() + 120
        while b"epoch 2/8" not in log.read_bytes():
            assert time.monotonic() < deadline and job.poll() is None, log.read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(next(int(pid) for pid in children if rank_of(int(pid)) == killed), signal.SIGKILL)
        assert job.wait(150) == 0, log.read_text()[-5000:]
    finally:
        job.kill()
    said, run = log.read_text(), the_run()
    assert "goes on: its processes were started again" in said
    assert run.mlflow_run.info.status == "FINISHED"
    assert not run.tags().get("lm.reason")
    for metric in ("validation_perplexity", "train_loss", "attention/entropy"):
        steps = [point.step for point in run.client.get_metric_history(run.id, metric)]
        assert sorted(set(steps)) == sorted(steps) == list(range(metric.startswith("attention") ^ 1, 9)), metric
    unbroken = subprocess.run(
        [*TORCHRUN, TRAIN, *flags, *LONG, "--run-name", "unbroken"], capture_output=True, text=True, check=True
    )
    figures = r"epoch 8/8  (train loss .*\d) [* ] "
    assert re.findall(figures, said) == re.findall(figures, unbroken.stdout) != []


def test_a_study_under_torchrun_is_refused(lab: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"a study shares its work out by trials: got torchrun\. Try --workers 2"):
        tune.main(flags)


def begun(job: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as the single process of a torchrun job of that id."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    train.main(flags)


def test_a_job_goes_on_with_its_run_only_with_its_flags(
    lab: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DivergedError):
        begun("job", [*flags, "--lr", "1e9", "--clip-norm", "1e9"], monkeypatch)
    with pytest.raises(DivergedError):  # at once, since it would again
        begun("job", [*flags, "--lr", "1e9", "--clip-norm", "1e9"], monkeypatch)
    begun("job", flags, monkeypatch)
    assert "has other flags: a new run begins" in capsys.readouterr().out
    begun("job", flags, monkeypatch)
    assert "of this torchrun job is finished. Another --rdzv-id begins a new one" in capsys.readouterr().out
    tracker = Tracker(Settings.load())
    statuses = [run.info.status for run in tracker.client.search_runs([tracker.experiment_id])]
    assert sorted(statuses) == ["FAILED", "FINISHED"]


def test_a_job_whose_run_goes_on_in_another_process_is_refused(
    lab: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(Settings.load())
    with tracker.run("first", {"lm.job": "job"}), pytest.raises(UserError, match="Try another --rdzv-id"):
        begun("job", flags, monkeypatch)


def test_a_group_of_seeds_goes_on_after_a_restart(
    lab: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = lm.train.fit

    def cut(*args: Any) -> Iterator[lm.train.EpochReport]:
        for report in fit(*args):
            yield report
            if report.epoch == 2 and args[3].seed == 1:
                raise RuntimeError("cut off")

    monkeypatch.setattr(lm.train, "fit", cut)
    with pytest.raises(RuntimeError, match="cut off"):
        begun("job", [*flags, "--seeds", "2", "--epochs", "3"], monkeypatch)
    monkeypatch.setattr(lm.train, "fit", fit)
    begun("job", [*flags, "--seeds", "2", "--epochs", "3"], monkeypatch)
    assert "over 2 seeds" in capsys.readouterr().out
    tracker = Tracker(Settings.load())
    assert len(tracker.client.search_runs([tracker.experiment_id])) == 3


def test_a_launcher_that_does_not_tell_the_address_is_named(
    lab: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"must tell each RANK: got none\. Try torchrun"):
        train.main(flags)
