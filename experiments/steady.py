"""Calls to a store that may be away for a while: tried again until it is back, and a word to the person who waits."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from lm.errors import UserError

T = TypeVar("T")

PATIENCE = 1800.0
"""Seconds that a store may be away before a program gives up."""
_SAY_AFTER = 3.0
_LONGEST_WAIT = 10.0


def keep_trying(call: Callable[[], T], is_passing: Callable[[Exception], bool], what: str) -> T:
    """Call until it succeeds; waits double from 0.1 s to 10 s, with jitter.

    The call must be one that may be made twice: an answer may be lost after the store has done what was asked.

    Args:
        is_passing: whether an error is one that time may mend; others are raised at once.
        what: the store's name in messages.

    Raises:
        UserError: it is still away after `PATIENCE` seconds.
    """
    began, wait, said = time.monotonic(), 0.1, False
    while True:
        try:
            result = call()
        except Exception as e:
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


def _short(message: str) -> str:
    """The first line; of a long one its ends, since the cause stands last."""
    first = (message.splitlines() or [""])[0]
    return first if len(first) <= 200 else f"{first[:80]} ... {first[-110:]}"


def steadied(client: T, is_passing: Callable[[Exception], bool], what: str) -> T:
    """The same object, each of whose methods keeps trying; for clients whose calls may be made twice."""
    return cast(T, _Steadied(client, is_passing, what))


class _Steadied:
    def __init__(self, client: object, is_passing: Callable[[Exception], bool], what: str) -> None:
        self._client, self._is_passing, self._what = client, is_passing, what

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute):
            return attribute
        return lambda *args, **kwargs: keep_trying(  # pyright: ignore[reportUnknownLambdaType]
            lambda: attribute(*args, **kwargs), self._is_passing, self._what
        )
