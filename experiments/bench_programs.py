"""Benchmarks of whole programs: how soon they answer, and the default study against the write-up's loop."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from lm.config import Config
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.rivals import Job
    from lm.data import TokenizedCorpus

_HERE = Path(__file__).parent
PROGRAMS = ("train", "tune", "compare", "report", "leak_study", "ui", "bench")
_FIRST_STEP = """
import sys, time, lm.train
from experiments import train
step = lm.train.train_step
def first(*arguments):
    step(*arguments)
    print("first step at", time.time())
    raise KeyboardInterrupt
lm.train.train_step = first
try:
    train.main(sys.argv[1:])
except KeyboardInterrupt:
    pass
"""
_ECHO = """
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
class Echo(PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        return model_input
set_model(Echo())
"""
_LOOP = """
import sys, time
from experiments import export
from experiments.settings import Settings
from experiments.tracking import Tracker
Tracker(Settings.load())
service = export.load_service("models:/lm@champion")
n, end = 0, time.perf_counter() + float(sys.argv[1])
start = time.perf_counter()
while time.perf_counter() < end:
    service.answer(["what is the"], {"max_new_tokens": 20})
    n += 1
print(n / (time.perf_counter() - start))
"""
_LOG_ECHO = "import sys, mlflow; mlflow.pyfunc.save_model(sys.argv[2], python_model=sys.argv[1])"


def startup(job: Job, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds until a program helps, trains and serves; a served model is held against one that does nothing."""
    del job
    found: dict[str, Any] = {}
    for program in PROGRAMS:
        times = [_seconds([str(_HERE / f"{program}.py"), "--help"]) for _ in range(3 if quick else 7)]
        found[f"help_{program}_seconds"] = statistics.median(times)
        name = f"{program}.py --help"
        say(f"{name:23} {statistics.median(times):.2f} s  (from {min(times):.2f} to {max(times):.2f})")
    with _laboratory() as environment, tempfile.TemporaryDirectory() as folder:
        command = ["-c", _FIRST_STEP, "--corpus", "sample", "--run-name", "first step"]
        found["first_step_new_seconds"] = _first_step(command, environment)
        times = [_first_step(command, environment) for _ in range(2 if quick else 5)]
        found["first_step_seconds"] = statistics.median(times)
        warm, new = found["first_step_seconds"], found["first_step_new_seconds"]
        say(f"first step of train.py  {warm:.1f} s, {new:.1f} s in a new store")
        flags = ["--preset", "tiny", "--corpus", "sample", "--epochs", "1", "--trials", "1"]
        _seconds([str(_HERE / "tune.py"), *flags], environment)
        echo = Path(folder) / "echo.py"
        echo.write_text(_ECHO)
        _seconds(["-c", _LOG_ECHO, str(echo), f"{folder}/echo"], environment)
        ours, theirs = list[float](), list[float]()
        for _ in range(1 if quick else 3):
            theirs.append(_served(f"{folder}/echo", environment))
            ours.append(_served("models:/lm@champion", environment))
        found |= {"served_seconds": statistics.median(ours), "served_echo_seconds": statistics.median(theirs)}
        say(
            f"mlflow models serve     {found['served_seconds']:.1f} s until it answers; "
            f"a model that does nothing {found['served_echo_seconds']:.1f} s"
        )
    return found


@contextmanager
def _laboratory() -> Generator[dict[str, str]]:
    """The environment of a store that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        others = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "OPTUNA_STORAGE", "LM_ARTIFACT_ROOT")
        yield {**os.environ, **dict.fromkeys(others, ""), "LM_MLRUNS_DIR": folder}


def _seconds(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    start = time.perf_counter()
    _printed(arguments, environment)
    return time.perf_counter() - start


def _first_step(arguments: Sequence[str], environment: Mapping[str, str]) -> float:
    start = time.time()
    return float(_printed(arguments, environment).rsplit("first step at", 1)[1].split()[0]) - start


def _printed(arguments: Sequence[str], environment: Mapping[str, str] | None) -> str:
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"a program must run to be timed: got {_last_line(done.stderr)}. Try it alone.")
    return done.stdout


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1][:200]


def _served(model: str, environment: Mapping[str, str]) -> float:
    """Seconds until `mlflow models serve` answers a ping."""
    with _serving(model, environment) as (_, seconds, _):
        return seconds


@contextmanager
def _serving(model: str, environment: Mapping[str, str]) -> Generator[tuple[int, float, int]]:
    """A served model: its port, the seconds until it answered, and the process that was started."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    environment = {
        **environment,
        "MLFLOW_TRACKING_URI": f"sqlite:///{environment['LM_MLRUNS_DIR']}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow starts uvicorn by name
    }
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        model,
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            while True:
                try:
                    with direct.open(f"http://127.0.0.1:{port}/ping", timeout=5):
                        break
                except OSError:
                    if server.poll() is not None or time.perf_counter() - start > 120:
                        said.seek(0)
                        last = _last_line(said.read().decode(errors="replace"))
                        raise UserError(f"the served model must answer: got {last}. Try it alone.") from None
                    time.sleep(0.02)
            yield port, time.perf_counter() - start, server.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def serve(job: Job, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Requests for 20 tokens to a served model of the tiny preset, by 1, 8 and 32 clients on this machine.

    They are held against the same model called in a loop by one process. Memory is the server's, before and after.
    """
    del job
    found: dict[str, Any] = {}
    seconds, least = (3.0, 0) if quick else (60.0, 20_000)
    with _laboratory() as environment:
        flags = ["--preset", "tiny", "--corpus", "sample", "--epochs", "1", "--trials", "1"]
        _seconds([str(_HERE / "tune.py"), *flags], environment)
        alone = float(_printed(["-c", _LOOP, str(seconds / 3)], environment).split()[-1])
        found["alone_per_second"] = alone
        say(f"in a loop, without a server   {alone:6.1f} a second")
        with _serving("models:/lm@champion", environment) as (port, _, pid):
            _load(port, 4, 2.0)
            found["memory_mib"] = [_memory(pid)]
            asked = 0
            for clients in (1, 8, 32):
                times = _load(port, clients, seconds)
                asked += len(times)
                rate = len(times) / seconds
                middle, slowest = (1e3 * statistics.quantiles(times, n=100)[p - 1] for p in (50, 99))
                found[f"clients_{clients}"] = {"per_second": rate, "p50_ms": middle, "p99_ms": slowest}
                say(
                    f"{clients:2} clients                    {rate:6.1f} a second, {rate / alone:.2f} x the loop; "
                    f"half within {middle:.0f} ms, 99 of 100 within {slowest:.0f} ms"
                )
            while asked < least:
                asked += len(_load(port, 8, seconds))
            found["memory_mib"].append(_memory(pid))
            found["requests"] = asked
    before, after = found["memory_mib"]
    say(f"{asked:,} requests; the server's memory {before:,.0f} MiB before, {after:,.0f} MiB after")
    found["ratio_vs_loop"] = found["clients_8"]["per_second"] / alone
    return found


def _load(port: int, clients: int, seconds: float) -> list[float]:
    """Seconds of each answered request, while so many clients ask one after another."""
    body = json.dumps({"inputs": ["what is the"], "params": {"max_new_tokens": 20}}).encode()
    until, times = time.perf_counter() + seconds, list[float]()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=90)
        while time.perf_counter() < until:
            start = time.perf_counter()
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise UserError(f"a good request must be answered: got {answer.status}. Try the model alone.")
            times.append(time.perf_counter() - start)
        connection.close()

    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(ask) for _ in range(clients)]:
            done.result()
    return times


def _memory(group: int) -> float:
    """Resident MiB of all processes of a group (Linux)."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(status.parent.name)) == group:
                total += int(status.read_text().partition("VmRSS:")[2].split()[0])
    return total / 1024


def study(job: Job, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The default study of 20 trials on the sample, against the write-up's loop on the same trials.

    The loop's time is estimated: its measured step at each number of layers, times the steps of the epochs that the
    study trained, with neither validation, tracking nor start-up. Its best perplexity is measured: it is trained
    once at the winner's point, for as many epochs as the winner had; that the point was chosen by our
    figures favours us.
    """
    from experiments.search_space import PATIENCE
    from experiments.study import best_value, complete, latest_study, open_storage

    config = job.config.override({"corpus": "sample"})
    trials = 4 if quick else 20
    with _laboratory() as environment:
        usual = Config().override({"patience": PATIENCE}).flat()
        changed = {name: value for name, value in config.flat().items() if value != usual[name]}
        flags = [part for name, value in changed.items() for part in _flag(name, value)]
        say(f"python experiments/tune.py --trials {trials} {' '.join(flags)}")
        seconds = _seconds([str(_HERE / "tune.py"), "--trials", str(trials), *flags], environment)
        found = latest_study(open_storage(f"sqlite:///{environment['LM_MLRUNS_DIR']}/optuna.db"), None)
        finished = [t for t in found.get_trials() if t.state.is_finished()]
        winner = min(complete(found), key=best_value)
    say(f"ours     {seconds:.0f} s, best perplexity {best_value(winner):.2f} ({winner.params})")
    text, steps_an_epoch = _sample(config)
    layers = sorted({int(t.params["n_layers"]) for t in finished})
    step_seconds = {n: _literal_seconds(config.override({"n_layers": n}), len(text.vocab)) for n in layers}
    epochs = {n: sum(len(t.intermediate_values) for t in finished if t.params["n_layers"] == n) for n in layers}
    estimated = sum(step_seconds[n] * steps_an_epoch * epochs[n] for n in layers)
    say(f"literal  {estimated:.0f} s (estimated: {steps_an_epoch} steps an epoch, {sum(epochs.values())} epochs)")
    point = config.override({**winner.params, "epochs": len(winner.intermediate_values)})
    about = step_seconds[int(winner.params["n_layers"])] * steps_an_epoch * point.train.epochs
    say(f"literal  trains the winner's point, about {cli.duration(about)}")
    literal = _literal_best(point, text)
    say(f"literal  best perplexity {literal:.2f}")
    return {
        "seconds": seconds,
        "literal_seconds": estimated,
        "ratio_vs_literal": estimated / seconds,
        "perplexity": best_value(winner),
        "literal_perplexity": literal,
        "epochs": sum(epochs.values()),
        "trials": len(finished),
        "literal_step_seconds": {str(n): value for n, value in step_seconds.items()},
    }


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    return [f"--{flag}", str(value)]


def _sample(config: Config) -> tuple[TokenizedCorpus, int]:
    from experiments import text as texts
    from experiments.settings import Settings

    tokens = texts.read_text(config.data, Settings.load()).tokens
    return tokens, tokens.windows("train", config.model.seq_len).n_batches(config.train.batch_size)


def _literal_seconds(config: Config, vocab_size: int) -> float:
    from experiments.rivals import Contestant, Job

    contestant = Contestant("literal", Job(config, vocab_size))
    contestant.run(1)
    seconds = statistics.median(contestant.run(4))
    contestant.close()
    return seconds


def _literal_best(config: Config, tokens: TokenizedCorpus) -> float:
    """Best validation perplexity of the write-up's loop over the config's epochs."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from experiments import rivals
    from lm import runtime

    job = rivals.Job(config, len(tokens.vocab))
    device = runtime.resolve_device(config.train.device)
    model = rivals.literal_network(job).to(device)
    step = rivals.literal_step(job, model)
    train, validation = (tokens.windows(split, config.model.seq_len) for split in ("train", "validation"))
    best = math.inf
    for epoch in range(config.train.epochs):
        model.train()
        for inputs_BT, targets_BT in train.shuffled(config.train.batch_size, epoch):
            step(inputs_BT.to(device), targets_BT.to(device))
        model.eval()
        with torch.inference_mode():
            nats = sum(
                F.cross_entropy(
                    model(inputs_BT.to(device)).flatten(0, 1), targets_BT.flatten().to(device), reduction="sum"
                ).item()
                for inputs_BT, targets_BT in validation.in_order(config.train.batch_size)
            )
        best = min(best, math.exp(nats / validation.n_targets))
    return best
