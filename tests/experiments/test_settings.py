import re
from pathlib import Path

import pytest

from experiments.settings import ROOT, Settings
from lm.errors import UserError
from lm.service import Limits


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LM_MLRUNS_DIR",
        "MLFLOW_TRACKING_URI",
        "OPTUNA_STORAGE",
        "LM_WIKIQA_DIR",
        "LM_ARTIFACT_ROOT",
    ):
        monkeypatch.delenv(name, raising=False)


def test_defaults_are_absolute_whatever_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.load(tmp_path / "no.env")
    assert settings.mlruns == ROOT / "mlruns"
    assert settings.tracking_uri == f"sqlite:///{ROOT}/mlruns/mlflow.db"
    assert settings.artifact_root == f"{ROOT}/mlruns/artifacts"
    assert settings.wikiqa_dir is None


def test_environment_wins_over_env_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text("LM_MLRUNS_DIR=/from/file\nOPTUNA_STORAGE=postgresql://u:p@host/db\nLM_WIKIQA_DIR=data/wikiqa\n")
    settings = Settings.load(file)
    assert settings.mlruns == Path("/from/file")
    assert settings.tracking_uri == "sqlite:////from/file/mlflow.db"
    assert settings.optuna_storage == "postgresql://u:p@host/db"
    assert settings.wikiqa_dir == ROOT / "data/wikiqa"
    monkeypatch.setenv("LM_MLRUNS_DIR", "/from/environment")
    assert Settings.load(file).mlruns == Path("/from/environment")


def test_a_relative_sqlite_uri_is_taken_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlruns/mlflow.db")
    assert Settings.load(tmp_path / "no.env").tracking_uri == f"sqlite:///{ROOT}/mlruns/mlflow.db"


def test_env_example_names_every_setting_that_is_read() -> None:
    source = (ROOT / "experiments" / "settings.py").read_text()
    example = (ROOT / ".env.example").read_text()
    read = {part.split('"')[0] for part in source.split('get("')[1:]}
    assert len(read) == 20
    named = {line.lstrip("#").split("=")[0] for line in example.splitlines() if re.match(r"#?[A-Z0-9_]+=", line)}
    assert named == read | {f"LM_SERVE_{name.upper()}" for name in Limits.__dataclass_fields__}


@pytest.mark.parametrize("folder", ["/tmp/a?b", "/tmp/a#b", "~nobody-at-all/x"])
def test_a_folder_that_no_uri_can_hold_is_refused(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_MLRUNS_DIR", folder)
    with pytest.raises(UserError, match="must be"):
        Settings.load(tmp_path / "no.env")


def test_an_env_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"LM_MLRUNS_DIR=\xff\xfe")
    with pytest.raises(UserError, match=r"\.env must be a readable UTF-8 file: got UnicodeDecodeError"):
        Settings.load(tmp_path / ".env")
