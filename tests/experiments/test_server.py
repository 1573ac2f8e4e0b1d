"""The shared server: docs/server.md, from an empty host to laptops that share nothing but two addresses."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from itertools import pairwise
from pathlib import Path

import mlflow
import optuna
import psycopg
import pytest
import requests
import yaml
from mlflow.cli import cli as mlflow_program

from experiments import server as program
from experiments import study as studies
from experiments.locks import store_lock
from experiments.settings import ServerSettings, Settings
from experiments.tracking import Tracker
from lm.errors import UserError
from tests.conftest import free_port
from tests.experiments.test_outages import Postgres, check_study, epochs_done, the_study, wait_for

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/server.md").read_text(encoding="utf-8")
SQL = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
SERVER_ENV, LAPTOP_ENV = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python experiments/")
]
SECRETS = {
    "DATABASE-PASSWORD": "of-the-database-1%",
    "STUDIES-PASSWORD": "of-the-studies-2%",
    "ADMIN-PASSWORD": "of-the-admin-3",
    "ANNAS-PASSWORD": "of-anna-herself-4",
}
"""What stands in the page's place of each; a percent sign has to survive URIs and MLflow's ini file."""


@pytest.fixture(autouse=True)
def _only_what_a_test_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "OPTUNA_STORAGE",
        "MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_AUTH_ADMIN_USERNAME",
        "MLFLOW_AUTH_ADMIN_PASSWORD", "LM_SERVER_ADDRESS", "LM_NEW_USER_PASSWORD", "LM_ARTIFACT_ROOT",
        "MLFLOW_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")


@pytest.fixture
def server_env(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://mlflow:se%25cret-of-db@h/mlflow")
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "secret-of-admin")
    monkeypatch.setenv("LM_SERVER_ADDRESS", "http://lab.example.org:5050")


@pytest.mark.usefixtures("server_env")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MLFLOW_AUTH_ADMIN_PASSWORD", "", "MLFLOW_AUTH_ADMIN_PASSWORD must be at least 12 .*: got none. Try "),
        ("MLFLOW_AUTH_ADMIN_PASSWORD", "tooshort", "must be at least 12 characters: got one of 8. Try "),
        ("MLFLOW_BACKEND_STORE_URI", "sqlite:///x.db", "must be a PostgreSQL database, .* got sqlite. Try "),
        ("MLFLOW_BACKEND_STORE_URI", "", "MLFLOW_BACKEND_STORE_URI must be a PostgreSQL .* got none. Try "),
        ("MLFLOW_BACKEND_STORE_URI", "postgresql://a:pass@word@h/x", "whose password is percent-encoded: .* Try %40"),
        ("OPTUNA_STORAGE", "postgresql://a:pass/word@h/x", "OPTUNA_STORAGE must be a URI whose password is .* Try %40"),
        ("OPTUNA_STORAGE", "postgresql://u:p@h:5432/mlflow", "must be two databases, .*: got mlflow twice. Try "),
        ("LM_SERVER_ADDRESS", "lab:5000", "LM_SERVER_ADDRESS must be what colleagues type, .*: got lab:5000. Try http://"),
        ("MLFLOW_TRACKING_USERNAME", "anna", "must be set together: got the USERNAME alone. Try setting both"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_serve_is_refused_in_one_line(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as error:
        program.main([])
    assert "\n" not in str(error.value)
    assert "pass" not in str(error.value).replace("password", "").replace("PASSWORD", "")


@pytest.mark.usefixtures("server_env")
def test_settings_do_not_show_their_secrets() -> None:
    settings = Settings.load(Path(os.devnull))
    assert "secret" not in repr(ServerSettings.load(settings, Path(os.devnull)))
    assert "secret" not in " ".join(program.command("0.0.0.0", 5000, 2))


def test_the_login_may_stand_in_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    file = tmp_path / ".env"
    file.write_text("MLFLOW_TRACKING_USERNAME=anna\nMLFLOW_TRACKING_PASSWORD=of-anna\n")
    settings = Settings.load(file)
    assert (settings.username, settings.password) == ("anna", "of-anna")
    assert "of-anna" not in repr(settings)


def test_mlflow_reads_the_auth_file_as_it_was_meant() -> None:
    uri = "postgresql://mlflow:p%40ss%25word@h/mlflow"
    config = configparser.ConfigParser()  # as mlflow.server.auth.config reads it
    config.read_string(program.auth_config(uri, "admin"))
    assert config["mlflow"]["database_uri"] == uri
    assert config["mlflow"]["default_permission"] == "MANAGE"


@pytest.mark.usefixtures("server_env")
def test_the_compose_file_is_yaml_without_a_secret_that_mlflow_can_parse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "s3://bucket/lm")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-s3")
    program.main(["--compose"])
    printed = capsys.readouterr().out
    assert "secret-of" not in printed
    assert "not run where it was written" in printed.splitlines()[0]
    made = yaml.safe_load(printed)
    assert list(made["services"]) == ["postgres", "mlflow"]
    service = made["services"]["mlflow"]
    assert service["environment"]["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://bucket/lm"
    assert "lab.example.org:*" in service["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert "OWNER studies" in made["configs"]["optuna.sql"]["content"]
    assert service["environment"]["AWS_SECRET_ACCESS_KEY"] == "${AWS_SECRET_ACCESS_KEY:?}"
    _, name, *argv = service["command"]
    assert mlflow_program.commands[name].make_context(name, list(argv)).params["app_name"] == "basic-auth"


@pytest.mark.usefixtures("server_env")
def test_a_user_is_not_added_where_no_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_NEW_USER_PASSWORD", "short")
    with pytest.raises(UserError, match="LM_NEW_USER_PASSWORD must be at least 12 characters: got one of 5. Try"):
        program.main(["--add-user", "anna"])
    monkeypatch.setenv("LM_NEW_USER_PASSWORD", "long-enough-for-it")
    with pytest.raises(
        UserError, match="the server must be running: got ConnectionError from 127.0.0.1:.*. Try python"
    ):
        program.main(["--add-user", "anna", "--port", str(free_port())])


class Host:
    """Another machine with a checkout, an `.env` and folders of its own.

    Where the kernel lets us: a network namespace on a bridge, with a name and pids of its own, and the server's folder
    hidden from it. Elsewhere: a process, which is cut off by being stopped.
    """

    def __init__(self, folder: Path, name: str, net: Network, env: str) -> None:
        self.folder, self.name, self.net = folder / name, name, net
        self.folder.mkdir()
        for part in ("lm", "experiments"):
            shutil.copytree(ROOT / part, self.folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        (self.folder / ".env").write_text(env)
        self.address = net.plug(name)
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, argv: list[str]) -> list[str]:
        python = [sys.executable, *argv]
        if not self.net.real:
            return python
        inside = f"hostname {self.name} && mount -t tmpfs none {self.net.hidden} && exec {shlex.join(python)}"
        new = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", inside]
        return ["ip", "netns", "exec", self.net.inside(self.name), *new]

    def environment(self, changed: Mapping[str, str]) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("LM_", "MLFLOW_", "OPTUNA_", "AWS_"))}
        return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder), "LM_HEARTBEAT_SECONDS": "1", **changed}

    def start(self, argv: list[str]) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(argv), stdout=log, stderr=log, cwd=self.folder, env=self.environment({})
            )

    def run(self, argv: list[str], **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(argv), capture_output=True, text=True, cwd=self.folder, env=self.environment(changed),
            timeout=60, check=False,
        )  # fmt: skip

    def is_named(self, owner: str) -> bool:
        """Whether a trial's owner is this host's process."""
        if self.net.real:
            return owner.startswith(self.name)
        return self.process is not None and f":{self.process.pid}:" in owner

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def cut(self) -> None:
        if self.net.real:
            self.net.link(self.name, "down")
        elif self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def join(self) -> None:
        if self.net.real:
            self.net.link(self.name, "up")
        elif self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Network:
    """A bridge of this machine with hosts in network namespaces, or none where that is not allowed."""

    def __init__(self, hidden: Path) -> None:
        self.hidden, self.names = hidden, list[str]()
        self.bridge = f"lm{os.getpid() % 10**6}"
        self.prefix = f"10.213.{os.getpid() % 256}"
        commands = (
            "unshare --net --uts --pid --fork --mount-proc mount -t tmpfs none /mnt",
            f"ip link add {self.bridge} type bridge",
            f"ip addr add {self.prefix}.1/24 dev {self.bridge}",
            f"ip link set {self.bridge} up",
        )
        self.real = bool(shutil.which("ip") and shutil.which("unshare")) and all(
            subprocess.run(shlex.split(command), capture_output=True, check=False).returncode == 0
            for command in commands
        )
        self.gateway = f"{self.prefix}.1" if self.real else "127.0.0.1"

    def inside(self, name: str) -> str:
        return f"{self.bridge}{name}"

    def plug(self, name: str) -> str:
        self.names.append(name)
        if not self.real:
            return "127.0.0.1"
        address, space, end = f"{self.prefix}.{len(self.names) + 1}", self.inside(name), f"{self.bridge}{name[-1]}"
        for command in (
            f"ip netns add {space}",
            f"ip link add {end} type veth peer name eth0 netns {space}",
            f"ip link set {end} master {self.bridge} up",
            f"ip -n {space} addr add {address}/24 dev eth0",
            f"ip -n {space} link set eth0 up",
            f"ip -n {space} link set lo up",
        ):
            subprocess.run(shlex.split(command), check=True)
        return address

    def link(self, name: str, state: str) -> None:
        subprocess.run(["ip", "link", "set", f"{self.bridge}{name[-1]}", state], check=True)

    def remove(self) -> None:
        if self.real:
            for name in self.names:
                subprocess.run(["ip", "netns", "del", self.inside(name)], check=False)
            subprocess.run(["ip", "link", "del", self.bridge], check=False)


class Lab:
    """The page's server, and what the page's placeholders stand for."""

    def __init__(self, folder: Path, postgres: Postgres, net: Network) -> None:
        self.postgres, self.net, self.port, self.folder = postgres, net, free_port(), folder
        for sql in SQL:
            postgres.sql(*(s for s in self.fill(sql).split(";\n") if s.strip() and "SYSTEM" not in s))
        self.mlruns = folder / "server"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("LM_", "MLFLOW_", "OPTUNA_", "AWS_"))},
            "PYTHONPATH": str(ROOT), "LM_MLRUNS_DIR": str(self.mlruns), **dict(self.pairs(SERVER_ENV)),
        }  # fmt: skip
        [start, self.add] = [c[1:] for c in COMMANDS if c[1].endswith("server.py")]
        with (folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *start, "--workers", "1"], env=self.environment, cwd=ROOT, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        wait_for(lambda: answers(self.url), 120)

    def fill(self, text: str) -> str:
        """The page's text with this test's addresses and secrets; in URIs, those are percent-encoded."""
        text = text.replace("10.0.0.5:5000", f"{self.net.gateway}:{self.port}")
        text = re.sub(r"(10\.0\.0\.5|127\.0\.0\.1):5432", lambda m: f"{self.gateway(m[1])}:{self.postgres.port}", text)
        for place, secret in SECRETS.items():
            text = text.replace(f":{place}@", f":{secret.replace('%', '%25')}@").replace(place, secret)
        return text

    def gateway(self, address: str) -> str:
        return self.net.gateway if address.startswith("10.") else address

    def pairs(self, env: str) -> list[tuple[str, str]]:
        return [(name, value) for name, _, value in (line.partition("=") for line in self.fill(env).splitlines())]

    def let_in(self, name: str, password: str) -> str:
        done = subprocess.run(
            [sys.executable, *self.add[:-1], name], env={**self.environment, "LM_NEW_USER_PASSWORD": password},
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    def enter(self, patch: pytest.MonkeyPatch, name: str, password: str) -> None:
        """Make this process a client, on the machine itself."""
        for key, value in self.pairs(LAPTOP_ENV):
            patch.setenv(key, value.replace(self.net.gateway, "127.0.0.1"))
        patch.setenv("MLFLOW_TRACKING_USERNAME", name)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(requests.exceptions.ConnectionError):
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    return False


@pytest.fixture
def shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Generator[Lab]:
    net = Network(tmp_path / "server")
    kind = "network namespaces" if net.real else "plain processes: network namespaces are not allowed here"
    with capsys.disabled():
        print(f"\nhosts are {kind}", end="  ")
    folder = Path(f"/tmp/lm-server-postgres-{os.getpid()}")  # pytest's own folders are closed to other users
    shutil.rmtree(folder, ignore_errors=True)
    postgres = lab = None
    try:
        address, network = (net.gateway, f"{net.prefix}.0/24") if net.real else ("", "")
        postgres = Postgres(folder, "of-the-superuser", address, network)
        lab = Lab(tmp_path, postgres, net)
        yield lab
    finally:
        if lab is not None:
            lab.end()
        if postgres is not None:
            with contextlib.suppress(AssertionError):
                postgres.stop()
        net.remove()
        shutil.rmtree(folder, ignore_errors=True)
        for log in sorted(tmp_path.glob("*.log")):
            print(f"--- {log.name}", log.read_text(errors="replace")[-3000:], sep="\n")


def own_trials(host: Host) -> list[int]:
    """Numbers of the trials that a host is working on, and has finished an epoch of or not."""
    return [
        t.number
        for t in the_study().get_trials(deepcopy=False)
        if t.state.name == "RUNNING" and host.is_named(t.user_attrs.get(studies.OWNER, ""))
    ]


def epochs_of(number: int) -> int:
    return len(the_study().trials[number].intermediate_values)


def refused_at_once(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert re.search(said, line)
    assert "wrong" not in line


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(900)
def test_two_hosts_that_share_two_addresses_finish_a_study_though_each_is_cut_off(
    shared: Lab, flags: list[str], toy_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "anna was added" in shared.let_in("anna", SECRETS["ANNAS-PASSWORD"])
    assert "bernd was added" in shared.let_in("bernd", "of-bernd-himself")
    env = shared.fill(LAPTOP_ENV)
    first = Host(tmp_path, "laptop-a", shared.net, env)
    env = env.replace("=anna", "=bernd").replace(SECRETS["ANNAS-PASSWORD"], "of-bernd-himself")
    second = Host(tmp_path, "laptop-b", shared.net, env)
    [tune] = [c[1:] for c in COMMANDS if c[1].endswith("tune.py")]
    argv = [*tune, *flags, "--lr", "0.003", "--epochs", "4", "--patience", "0"]
    refused_at_once(
        first.run(argv, MLFLOW_TRACKING_PASSWORD="wrong-password"),
        "the MLflow store must know the user and the password: got 401, .* Try another MLFLOW_TRACKING_USERNAME",
    )
    storage = dict(shared.pairs(LAPTOP_ENV))["OPTUNA_STORAGE"].replace("of-the-studies-2", "wrong")
    refused_at_once(
        first.run(argv, OPTUNA_STORAGE=storage),
        'storage must let this user in: got password authentication failed for user "studies". Try another',
    )
    shared.enter(monkeypatch, "anna", SECRETS["ANNAS-PASSWORD"])
    monkeypatch.setenv("LM_MLRUNS_DIR", str(tmp_path / "observer"))
    try:
        first.start(argv)
        wait_for(lambda: epochs_done() >= 3)
        second.start(argv)
        wait_for(lambda: bool(own_trials(second)) and any(epochs_of(n) for n in own_trials(first)))
        [cut] = own_trials(first)
        first.cut()
        wait_for(lambda: f"trial {cut}: its worker was not heard from" in second.said(), 90)
        first.join()
        wait_for(lambda: "was taken over" in first.said(), 90)
        wait_for(lambda: bool(own_trials(first)), 90)  # it works on, on another trial
        wait_for(lambda: any(epochs_of(n) for n in own_trials(second)))
        [lost] = own_trials(second)
        second.cut()
        time.sleep(1)
        second.kill()
        assert first.process is not None
        assert first.process.wait(timeout=400) == 0, first.said()[-3000:]
    finally:
        first.kill()
        second.kill()
    study = check_study(20, keep=3)
    for number, dead, heir in ((cut, first, second), (lost, second, first)):
        hosts = [str(worker).split()[0] for worker, *_ in study.trials[number].user_attrs[studies.SHIFTS]]
        if shared.net.real:
            assert (dead.name, heir.name) in pairwise(hosts), number
    check_what_is_served(shared, study)
    for secret in SECRETS.values():
        assert all(secret not in file.read_text(errors="replace") for file in tmp_path.glob("*.log"))


def check_what_is_served(shared: Lab, study: optuna.Study) -> None:
    """All artifacts of all runs are there through the server alone, and no step of a metric stands twice."""
    tracker = Tracker(Settings.load())
    best = {t.number for t in studies.complete(study)[:3]}
    for trial in study.trials:
        run = trial.user_attrs[studies.RUN_ID]

        def names(path: str, run: str = run) -> set[str]:
            return {Path(f.path).name for f in tracker.client.list_artifacts(run, path)}

        epochs = sorted(trial.intermediate_values)
        assert "attention.html" in names("")
        assert {f"epoch_{e:03}.html" for e in epochs} <= names("attention"), trial.number
        assert {f"epoch_{e:03}.safetensors" for e in [0, *epochs]} <= names("attention"), trial.number
        assert {f"epoch_{e:03}.txt" for e in epochs} <= names("samples"), trial.number
        if trial.number in best:
            assert {"config.json", "model.safetensors", "vocab.json"} <= names("checkpoints/best")
    answer = mlflow.pyfunc.load_model("models:/lm@champion").predict(["does the otter"], params={"max_new_tokens": 3})
    assert len(answer) == 1
    user = f"mlflow:{SECRETS['DATABASE-PASSWORD'].replace('%', '%25')}"
    twice = "select run_uuid, key, step from metrics group by run_uuid, key, step having count(*) > 1"
    with psycopg.connect(f"postgresql://{user}@127.0.0.1:{shared.postgres.port}/mlflow") as connection:
        assert connection.execute(twice).fetchall() == []
    assert requests.get(f"{shared.url}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=30).status_code == 401
    assert requests.get(f"{shared.url}/api/2.0/mlflow-artifacts/artifacts?path=", timeout=30).status_code == 401
    kept = shared.mlruns / "server"
    assert {file.stat().st_mode & 0o777 for file in (kept / "auth.ini", kept / "secret-key")} == {0o600}
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "--app-name basic-auth" in processes
    assert not any(secret in processes or secret.replace("%", "%25") in processes for secret in SECRETS.values())


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(300)
@pytest.mark.parametrize("store", ["mlflow", "postgresql"])
def test_a_password_that_is_changed_ends_a_worker_at_once(
    store: str, shared: Lab, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.let_in("anna", SECRETS["ANNAS-PASSWORD"])
    host = Host(tmp_path, "laptop-a", shared.net, shared.fill(LAPTOP_ENV))
    shared.enter(monkeypatch, "anna", SECRETS["ANNAS-PASSWORD"])
    monkeypatch.setenv("LM_MLRUNS_DIR", str(tmp_path / "observer"))
    host.start(["experiments/tune.py", *flags, "--lr", "0.003", "--epochs", "200", "--patience", "0", "--trials", "2"])
    try:
        wait_for(lambda: epochs_done() >= 2)
        if store == "mlflow":
            assert "has a new password" in shared.let_in("anna", "another-of-anna-5")
        else:
            shared.postgres.sql(
                "alter role studies password 'another-of-studies'",
                "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'studies'",
            )
        assert host.process is not None
        assert host.process.wait(timeout=60) == 2, host.said()[-3000:]
    finally:
        host.kill()
    last = host.said().strip().splitlines()[-1]
    want = {
        "mlflow": "tune.py: the MLflow store must know the user and the password: got 401",
        "postgresql": "tune.py: the study's storage must let this user in: got password authentication failed",
    }
    assert last.startswith(want[store])
    assert "Traceback" not in host.said()
    assert " is away (" not in host.said()


HOLD = (
    "import time; from experiments.locks import store_lock; from experiments.settings import Settings\n"
    "with store_lock(Settings.load()):\n    print('held', flush=True); time.sleep(600)"
)


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.timeout(300)
def test_the_lock_of_a_host_that_is_cut_off_is_given_on_within_a_minute(
    shared: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shared.net.real:
        pytest.skip("needs network namespaces: a stopped process still answers for its connections")
    host = Host(tmp_path, "laptop-a", shared.net, shared.fill(LAPTOP_ENV))
    shared.enter(monkeypatch, "anna", SECRETS["ANNAS-PASSWORD"])
    monkeypatch.setenv("LM_MLRUNS_DIR", str(tmp_path / "observer"))
    try:
        host.start(["-c", HOLD])
        wait_for(lambda: "held" in host.said(), 60)
        host.cut()
        began = time.monotonic()
        with store_lock(Settings.load(), patience=60):
            assert 1 < time.monotonic() - began < 60
    finally:
        host.kill()
