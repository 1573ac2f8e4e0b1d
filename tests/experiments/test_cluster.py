"""The templates of docs/cluster: their shell, their YAML, and the tune.py commands in them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments import cli, tune

CLUSTER = Path(__file__).parents[2] / "docs/cluster"
SLURM = (CLUSTER / "slurm.sbatch").read_text()
JOB = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
[CONTAINER] = JOB["spec"]["template"]["spec"]["containers"]
[IN_SLURM] = re.findall(r"python experiments/tune\.py (.*?) \\\n", SLURM)


@pytest.mark.parametrize("argv", [shlex.split(IN_SLURM), CONTAINER["command"][2:]])
def test_the_command_is_one_that_tune_takes(argv: list[str]) -> None:
    args = tune._parser().parse(argv)
    config = cli.config_of(args, patience=tune.PATIENCE)
    tune.check(config, tune.SPACE, args.trials, args.study)
    assert args.hours < 12


def test_slurm_stops_before_its_limit() -> None:
    hours, minutes, _ = re.findall(r"--time=(\d+):(\d+):(\d+)", SLURM)[0]
    assert tune._parser().parse(shlex.split(IN_SLURM)).hours < int(hours) + int(minutes) / 60
    assert subprocess.run(["bash", "-n", CLUSTER / "slurm.sbatch"], check=False).returncode == 0


def test_the_pods_settings_are_ones_that_are_read_and_no_secret_stands_there() -> None:
    given = {entry["name"]: entry for entry in CONTAINER["env"]}
    example = (CLUSTER.parents[1] / ".env.example").read_text()
    assert set(given) - {"OMP_NUM_THREADS"} <= {line.lstrip("#").split("=")[0] for line in example.splitlines()}
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "OPTUNA_STORAGE"):
        assert set(given[name]["valueFrom"]) == {"secretKeyRef"}
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    [volume] = JOB["spec"]["template"]["spec"]["volumes"]
    assert "emptyDir" in volume
    assert given["LM_MLRUNS_DIR"]["value"].startswith(mounts[volume["name"]])
    assert JOB["kind"] == "Job"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A submit folder whose python plays tune.py: ends as the file `end` says, or when it is interrupted."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    worker = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_): print('finishing the epoch', flush=True); time.sleep(0.5); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "pathlib.Path('started').write_text(' '.join(sys.argv[1:]))\n"
        "end = pathlib.Path('end').read_text()\n"
        "time.sleep(60) if end == 'never' else print(end)\n"
        "sys.exit(2 if 'must' in end else 0)\n"
    )
    (tmp_path / "worker.py").write_text(worker)
    scripts = {
        ".venv/bin/python": f'exec {sys.executable} {tmp_path}/worker.py "$@"',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }
    for name, line in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(node: Path, end: str) -> subprocess.Popen[bytes]:
    (node / "end").write_text(end)
    (node / "tmp").mkdir()
    environment = {
        **os.environ, "PATH": f"{node}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(node), "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "2", "TMPDIR": str(node / "tmp"), "SLURM_TMPDIR": "",
    }  # fmt: skip
    return subprocess.Popen(["bash", CLUSTER / "slurm.sbatch"], env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("end", "code", "requeued"),
    [
        ("never", 130, True),
        ("stopped: 3.5 hours are over", 0, True),
        ("lm@champion is now version 1", 0, False),
        ("stopped: perplexity 9 is at most 10", 0, False),
        ("the MLflow store must know the user", 2, False),
    ],
)
def test_a_slurm_task_asks_for_more_time_only_when_there_is_more_to_do(
    end: str, code: int, requeued: bool, node: Path
) -> None:
    job = start(node, end)
    if end == "never":
        for _ in range(200):
            if (node / "started").exists():
                break
            time.sleep(0.05)
        time.sleep(0.2)
        job.send_signal(signal.SIGINT)
    assert job.wait(timeout=30) == code
    assert (node / "started").read_text() == f"experiments/tune.py {IN_SLURM}"
    assert (node / "requeued").exists() == requeued
    if requeued:
        assert (node / "requeued").read_text() == "requeue 7_3\n"
    assert list((node / "tmp").iterdir()) == []


def test_the_ray_script_is_short_python() -> None:
    source = (CLUSTER / "ray_tune.py").read_text()
    compile(source, "ray_tune.py", "exec")  # Ray is no dependency
    assert len(source.splitlines()) < 100
