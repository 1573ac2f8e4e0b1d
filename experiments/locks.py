"""The lock of the stores: on one host by a file, between hosts by PostgreSQL where a store is there."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from experiments.settings import Settings
from experiments.steady import POSTGRES, SETTINGS, is_crowded, keep_trying
from lm.errors import UserError, masked

if TYPE_CHECKING:
    from sqlalchemy import Connection

_KEY = 0x6C6D5F6C6162  # any number that all processes share


@contextmanager
def store_lock(settings: Settings, patience: float = 120.0) -> Generator[None]:
    """One process at a time, of all that work on these stores: for schemas, experiments and claims of trials.

    It is waited for up to `patience` seconds.

    Raises:
        UserError: the folder of the store cannot be written, its database not be reached, or the lock is not given.
    """
    folder = settings.mlruns
    try:
        for folder in {settings.mlruns, local_path(settings.artifact_root) or settings.mlruns}:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable-{os.getpid()}"
            try:
                probe.write_bytes(bytes(1 << 16))  # an empty file would fit on a full disk
            finally:
                probe.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(
            f"the store must be writable: got {e.strerror} for {folder}. Try LM_MLRUNS_DIR=/another/folder."
        ) from e
    lock = FileLock(settings.mlruns / ".lock", timeout=patience)
    try:
        lock.acquire()
    except Timeout as e:
        raise UserError(
            f"the store must be free: got a lock held for {patience:.0f} s. Try to end the process that hangs."
        ) from e
    try:
        places = {"OPTUNA_STORAGE": settings.optuna_storage, "MLFLOW_TRACKING_URI": settings.tracking_uri}
        shared = [(uri, setting) for setting, uri in places.items() if uri.startswith("postgresql")]
        if shared:
            with _advisory(*shared[0], patience):
                yield
        else:
            yield
    finally:
        lock.release()


def connect(uri: str, setting: str) -> Connection:
    """A connection to PostgreSQL; `setting` is what the URI was read from.

    Raises:
        UserError: it cannot be reached, or refuses.
    """
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    what = next((name for name, place in SETTINGS.items() if place == setting), setting)
    try:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args=POSTGRES)
        return keep_trying(engine.connect, is_crowded, what)
    except ModuleNotFoundError as e:
        raise UserError(f"PostgreSQL needs its driver: got {e}. Try pip install 'small-lm-lab[postgres]'.") from e
    except SQLAlchemyError as e:
        got = masked((str(getattr(e, "orig", None) or e).strip().splitlines() or [""])[0][:200])
        raise UserError(f"the store must be reachable: got {got}. Try another {setting}.") from e


@contextmanager
def _advisory(uri: str, setting: str, patience: float) -> Generator[None]:
    import sqlalchemy
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    with connect(uri, setting) as connection:
        connection.execute(
            sqlalchemy.text("select set_config('lock_timeout', :wait, false)"), {"wait": f"{patience:.0f}s"}
        )
        try:
            connection.execute(sqlalchemy.text("select pg_advisory_lock(:key)"), {"key": _KEY})
        except OperationalError as e:
            if "lock timeout" not in str(e):
                raise
            raise UserError(
                f"the store must be free: got a lock held for {patience:.0f} s by another host. "
                "Try to end the process that hangs."
            ) from e
        try:
            yield
        finally:
            with suppress(SQLAlchemyError):  # a lost connection has given the lock up
                connection.execute(sqlalchemy.text("select pg_advisory_unlock(:key)"), {"key": _KEY})


def local_path(uri: str | None) -> Path | None:
    """The path that a URI names on this machine; None for one elsewhere."""
    parts = urlsplit(uri or "")
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None
