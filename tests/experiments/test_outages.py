"""Studies whose processes are killed, whose servers go away, whose disk fills: nothing is lost, all is told truly."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import torch

from experiments import study as studies
from experiments import train, tune
from experiments.locks import store_lock
from experiments.settings import Settings
from experiments.tracking import Tracker
from lm.errors import UserError
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
TUNE = [sys.executable, str(ROOT / "experiments/tune.py")]
BEGUN = b"forecast: "
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


class Postgres:
    """A server of its own in a temporary folder, run as the user postgres where we are root.

    With a password everybody needs one; with a network it also listens there.
    """

    def __init__(self, folder: Path, password: str = "", address: str = "", network: str = "") -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            pytest.skip("needs PostgreSQL: apt-get install postgresql")
        self.bin, self.data, self.port = found[-1].parent, folder / "data", free_port()
        self.password, self.listen = password, ",".join(filter(None, ("127.0.0.1", address)))
        folder.mkdir()
        way = ["-A", "trust"]
        if password:
            (folder / "password").write_text(password)
            way = ["-A", "scram-sha-256", f"--pwfile={folder / 'password'}"]
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "-D", str(self.data), *way, "-U", "lm", "--no-sync")
        if network:
            with (self.data / "pg_hba.conf").open("a") as f:
                f.write(f"host all all {network} scram-sha-256\n")
        self.start()
        if not password:
            self.sql("create database optuna")
            self.sql("create database mlflow")

    def sql(self, *statements: str) -> None:
        own = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "lm", "-d", "postgres", "-q", "-v", "ON_ERROR_STOP=1")
        self._run("psql", *own, *(part for statement in statements for part in ("-c", statement)))

    def _run(self, program: str, *arguments: str) -> None:
        user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        environment = {**os.environ, "PGPASSWORD": self.password}
        with tempfile.TemporaryFile("w+") as said:  # a pipe would be held open by the server
            command = [*user, str(self.bin / program), *arguments]
            done = subprocess.run(command, stdout=said, stderr=said, cwd="/tmp", check=False, env=environment)
            said.seek(0)
            assert done.returncode == 0, said.read()

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses={self.listen} -c fsync=off -k {self.data}"
        self._run("pg_ctl", "-D", str(self.data), "-o", options, "-l", str(self.data / "log"), "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "stop")

    def uri(self, database: str) -> str:
        return f"postgresql://lm@127.0.0.1:{self.port}/{database}"


@pytest.fixture
def postgres() -> Generator[Postgres]:
    folder = Path(f"/tmp/lm-postgres-{os.getpid()}")  # pytest's own folders are closed to other users
    shutil.rmtree(folder, ignore_errors=True)
    server = Postgres(folder)
    yield server
    with contextlib.suppress(AssertionError):
        server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def tell_logs(tmp_path: Path) -> Generator[None]:
    """What the processes printed, shown where a test fails."""
    yield
    for log in sorted(tmp_path.rglob("*.log")):
        print(f"--- {log.name}", log.read_text(errors="replace")[-3000:], sep="\n")


def start(argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`tune.py` as a process of one thread that writes to `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as f:
        return subprocess.Popen([*TUNE, *argv], stdout=f, stderr=subprocess.STDOUT, env=environment)


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def the_study() -> optuna.Study:
    return studies.latest_study(studies.open_storage(Settings.load().optuna_storage), None)


def epochs_done() -> int:
    """Epochs of all trials so far; 0 before the study is there."""
    engine = sqlalchemy.create_engine(Settings.load().optuna_storage, poolclass=sqlalchemy.NullPool)
    with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError), engine.connect() as connection:
        return int(connection.execute(sqlalchemy.text("select count(*) from trial_intermediate_values")).scalar_one())
    return 0


def check_study(total: int, keep: int | None = None) -> optuna.Study:
    """The promises: the total, one run a trial with its true status, no step of a metric twice, one model a trial.

    With `keep`, models of the best so many are there, and none of trials that did not end.
    """
    study, tracker = the_study(), Tracker(Settings.load())
    trials = study.get_trials()
    assert len(trials) == total
    assert all(t.state.is_finished() for t in trials)
    runs = {run.data.tags["lm.trial"]: run for run in tracker.runs_of_study(study.study_name)}
    everything = tracker.client.search_runs([tracker.experiment_id], "tags.`lm.kind` = 'trial'", max_results=1000)
    assert len(everything) == len(runs) == total
    for trial in trials:
        run = runs[str(trial.number)]
        assert run.info.status == STATUS[trial.state.name], trial.number
        assert run.info.run_id == trial.user_attrs[studies.RUN_ID]
        logged = tracker.client.get_metric_history(run.info.run_id, "validation_perplexity")
        assert {point.step: point.value for point in logged} == trial.intermediate_values
        assert sorted(trial.intermediate_values) == list(range(1, len(logged) + 1))
    models = tracker.client.search_logged_models([tracker.experiment_id], max_results=100)
    complete = [t.user_attrs[studies.RUN_ID] for t in studies.complete(study)]
    made = sorted(str(m.source_run_id) for m in models)
    if keep is None:
        assert made == sorted(complete)
    else:
        assert len(made) == len(set(made))
        assert set(complete[:keep]) <= set(made) <= set(complete)
    uri = tracker.settings.tracking_uri
    if not uri.startswith("http"):
        twice = "select run_uuid, key, step from metrics group by run_uuid, key, step having count(*) > 1"
        with sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect() as connection:
            assert connection.execute(sqlalchemy.text(twice)).fetchall() == []
    return study


def check_figures(study: optuna.Study, trial: optuna.trial.FrozenTrial, flags: list[str]) -> None:
    """A trial has the figures of a run that nobody interrupted, with one thread as its workers had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    point = [part for key, value in trial.params.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    train.main([*flags, *point, "--run-name", f"unbroken-{trial.number}"])
    torch.set_num_threads(threads)
    tracker = Tracker(Settings.load())
    run_id = tracker.find_run(f"unbroken-{trial.number}").info.run_id
    unbroken = {p.step: p.value for p in tracker.client.get_metric_history(run_id, "validation_perplexity")}
    for epoch, value in trial.intermediate_values.items():
        assert value == unbroken[epoch], (trial.number, epoch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("store", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_four_workers_each_killed_five_times_at_random(
    store: str, lab: Path, flags: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store == "postgres":
        server: Postgres = request.getfixturevalue("postgres")
        monkeypatch.setenv("OPTUNA_STORAGE", server.uri("optuna"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri("mlflow"))
    own = [*flags, "--epochs", "40", "--patience", "0", "--lr", "0.003"]
    argv = [*own, "--trials", "20", "--keep", "all"]
    chance, kills = random.Random(0), [0, 0, 0, 0]
    logs = [lab / f"worker{i}.log" for i in range(4)]
    workers = [start(argv, log) for log in logs]
    try:
        for kill in range(20):
            i = kill % 4
            wait_for(lambda i=i: logs[i].read_bytes().count(BEGUN) > kills[i])  # type: ignore[misc]
            time.sleep(chance.uniform(0, 4))
            assert workers[i].poll() is None, "the study must be longer than the killing"
            workers[i].kill()
            workers[i].wait()
            kills[i] += 1
            workers[i] = start(argv, logs[i])
        for worker, log in zip(workers, logs, strict=True):
            assert worker.wait(timeout=900) == 0, log.read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
    study = check_study(20)
    deaths = {t.number: sum(1 for *_, ended in t.user_attrs[studies.SHIFTS] if ended) for t in study.trials}
    assert sum(deaths.values()) >= 12  # the others died between trials
    for trial in study.trials:
        if deaths[trial.number]:
            check_figures(study, trial, own)


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(900)
def test_postgresql_and_then_the_mlflow_server_are_away_for_twenty_seconds(
    postgres: Postgres, lab: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()

    def serve() -> subprocess.Popen[bytes]:
        command = [
            str(Path(sys.executable).with_name("mlflow")), "server", "--port", str(port), "--workers", "1",
            "--backend-store-uri", postgres.uri("mlflow"), "--artifacts-destination", str(lab / "served"),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (lab / "server.log").open("ab") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        wait_for(lambda: is_open(port))
        return server

    def end(server: subprocess.Popen[bytes]) -> None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        wait_for(lambda: not is_open(port))

    monkeypatch.setenv("OPTUNA_STORAGE", postgres.uri("optuna"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    own = [*flags, "--epochs", "20", "--patience", "0", "--lr", "0.003"]
    server = serve()
    study = start([*own, "--trials", "6", "--workers", "2", "--keep", "all"], lab / "study.log")
    try:
        wait_for(lambda: epochs_done() >= 5)
        postgres.stop()
        time.sleep(20)
        postgres.start()
        back = epochs_done()
        wait_for(lambda: epochs_done() > back + 5)
        end(server)
        time.sleep(20)
        server = serve()
        assert study.wait(timeout=600) == 0, (lab / "study.log").read_text()[-3000:]
        printed = (lab / "study.log").read_text()
        assert " is away (" in printed
        assert " is back after " in printed
        check_study(6)
        check_figures(the_study(), the_study().trials[0], own)
    finally:
        study.kill()
        end(server)


def is_open(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_suspended_past_the_grace_period_loses_its_trial_and_works_on(
    lab: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_HEARTBEAT_SECONDS", "1")
    own = [*flags, "--epochs", "40", "--patience", "0", "--lr", "0.003"]
    argv = [*own, "--trials", "4", "--keep", "all"]
    first = start(argv, lab / "first.log")
    second = None
    try:
        wait_for(lambda: epochs_done() >= 3)
        first.send_signal(signal.SIGSTOP)
        second = start(argv, lab / "second.log")
        wait_for(lambda: "its worker was not heard from" in (lab / "second.log").read_text())
        first.send_signal(signal.SIGCONT)
        for process, log in ((first, "first.log"), (second, "second.log")):
            assert process.wait(timeout=300) == 0, (lab / log).read_text()[-3000:]
        assert "was taken over" in (lab / "first.log").read_text()
        check_study(4)
        check_figures(the_study(), the_study().trials[0], own)
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_processes_at_once_on_an_empty_store(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_MLRUNS_DIR", str(tmp_path / "new"))
    for name in ("MLFLOW_TRACKING_URI", "OPTUNA_STORAGE"):
        monkeypatch.setenv(name, "")
    logs = [tmp_path / f"{i}.log" for i in range(10)]
    argv = [*flags, "--trials", "10", "--lr", "0.003", "--keep", "all"]
    processes = [start(argv, log) for log in logs]
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=500) == 0, log.read_text()[-3000:]
    study = check_study(10)
    assert len({tuple(t.params.values()) for t in study.trials}) == 10


def test_a_study_goes_on_when_a_full_disk_has_room_again(
    lab: Path, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        shutil.copytree(lab, disk / "mlruns")
        monkeypatch.setenv("LM_MLRUNS_DIR", str(disk / "mlruns"))
        own = [*flags, "--epochs", "6", "--patience", "0", "--lr", "0.003"]
        study = start([*own, "--trials", "2", "--keep", "all"], tmp_path / "study.log")
        wait_for(lambda: epochs_done() >= 2)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as f:
            while True:
                f.write(bytes(1 << 12))
        assert study.wait(timeout=60) == 2
        last = (tmp_path / "study.log").read_text().splitlines()[-1]
        assert last.startswith("tune.py: the ")
        assert "Try LM_MLRUNS_DIR=/another/folder." in last
        (disk / "filler").unlink()
        again = start([*own, "--trials", "2", "--keep", "all"], tmp_path / "again.log")
        assert again.wait(timeout=120) == 0, (tmp_path / "again.log").read_text()[-3000:]
        check_study(2)
        check_figures(the_study(), the_study().trials[0], own)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.postgres
def test_postgresql_gives_its_lock_to_one_host_and_the_other_gives_up(
    postgres: Postgres, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", postgres.uri("optuna"))
    with pytest.raises(UserError, match="a report needs a study: got an empty storage"):
        tune.main(["--status"])
    engine = sqlalchemy.create_engine(postgres.uri("optuna"), poolclass=sqlalchemy.NullPool)
    assert sqlalchemy.inspect(engine).get_table_names() == []
    here = Settings.load()
    monkeypatch.setenv("LM_MLRUNS_DIR", str(tmp_path / "there"))
    there = Settings.load()
    held = "the store must be free: got a lock held for 1 s by another host. Try to end"
    with store_lock(here), pytest.raises(UserError, match=held), store_lock(there, patience=1):
        pass
    with store_lock(there, patience=1):
        pass
