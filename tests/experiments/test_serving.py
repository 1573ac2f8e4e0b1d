"""The registered model behind the real `mlflow models serve`, asked over HTTP."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
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
def serving(folder: Path, env_manager: str | None, seconds: int, *flags: str, **setting: str) -> Generator[str]:
    """The address of a server that was started in an empty folder by the command the programs print."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    settings = Settings.load()
    printed = export.serve_command(settings.tracking_uri).split()
    assert printed[0] == f"MLFLOW_TRACKING_URI={settings.tracking_uri}"
    command = [*printed[1 : printed.index("-p")], "-p", str(port)]
    command += ["--env-manager", env_manager] if env_manager else []
    command += flags
    folder.mkdir()
    log = folder / "serve.log"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": settings.tracking_uri}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= setting
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


def raw(base: str, body: bytes, content_type: str | None = "application/json") -> tuple[int, str]:
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=60)
    connection.request("POST", "/invocations", body, {"Content-Type": content_type} if content_type else {})
    answer = connection.getresponse()
    said = answer.read().decode()
    connection.close()
    return answer.status, said


def bad_requests(chance: random.Random) -> Generator[tuple[bytes, str | None]]:
    """Types, sizes, nesting, encodings, numbers, words, content types and cut bodies; none is good."""
    values = [
        None,
        True,
        -1,
        5.5,
        10**400,
        float("nan"),
        float("inf"),
        -1e308,
        "x",
        [],
        {},
        [["a"]],
        "\x00\x1b",
        "9" * 300,
    ]
    for name in ("max_new_tokens", "top_k", "num_return_sequences", "seed"):
        for value in values:
            if value not in (True, -1) and not (name == "top_k" and value == 0):
                yield json.dumps({"inputs": ["does the otter"], "params": {name: value}}).encode(), "application/json"
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        for value in values:
            if value != 5.5:
                yield json.dumps({"inputs": ["does the otter"], "params": {name: value}}).encode(), "application/json"
    for inputs in (
        *values,
        [1],
        [None],
        [{}],
        ["a"] * 65,
        ["does " * 3000],
        ["\x00\x01\x02"],
        ["qwxzq vvvvv"],
        [""],
        [" "],
    ):
        for form in ("inputs", "instances", "dataframe_records", "dataframe_split"):
            yield json.dumps({form: inputs}).encode(), "application/json"
    for table in (
        [{"a": "the", "b": "the"}],
        {"columns": ["a", "b"], "data": [["the", "the"]]},
        {"data": 5},
        {"data": [5]},
    ):
        yield json.dumps({"dataframe_split": table}).encode(), "application/json"
        yield json.dumps({"dataframe_records": table}).encode(), "application/json"
    for typo in ("temprature", "max_tokens", "TOP_K", "", "\ud83d", "x" * 5000):
        yield (
            json.dumps({"inputs": ["does the otter"], "params": {typo: 1}}).encode("utf-8", "replace"),
            "application/json",
        )
    yield json.dumps({"inputs": ["does the otter"], "param": {}}).encode(), "application/json"
    yield json.dumps({"inputs": ["does the otter"], "instances": ["does the otter"]}).encode(), "application/json"
    yield b"[" * 100_000, "application/json"
    yield b'{"inputs": ' * 3000, "application/json"
    yield b'{"inputs": ["' + b"a" * 20_000_000 + b'"]}', "application/json"
    good = json.dumps(GOOD).encode()
    for content_type in (
        None,
        "text/html",
        "application/xml",
        "application/json; charset=utf-16",
        "application/json; x=1",
        ";;;",
        "a" * 500,
    ):
        yield good, content_type
    for content_type in ("text/csv", "application/vnd.apache.parquet", "application/jsonx"):
        yield good[:0], content_type
        yield b"\xff\xfe\x00", content_type
    while True:
        cut = bytearray(good[: chance.randrange(len(good))])
        if cut and chance.random() < 0.5:
            cut[chance.randrange(len(cut))] = chance.randrange(128, 256)
        yield bytes(cut), "application/json"


