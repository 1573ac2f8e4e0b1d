from collections.abc import Callable

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from sqlalchemy.exc import OperationalError

from experiments import claims, steady, tracking
from experiments.steady import keep_trying, steadied
from lm.errors import UserError


class Flaky:
    """A client that fails some times before it answers."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def add(self, a: int, b: int = 0) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError("it is away")
        return a + b


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(steady.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(steady.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))


def passes(e: Exception) -> bool:
    return isinstance(e, ConnectionError)


def test_a_call_is_made_until_it_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    client = Flaky(9)
    assert steadied(client, passes, "the store").add(1, b=2) == 3
    assert client.calls == 10
    said = capsys.readouterr().err
    assert said.startswith("the store is away (it is away); trying for up to 30 min\n")
    assert "the store is back after" in said
    assert said.count("\n") == 2


def test_an_error_that_time_does_not_mend_is_raised_at_once() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        keep_trying(fail, passes, "the store")


def test_patience_ends_with_a_line() -> None:
    with pytest.raises(UserError, match="the store must be reachable: got it is away for 30 min. Try the same command"):
        steadied(Flaky(10**6), passes, "the store").add(1)


def test_which_errors_of_the_stores_pass() -> None:
    locked = OperationalError("", None, Exception("database is locked"))
    full = OperationalError("", None, Exception("database or disk is full"))
    assert claims.is_passing(locked)
    assert not claims.is_passing(full)
    assert not claims.is_passing(ValueError("wrong"))
    assert tracking.is_passing(MlflowException("locked", error_code=TEMPORARILY_UNAVAILABLE))
    away = "API request to http://h/api failed with exception HTTPConnectionPool: Connection refused"
    assert tracking.is_passing(MlflowException(away))
    assert tracking.is_passing(requests.exceptions.ConnectionError())
    assert not tracking.is_passing(MlflowException("no such run"))
    assert not tracking.is_passing(MlflowException("disk is full", error_code=TEMPORARILY_UNAVAILABLE))


REFUSALS = [
    (
        OperationalError("", None, Exception('FATAL:  password authentication failed for user "lm"')),
        'must let this user in: got password authentication failed for user "lm". Try another user, password',
    ),
    (
        OperationalError("", None, Exception("fe_sendauth: no password supplied")),
        "must let this user in: got no password supplied. Try another user, password or database",
    ),
    (
        OperationalError("", None, Exception('FATAL:  no pg_hba.conf entry for host "10.0.0.9", user "lm"')),
        'must let this user in: got no pg_hba.conf entry for host "10.0.0.9", user "lm". Try another user,',
    ),
    (
        OperationalError("", None, Exception('FATAL:  database "x" does not exist')),
        'must let this user in: got database "x" does not exist. Try another user, password or database in',
    ),
    (
        MlflowException("API request to endpoint /api failed with error code 401 != 200. Response body: 'You are not"),
        "must know the user and the password: got 401, not authenticated. Try another MLFLOW_TRACKING_USERNAME and",
    ),
    (
        requests.exceptions.HTTPError("401 Client Error: Unauthorized for url: http://h/api/2.0/mlflow-artifacts"),
        "must know the user and the password: got 401, not authenticated. Try another MLFLOW_TRACKING_USERNAME and",
    ),
    (
        MlflowException("API request to endpoint /api failed with error code 403 != 200. Response body: 'Permission"),
        "must let this user do what is asked: got 403, permission denied. Try another MLFLOW_TRACKING_USERNAME,",
    ),
    (
        MlflowException(
            "API request to endpoint /api failed with error code 403 != 200. Body: 'Invalid Host header - "
        ),
        "must be called by the name it knows: got 403, invalid host. Try the LM_SERVER_ADDRESS",
    ),
]


@pytest.mark.parametrize(("error", "line"), REFUSALS)
@pytest.mark.parametrize(
    ("what", "is_passing"), [(steady.STUDY, claims.is_passing), (steady.RUNS, tracking.is_passing)]
)
def test_a_store_that_refuses_is_not_waited_for(
    error: Exception, line: str, what: str, is_passing: Callable[[Exception], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        if what == steady.STUDY:
            raise RuntimeError("as Optuna wraps it") from error
        raise error

    assert not is_passing(error)
    with pytest.raises(UserError) as told:
        keep_trying(call, is_passing, what)
    assert str(told.value).startswith(f"{what} {line}")
    assert len(calls) == 1
    assert capsys.readouterr().err == ""


def test_a_server_that_starts_up_is_waited_for() -> None:
    assert claims.is_passing(OperationalError("", None, Exception("FATAL:  the database system is starting up")))
    assert tracking.is_passing(MlflowException("API request to endpoint /api failed with error code 503 != 200"))


def test_a_password_in_an_address_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        raise ConnectionError("API request to http://anna:secret@h:5000/api failed")

    with pytest.raises(UserError, match=r"http://anna:\*\*\*@h:5000/api failed for 30 min") as told:
        keep_trying(call, passes, steady.RUNS)
    assert "secret" not in str(told.value) + capsys.readouterr().err
