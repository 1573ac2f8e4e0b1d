"""One training over several processes, as `torchrun` starts it: one run, logged once, whoever is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import tune
from experiments.settings import Settings
from experiments.tracking import TrackedRun, Tracker
from lm.errors import UserError

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
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match=r"a study shares its work out by trials: got torchrun\. Try --workers 2"):
        tune.main(flags)
