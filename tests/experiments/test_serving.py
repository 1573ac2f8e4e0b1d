"""The registered model behind the real `mlflow models serve`, asked over HTTP."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments import export, tune
from experiments.settings import Settings
from tests.conftest import TOY_FLAGS

pytestmark = pytest.mark.slow


@contextmanager
def serving(folder: Path, env_manager: str | None, seconds: int) -> Generator[str]:
    """The address of a server that was started in an empty folder by the command the programs print."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    settings = Settings.load()
    printed = export.serve_command(settings.tracking_uri).split()
    assert printed[0] == f"MLFLOW_TRACKING_URI={settings.tracking_uri}"
    command = [*printed[1 : printed.index("-p")], "-p", str(port)]
    command += ["--env-manager", env_manager] if env_manager else []
    folder.mkdir()
    log = folder / "serve.log"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": settings.tracking_uri}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()


def ask(base: str, body: object) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(
        f"{base}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read())


@pytest.fixture
def champion(lab: Path, toy_csv: Path) -> None:
    """A study of one trial, whose model is lm@champion."""
    tune.main([*TOY_FLAGS, "--corpus", str(toy_csv), "--trials", "1", "--lr", "0.003"])


GOOD = {"inputs": ["does the otter"], "params": {"max_new_tokens": 5, "temperature": 0.8, "seed": 1}}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("env_manager", "seconds"), [("local", 90), (None, 500)], ids=["local", "default"])
def test_the_champion_answers_text(champion: None, tmp_path: Path, env_manager: str | None, seconds: int) -> None:
    with serving(tmp_path / "empty", env_manager, seconds) as base:
        status, answer = ask(base, GOOD)
        assert status == 200
        [text] = answer["predictions"]  # type: ignore[misc]
        assert text.startswith("does the otter ")
        assert ask(base, GOOD) == (status, answer)
        status, refused = ask(base, {**GOOD, "params": {"temperature": -1.0}})
        assert status == 400
        assert "temperature must be 0 (greedy) or 0.001 to 1000: got -1.0" in str(refused["message"])
        assert ask(base, GOOD)[0] == 200