@pytest.mark.timeout(600)
def test_three_hundred_bad_requests_are_refused_in_one_line_each(champion: None, tmp_path: Path) -> None:
    with serving(tmp_path / "empty", "local", 90) as base:
        good = ask(base, GOOD)
        asked = bad_requests(random.Random(0))
        for _ in range(320):
            body, content_type = next(asked)
            status, said = raw(base, body, content_type)
            case = (body[:200], content_type, status, said[:500])
            assert 400 <= status < 500, case
            assert "Traceback" not in said, case
            assert 'File "' not in said, case
            assert "/" not in said.replace("application/json", "").replace("text/", "").replace("application/", ""), (
                case
            )
            assert len(said) < 700, case
            answer = json.loads(said)
            assert set(answer) == {"error_code", "message"}, case
            assert "\n" not in answer["message"], case
        assert ask(base, GOOD) == good
        for form in (
            {"dataframe_split": {"columns": ["text"], "data": [GOOD["inputs"]]}},
            {"dataframe_records": [{"text": "does the otter"}]},
            {"instances": GOOD["inputs"]},
        ):
            assert ask(base, {**form, "params": GOOD["params"]}) == good
        chat = [sys.executable, str(Path(__file__).parents[2] / "experiments/chat.py"), "--url", base]
        typed = "does the otter\n/next\n"
        flags = ["--max-new-tokens", "5", "--seed", "1"]
        said = subprocess.run([*chat, *flags], input=typed, capture_output=True, text=True, check=True).stdout
        assert good[1]["predictions"][0] in said  # type: ignore[index]
        assert "candidates need the model in this process: got --url. Try --model." in said


@pytest.mark.timeout(600)
def test_a_full_queue_and_a_deadline_are_told_and_a_ping_is_answered_meanwhile(champion: None, tmp_path: Path) -> None:
    long = {"inputs": ["does the otter"], "params": {"max_new_tokens": 1_000_000, "temperature": 1.0}}
    limits = {"LM_SERVE_WAITING": "4", "LM_SERVE_DEADLINE_SECONDS": "8", "LM_SERVE_NEW_TOKENS": "1000000"}
    with serving(tmp_path / "empty", "local", 90, **limits) as base:
        found: list[tuple[int, dict[str, object]]] = []
        threads = [threading.Thread(target=lambda: found.append(ask(base, long))) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        began = time.monotonic()
        status, answer = ask(base, GOOD)
        assert status == 429, answer
        assert answer["error_code"] == "RESOURCE_EXHAUSTED"
        assert answer["message"] == "at most 4 requests may wait: got one more. Try again in a second."
        urllib.request.urlopen(f"{base}/ping", timeout=4)
        assert time.monotonic() - began < 4
        for thread in threads:
            thread.join()
        assert [status for status, _ in found] == [504] * 4
        assert "an answer must be made in 8 s: got " in str(found[0][1]["message"])
        status, part = ask(base, {**long, "params": {**long["params"], "return": "full"}})  # type: ignore[dict-item]
        assert status == 200
        assert part["predictions"][0]["finish_reason"] == "deadline"  # type: ignore[index]
        assert ask(base, GOOD)[0] == 200


@pytest.mark.timeout(600)
def test_a_killed_worker_is_replaced_where_there_are_two(champion: None, tmp_path: Path) -> None:
    with serving(tmp_path / "empty", "local", 90, "--workers", "2") as base:
        good = ask(base, GOOD)
        pids = {
            int(line)
            for line in subprocess.run(
                ["pgrep", "-f", "multiprocessing.spawn"], capture_output=True, text=True, check=False
            ).stdout.split()
        }
        mine = [pid for pid in pids if str(os.getpgid(pid)) in str(server_groups(base))]
        assert len(mine) == 2
        os.kill(mine[0], signal.SIGKILL)
        answered = 0
        deadline = time.monotonic() + 60
        while answered < 20 and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                answered += ask(base, GOOD) == good
        assert answered == 20


def server_groups(base: str) -> set[int]:
    """Process groups of those who listen at the address."""
    port = base.rsplit(":", 1)[1]
    found = subprocess.run(["pgrep", "-f", f"[-][-]port {port}"], capture_output=True, text=True, check=False)
    return {os.getpgid(int(pid)) for pid in found.stdout.split()}
