"""Places and secrets: the only reader of `.env` and of the environment. `.env.example` documents each setting.

Precedence: environment, `.env`, default. Relative paths are taken from the project's root, so that every
program finds the same store from any working directory.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values

from lm.errors import UserError

_SOURCE = Path(__file__).resolve().parents[1]
ROOT = _SOURCE if (_SOURCE / "pyproject.toml").is_file() else Path.cwd()


@dataclass(frozen=True)
class Settings:
    """Where things are. URIs and paths are absolute."""

    mlruns: Path
    tracking_uri: str
    artifact_root: str
    optuna_storage: str
    heartbeat_seconds: int
    experiment: str
    wikiqa_dir: Path | None
    wikiqa_revision: str
    under_torchrun: bool

    @property
    def cache(self) -> Path:
        """Parsed and tokenised text; may be deleted at any time."""
        return self.mlruns / "cache"

    @classmethod
    def load(cls, env_file: Path | None = None) -> Settings:
        """Read `.env` (of the project's root by default) and the environment, which wins."""
        file = env_file or ROOT / ".env"
        try:
            values = {**dotenv_values(file), **os.environ}
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(
                f".env must be a readable UTF-8 file: got {type(e).__name__} for {file}. Try .env.example."
            ) from e

        def get(name: str) -> str | None:
            return values.get(name) or None

        mlruns = _absolute(get("LM_MLRUNS_DIR") or "mlruns")
        if re.search(r"[?#%]", str(mlruns)):
            raise UserError(
                f"LM_MLRUNS_DIR must be usable in a URI, without ?, # and %: got {mlruns}. Try another folder."
            )
        wikiqa = get("LM_WIKIQA_DIR")
        artifacts = get("LM_ARTIFACT_ROOT")
        return cls(
            mlruns=mlruns,
            tracking_uri=_absolute_uri(get("MLFLOW_TRACKING_URI") or f"sqlite:///{mlruns / 'mlflow.db'}"),
            artifact_root=artifacts
            if artifacts and "://" in artifacts
            else str(_absolute(artifacts or str(mlruns / "artifacts"))),
            optuna_storage=_absolute_uri(get("OPTUNA_STORAGE") or f"sqlite:///{mlruns / 'optuna.db'}"),
            heartbeat_seconds=_seconds("LM_HEARTBEAT_SECONDS", get("LM_HEARTBEAT_SECONDS") or "10"),
            experiment=get("MLFLOW_EXPERIMENT_NAME") or "lm",
            wikiqa_dir=_absolute(wikiqa) if wikiqa else None,
            wikiqa_revision=get("LM_WIKIQA_REVISION") or "main",
            under_torchrun=get("WORLD_SIZE") is not None,
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
