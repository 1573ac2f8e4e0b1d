"""Start the MLflow server that several hosts share: runs and users in PostgreSQL, artifacts through the server.

    python experiments/server.py                     until Ctrl-C; docs/server.md goes from an empty host to a colleague
    python experiments/server.py --add-user anna     beside the running server; of a known user, sets the password
    python experiments/server.py --compose > compose.yaml

All it needs stands in `.env` or the environment (`.env.example`).
"""

from __future__ import annotations

import configparser
import getpass
import io
import os
import secrets
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from experiments import cli
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.settings import ServerSettings, Settings

_PERMISSION = "MANAGE"
"""What each user may do with what others made. A study needs all of it: its losers' weights are removed by whichever
host finds them, and `champion` moves; with READ, MLflow's default, nobody can log to another's experiment."""
_USERS_CACHED_SECONDS = 60
"""A login is checked by scrypt, slow by purpose, and each call logs in; a changed password holds after so long."""
_PACKAGES = {"flask_wtf": "Flask-WTF", "psycopg": "psycopg", "boto3": "boto3"}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags; add a user, print a compose file, or become the MLflow server."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument(
        "--host", help="interface to listen on (default: all, if LM_SERVER_ADDRESS is another host's http)"
    )
    parser.add_argument(
        "--port", type=int, help="port to listen on (default: that of an http LM_SERVER_ADDRESS, or 5000)"
    )
    parser.add_argument("--workers", type=int, default=2, help="server processes, of about 250 MB each (default: 2)")
    parser.add_argument("--add-user", metavar="NAME", help="let a colleague in, or give one another password")
    parser.add_argument(
        "--compose", action="store_true", help="print a compose.yaml of the same server, and do nothing"
    )
    args = parser.parse(argv)
    if args.workers < 1:
        raise UserError(f"workers must be at least 1: got {args.workers}. Try --workers 2.")

    from experiments.settings import ServerSettings, Settings

    settings = Settings.load()
    server = ServerSettings.load(settings)
    parts = urlsplit(server.address)
    behind_proxy = parts.scheme == "https"  # which alone listens to others, and has a port of its own
    alone = behind_proxy or parts.hostname in ("127.0.0.1", "localhost")
    host = args.host or ("127.0.0.1" if alone else "0.0.0.0")
    port = args.port or (None if behind_proxy else parts.port) or 5000
    if args.compose:
        print(compose(server, port, args.workers), end="")
    elif args.add_user is not None:
        print(add_user(server, args.add_user, "127.0.0.1" if host == "0.0.0.0" else host, port))
    else:
        start(settings, server, host, port, args.workers)


def start(settings: Settings, server: ServerSettings, host: str, port: int, workers: int) -> None:
    """Become the MLflow server; secrets reach it by its environment and a file of mode 600, never by its arguments.

    Raises:
        UserError: a package is missing, the port is taken, or PostgreSQL refuses.
    """
    from experiments.locks import connect

    _require_packages()
    cli.require_free(port, host)
    connect(server.database, "MLFLOW_BACKEND_STORE_URI").close()
    folder = settings.mlruns / "server"
    folder.mkdir(parents=True, exist_ok=True)
    config, key = folder / "auth.ini", folder / "secret-key"
    for file, content in ((config, auth_config(server.database, server.admin)), (key, secrets.token_hex(32))):
        if file == key and file.exists():
            continue  # the same for all workers and starts
        file.unlink(missing_ok=True)
        file.touch(0o600, exist_ok=False)
        file.write_text(content, encoding="utf-8")
    os.environ.update(environment(server))
    os.environ |= {
        "MLFLOW_BACKEND_STORE_URI": server.database,
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": server.admin_password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": key.read_text(encoding="utf-8"),
        **server.object_store,
    }
    print(f"server   {server.address}  ({host}:{port}, administrator {server.admin})")
    print(
        "others   MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, OPTUNA_STORAGE in their .env"
    )
    print("Ctrl-C stops the server.", flush=True)
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "-m", *command(host, port, workers)])


def _require_packages() -> None:
    if missing := [name for module, name in _PACKAGES.items() if find_spec(module) is None]:
        raise UserError(
            f"the server needs its packages: got no {', '.join(missing)}. Try pip install 'small-lm-lab[server]'."
        )


def command(host: str, port: int, workers: int) -> list[str]:
    """MLflow's command line; whoever runs `ps` may read it."""
    return [
        "mlflow", "server", "--app-name", "basic-auth", "--serve-artifacts",
        "--host", host, "--port", str(port), "--workers", str(workers),
    ]  # fmt: skip


