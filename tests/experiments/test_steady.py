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
