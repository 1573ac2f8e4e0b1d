"""Calls to a store that may be away for a while: tried again until it is back, and a word to the person who waits.

A store that is there but refuses the user is not waited for: no time mends a password.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from lm.errors import UserError, masked

T = TypeVar("T")

PATIENCE = 1800.0
"""Seconds that a store may be away before a program gives up."""
STUDY, RUNS = "the study's storage", "the MLflow store"
"""The two stores, as messages name them."""
SETTINGS = {STUDY: "OPTUNA_STORAGE", RUNS: "MLFLOW_TRACKING_URI"}
"""Which setting says where a store is."""
_NOTICE = {
    "tcp_keepalives_idle": 10,
    "tcp_keepalives_interval": 5,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds, for what is on its way: no keepalive is sent meanwhile
}
POSTGRES: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
    "options": " ".join(f"-c {name}={value}" for name, value in _NOTICE.items()),
}
"""libpq's options by which both ends notice within half a minute that the other has gone without a word, as a host that
is cut off does: a lock that it holds would else be held for two hours."""
_REFUSED_BY_POSTGRES = re.compile(
    r'password authentication failed for user "[^"]*"|no password supplied|no pg_hba\.conf entry for [^\n]*'
    r'|role "[^"]*" (does not exist|is not permitted to log in)|database "[^"]*" does not exist'
    r"|permission denied for (database|schema|table) \S+"
)
_REFUSED_BY_SERVER = re.compile(r"(?:failed with error code |\b)(401|403)\b(?: !=| Client Error)(.*)", re.DOTALL)
_SAY_AFTER = 3.0
_LONGEST_WAIT = 10.0


def keep_trying(call: Callable[[], T], is_passing: Callable[[Exception], bool], what: str) -> T:
    """Call until it succeeds; waits double from 0.1 s to 10 s, with jitter.

    The call must be one that may be made twice: an answer may be lost after the store has done what was asked.

    Args:
        is_passing: whether an error is one that time may mend; others are raised at once.
        what: the store's name in messages.

    Raises:
        UserError: the store refuses the user, or is still away after `PATIENCE` seconds.
    """
    began, wait, said = time.monotonic(), 0.1, False
    while True:
        try:
            result = call()
        except Exception as e:
            if refused := refusal(e, what):
                raise refused from e
            if not is_passing(e):
                raise
            away = time.monotonic() - began
            first = _short(str(e))
            if away > PATIENCE:
                raise UserError(
                    f"{what} must be reachable: got {first} for {away / 60:.0f} min. "
                    "Try the same command when it is back: nothing that was logged is lost."
                ) from e
            if away > _SAY_AFTER and not said:
                print(f"{what} is away ({first}); trying for up to {PATIENCE / 60:.0f} min", file=sys.stderr)
                said = True
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)
        else:
            if said:
                print(f"{what} is back after {time.monotonic() - began:.0f} s", file=sys.stderr)
            return result


def is_crowded(e: Exception) -> bool:
    """Whether PostgreSQL has no connection left, which others give back."""
    return re.search(r"too many clients|remaining connection slots", f"{e} {e.__cause__}") is not None


def refusal(e: Exception, what: str) -> UserError | None:
    """What to tell a person whom a store does not let in, or do what was asked; None for other errors."""
    said = f"{e}\n{e.__cause__ or ''}"
    if by_postgres := _REFUSED_BY_POSTGRES.search(said):
        return UserError(
            f"{what} must let this user in: got {by_postgres.group().strip()}. "
            f"Try another user, password or database in {SETTINGS.get(what, what)}."
        )
    by_server = _REFUSED_BY_SERVER.search(said)
    if by_server is None:
        return None
    code, rest = by_server.groups()
    if code == "401":
        return UserError(
            f"{what} must know the user and the password: got 401, not authenticated. "
            "Try another MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    if "Invalid Host header" in rest:
        return UserError(
            f"{what} must be called by the name it knows: got 403, invalid host. "
            "Try the LM_SERVER_ADDRESS that server.py was started with as MLFLOW_TRACKING_URI."
        )
    return UserError(
        f"{what} must let this user do what is asked: got 403, permission denied. "
        "Try another MLFLOW_TRACKING_USERNAME, or ask for the permission MANAGE; what is not there is refused too."
    )


def _short(message: str) -> str:
    """The first line; of a long one its ends, since the cause stands last."""
    first = masked((message.splitlines() or [""])[0])
    return first if len(first) <= 200 else f"{first[:80]} ... {first[-110:]}"


def steadied(client: T, is_passing: Callable[[Exception], bool], what: str) -> T:
    """The same object, each of whose methods keeps trying; for clients whose calls may be made twice."""
    return cast(T, _Steadied(client, is_passing, what))


def single(client: T) -> T:
    """The object below a steadied one, for calls that are to be tried again together with what was asked before."""
    return cast(T, client.client) if isinstance(client, _Steadied) else client


class _Steadied:
    def __init__(self, client: object, is_passing: Callable[[Exception], bool], what: str) -> None:
        self.client, self._is_passing, self._what = client, is_passing, what

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.client, name)
        if not callable(attribute):
            return attribute
        return lambda *args, **kwargs: keep_trying(  # pyright: ignore[reportUnknownLambdaType]
            lambda: attribute(*args, **kwargs), self._is_passing, self._what
        )