def environment(server: ServerSettings) -> dict[str, str]:
    """MLflow's settings that are no secrets.

    It answers only requests for hosts that it knows, and lets a browser read runs (which is a POST) only from origins
    that it knows: the address is both.
    """
    name = urlsplit(server.address).hostname or ""
    hosts = dict.fromkeys([name, "localhost", "127.0.0.1"])
    return {
        "MLFLOW_ARTIFACTS_DESTINATION": server.artifacts,
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{host}{port}" for host in hosts for port in ("", ":*")),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": server.address,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def auth_config(database: str, admin: str) -> str:
    """The file that MLflow's basic authentication reads; users stand in the same database as runs."""
    config = configparser.ConfigParser(interpolation=None)
    config["mlflow"] = {
        "default_permission": _PERMISSION,
        "database_uri": database.replace("%", "%%"),  # MLflow's reader takes % as its own sign
        "admin_username": admin.replace("%", "%%"),
        "auth_cache_ttl_seconds": str(_USERS_CACHED_SECONDS),
    }
    text = io.StringIO()
    config.write(text)
    return text.getvalue()


def add_user(server: ServerSettings, name: str, host: str, port: int) -> str:
    """Ask the running server to let a colleague in; of a user who is there already, set the password.

    Returns:
        what was done, in words.

    Raises:
        UserError: the password is too short, the server is not there, or it refuses.
    """
    import requests

    from experiments.settings import check_password

    password = server.new_password
    if password is None and sys.stdin.isatty():
        password = getpass.getpass(f"password for {name}: ")
    check_password("LM_NEW_USER_PASSWORD", password)
    base, who = f"http://{host}:{port}/api/2.0/mlflow/users", (server.admin, server.admin_password)
    user = {"username": name, "password": password}
    try:
        answer, done = requests.post(f"{base}/create", json=user, auth=who, timeout=60), "was added"
        if "RESOURCE_ALREADY_EXISTS" in answer.text:
            answer, done = (
                requests.patch(f"{base}/update-password", json=user, auth=who, timeout=60),
                "has a new password",
            )
    except requests.exceptions.RequestException as e:
        raise UserError(
            f"the server must be running: got {type(e).__name__} from {host}:{port}. "
            "Try python experiments/server.py first."
        ) from e
    if answer.status_code == 401:
        raise UserError(
            f"the administrator's password must be the one of the first start: got another for {server.admin!r}. "
            "Try that one; in the MLflow UI it can be changed."
        )
    if not answer.ok:
        raise UserError(
            f"the server must take the user: got {answer.status_code}, {answer.text[:200]!r}. Try another name."
        )
    return f"{name} {done}; .env of {name}: MLFLOW_TRACKING_URI={server.address} MLFLOW_TRACKING_USERNAME={name}"


def compose(server: ServerSettings, port: int, workers: int) -> str:
    """A compose.yaml of PostgreSQL and this server, with secrets by ${VARIABLE}."""
    import yaml

    _require_packages()  # the versions here are those of the image
    packages = ["mlflow", *_PACKAGES.values()]
    pinned = [f"'{p}{'[binary]' if p == 'psycopg' else ''}=={version(p)}'" for p in packages]
    database = "postgresql://mlflow:${LM_MLFLOW_PASSWORD:?}@postgres/mlflow"
    studies = "CREATE ROLE studies LOGIN PASSWORD '${LM_STUDIES_PASSWORD:?}';\nCREATE DATABASE optuna OWNER studies;\n"
    local = "://" not in server.artifacts
    made = {
        "services": {
            "postgres": {
                "image": "postgres:17",
                "environment": {
                    "POSTGRES_USER": "mlflow",
                    "POSTGRES_PASSWORD": "${LM_MLFLOW_PASSWORD:?}",
                    "POSTGRES_DB": "mlflow",
                },
                "configs": [{"source": "optuna.sql", "target": "/docker-entrypoint-initdb.d/optuna.sql"}],
                "volumes": ["postgres:/var/lib/postgresql/data"],
                "ports": ["5432:5432"],
                "healthcheck": {"test": "pg_isready -U studies -d optuna", "interval": "5s", "retries": 12},
                "restart": "unless-stopped",
            },
            "mlflow": {
                "build": {"dockerfile_inline": f"FROM python:3.11-slim\nRUN pip install {' '.join(pinned)}\n"},
                "command": command("0.0.0.0", 5000, workers),
                "environment": {
                    **environment(server),
                    **({"MLFLOW_ARTIFACTS_DESTINATION": "/artifacts"} if local else {}),
                    "MLFLOW_BACKEND_STORE_URI": database,
                    "MLFLOW_AUTH_CONFIG_PATH": "/auth.ini",
                    "MLFLOW_AUTH_ADMIN_PASSWORD": "${MLFLOW_AUTH_ADMIN_PASSWORD:?}",
                    "MLFLOW_FLASK_SERVER_SECRET_KEY": "${MLFLOW_FLASK_SERVER_SECRET_KEY:?}",
                    **{name: f"${{{name}:?}}" for name in server.object_store},
                },
                "configs": [{"source": "auth.ini", "target": "/auth.ini"}],
                "volumes": ["artifacts:/artifacts"] if local else [],
                "ports": [f"{port}:5000"],
                "depends_on": {"postgres": {"condition": "service_healthy"}},
                "restart": "unless-stopped",
            },
        },
        "configs": {
            "auth.ini": {"content": auth_config(database, server.admin)},
            "optuna.sql": {"content": studies},
        },
        "volumes": {"postgres": {}, **({"artifacts": {}} if local else {})},
    }
    name = urlsplit(server.address).hostname
    head = (
        "# Made by experiments/server.py --compose; not run where it was written. Needs Docker Compose 2.23.1.\n"
        "# Secrets come from the environment or a .env beside it; the two of PostgreSQL of letters and digits alone.\n"
        f"# OPTUNA_STORAGE of each worker: postgresql://studies:LM_STUDIES_PASSWORD@{name}/optuna\n"
    )
    return head + yaml.safe_dump(made, sort_keys=False, width=120)


if __name__ == "__main__":
    cli.run(main)
