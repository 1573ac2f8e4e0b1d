"""Places and secrets: the only reader of `.env` and of the environment. `.env.example` documents each setting.

Precedence: environment, `.env`, default. Relative paths are taken from the project's root, so that every
program finds the same store from any working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

from lm.errors import UserError, masked

_SOURCE = Path(__file__).resolve().parents[1]
ROOT = _SOURCE if (_SOURCE / "pyproject.toml").is_file() else Path.cwd()
SHORTEST_PASSWORD = 12
"""What MLflow's users must have at least."""


@dataclass(frozen=True)
class Settings:
    """Where things are. URIs and paths are absolute; what may hold a password is left out of its `repr`."""

    mlruns: Path
    tracking_uri: str = field(repr=False)
    artifact_root: str
    optuna_storage: str = field(repr=False)
    heartbeat_seconds: int
    experiment: str
    wikiqa_dir: Path | None
    wikiqa_revision: str
    under_torchrun: bool
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def cache(self) -> Path:
        """Parsed and tokenised text; may be deleted at any time."""
        return self.mlruns / "cache"

    @classmethod
    def load(cls, env_file: Path | None = None) -> Settings:
        """Read `.env` (of the project's root by default) and the environment, which wins."""
        get = _reader(env_file)
        mlruns = _absolute(get("LM_MLRUNS_DIR") or "mlruns")
        if re.search(r"[?#%]", str(mlruns)):
            raise UserError(
                f"LM_MLRUNS_DIR must be usable in a URI, without ?, # and %: got {mlruns}. Try another folder."
            )
        wikiqa = get("LM_WIKIQA_DIR")
        artifacts = get("LM_ARTIFACT_ROOT")
        tracking_uri = _absolute_uri(get("MLFLOW_TRACKING_URI") or f"sqlite:///{mlruns / 'mlflow.db'}")
        optuna_storage = _absolute_uri(get("OPTUNA_STORAGE") or f"sqlite:///{mlruns / 'optuna.db'}")
        _check_uri("MLFLOW_TRACKING_URI", tracking_uri)
        _check_uri("OPTUNA_STORAGE", optuna_storage)
        _require_two(optuna_storage, "MLFLOW_TRACKING_URI", tracking_uri)
        username, password = get("MLFLOW_TRACKING_USERNAME"), get("MLFLOW_TRACKING_PASSWORD")
        if (username is None) != (password is None):
            set_one = "USERNAME" if password is None else "PASSWORD"
            raise UserError(
                f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD must be set together: got the {set_one} alone. "
                "Try setting both."
            )
        return cls(
            mlruns=mlruns,
            tracking_uri=tracking_uri,
            artifact_root=artifacts
            if artifacts and "://" in artifacts
            else str(_absolute(artifacts or str(mlruns / "artifacts"))),
            optuna_storage=optuna_storage,
            heartbeat_seconds=_seconds("LM_HEARTBEAT_SECONDS", get("LM_HEARTBEAT_SECONDS") or "10"),
            experiment=get("MLFLOW_EXPERIMENT_NAME") or "lm",
            wikiqa_dir=_absolute(wikiqa) if wikiqa else None,
            wikiqa_revision=get("LM_WIKIQA_REVISION") or "main",
            under_torchrun="WORLD_SIZE" in os.environ,
            username=username,
            password=password,
        )


@dataclass(frozen=True)
class ServerSettings:
    """What `server.py` alone needs: the stores behind the server, its address, its administrator."""

    database: str = field(repr=False)
    artifacts: str
    address: str
    admin: str
    admin_password: str = field(repr=False)
    new_password: str | None = field(repr=False)
    object_store: dict[str, str] = field(repr=False)

    @classmethod
    def load(cls, settings: Settings, env_file: Path | None = None) -> ServerSettings:
        """Read what `.env` and the environment say of the server.

        Raises:
            UserError: something is missing or cannot be used.
        """
        get = _reader(env_file)
        database = get("MLFLOW_BACKEND_STORE_URI") or ""
        if not database.startswith("postgresql"):
            kind = database.split(":")[0] or "none"
            raise UserError(
                f"MLFLOW_BACKEND_STORE_URI must be a PostgreSQL database, which several hosts can share: got {kind}. "
                "Try postgresql://mlflow:PASSWORD@127.0.0.1/mlflow."
            )
        _check_uri("MLFLOW_BACKEND_STORE_URI", database)
        _require_two(settings.optuna_storage, "MLFLOW_BACKEND_STORE_URI", database)
        admin_password = get("MLFLOW_AUTH_ADMIN_PASSWORD")
        check_password("MLFLOW_AUTH_ADMIN_PASSWORD", admin_password)
        address = (get("LM_SERVER_ADDRESS") or "http://127.0.0.1:5000").rstrip("/")
        if not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?", address):
            raise UserError(
                "LM_SERVER_ADDRESS must be what colleagues type, scheme, name and port: "
                f"got {masked(address)}. Try http://lab.example.org:5000."
            )
        artifacts = get("MLFLOW_ARTIFACTS_DESTINATION") or str(settings.mlruns / "server" / "artifacts")
        objects = {
            "MLFLOW_S3_ENDPOINT_URL": get("MLFLOW_S3_ENDPOINT_URL"),
            "AWS_ACCESS_KEY_ID": get("AWS_ACCESS_KEY_ID"),
            "AWS_SECRET_ACCESS_KEY": get("AWS_SECRET_ACCESS_KEY"),
            "AWS_DEFAULT_REGION": get("AWS_DEFAULT_REGION"),
        }
        return cls(
            database=database,
            artifacts=artifacts if "://" in artifacts else str(_absolute(artifacts)),
            address=address,
            admin=get("MLFLOW_AUTH_ADMIN_USERNAME") or "admin",
            admin_password=admin_password or "",
            new_password=get("LM_NEW_USER_PASSWORD"),
            object_store={name: value for name, value in objects.items() if value},
        )


def check_password(name: str, password: str | None) -> None:
    """Raise UserError where there is none, or a shorter one than MLflow takes."""
    if not password or len(password) < SHORTEST_PASSWORD:
        got = f"one of {len(password)}" if password else "none"
        raise UserError(
            f"{name} must be at least {SHORTEST_PASSWORD} characters: got {got}. "
            'Try python -c "import secrets; print(secrets.token_urlsafe(18))".'
        )


def _reader(env_file: Path | None) -> Callable[[str], str | None]:
    file = env_file or ROOT / ".env"
    try:
        values = {**dotenv_values(file), **os.environ}
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f".env must be a readable UTF-8 file: got {type(e).__name__} for {file}. Try .env.example."
        ) from e
    return lambda name: values.get(name) or None


def _check_uri(name: str, uri: str) -> None:
    """Raise UserError where a password would break the URI, and a part of it be shown as a host's name or a port."""
    if uri.startswith("sqlite"):
        return
    try:
        parts = urlsplit(uri)
        whole = uri.count("@") <= 1 and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        whole = False
    if not whole:
        raise UserError(
            f"{name} must be a URI whose password is percent-encoded: got one that cannot be read. "
            "Try %40 for @, %2F for /, %23 for #."
        )


def _require_two(optuna_storage: str, name: str, uri: str) -> None:
    """Raise UserError where Optuna and MLflow are given one database: each breaks the other's schema there."""
    one, other = urlsplit(optuna_storage), urlsplit(uri)
    if all(x.scheme.startswith("postgresql") for x in (one, other)) and (
        (one.hostname, one.port or 5432, one.path) == (other.hostname, other.port or 5432, other.path)
    ):
        raise UserError(
            f"OPTUNA_STORAGE and {name} must be two databases, of one server if you like: got {one.path[1:]} twice. "
            "Try createdb optuna."
        )


def _absolute(path: str) -> Path:
    try:
        return (ROOT / Path(path).expanduser()).resolve()
    except RuntimeError as e:
        raise UserError(f"a folder must be one that can be found: got {path} ({e}). Try its full path.") from e


def _seconds(name: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"{name} must be a whole number of seconds above 0: got {value!r}. Try 10.")
    return int(value)


def _absolute_uri(uri: str) -> str:
    scheme, separator, path = uri.partition(":///")
    if separator and scheme.startswith("sqlite") and path != ":memory:":
        return f"{scheme}:///{_absolute(path)}"
    return uri
