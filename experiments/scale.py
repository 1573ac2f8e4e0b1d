"""Benchmarks beyond one process: several that train one model, a text larger than memory, many workers of a study."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.rivals import Job
    from experiments.settings import Settings

_TRAIN = str(Path(__file__).with_name("train.py"))
_OTHERS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "OPTUNA_STORAGE", "LM_ARTIFACT_ROOT")
_STEPS, _EPOCHS = 50, 4
_TOKENS, _QUICK_TOKENS = (10_000_000, 100_000_000), (1_000_000,)
_WORDS, _A_RECORD, _A_CHUNK = 30_000, 40, 1_000_000
_WORKERS, _TRIAL_EPOCHS, _HEADS = (1, 4, 16, 64), 5, 32

Say = Callable[[str], None]


def parallel(job: Job, quick: bool, say: Say) -> dict[str, Any]:
    """The same steps on the sample by one process and by two: losses, and tokens a second."""
    found: dict[str, Any] = {}
    flags = ["--corpus", "sample", "--steps-per-epoch", str(10 if quick else _STEPS), "--epochs", str(_EPOCHS)]
    cores = os.cpu_count() or 1
    plans = {"1 process": (1, cores), "2 processes": (2, max(1, cores // 2))}
    losses: dict[str, list[list[float]]] = {}
    for name, (n, threads) in plans.items():
        with _store() as (settings, environment):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
            command = [sys.executable, *launcher, _TRAIN, *_changed(job), *flags, "--run-name", "run"]
            _Watched(command, {**environment, "OMP_NUM_THREADS": str(threads)})
            losses[name], speed = _history(settings)
        found[f"{name}, tokens a second"] = speed
        gap = max(
            abs(a - b) for one, other in zip(losses["1 process"], losses[name], strict=True)
            for a, b in zip(one, other, strict=True)
        )  # fmt: skip
        found[f"{name}, largest difference of a loss"] = gap
        say(f"{name:28} {speed:8,.0f} tokens/s  losses differ by {gap:.1e} at the most over {_EPOCHS} epochs")
    return found


def corpus(job: Job, quick: bool, say: Say) -> dict[str, Any]:
    """A made-up text tokenised, trained on and gone on with: time, and the memory of the process itself."""
    found: dict[str, Any] = {}
    steps = 10 if quick else 100
    for n in _QUICK_TOKENS if quick else _TOKENS:
        with _store() as (settings, environment):
            file = settings.mlruns / "text.jsonl"
            _write_text(file, n)
            flags = ["--corpus", str(file), "--text-column", "text", "--validation-fraction", str(min(0.05, 5e4 / n))]
            flags += ["--test-fraction", str(min(0.05, 5e4 / n)), "--steps-per-epoch", str(steps)]
            command = [sys.executable, _TRAIN, *_changed(job), *flags, "--epochs", "2", "--run-name", "run"]
            first = _Watched(command, environment)
            again = _Watched([sys.executable, _TRAIN, "--resume", "run", "--epochs", "4"], environment)
            (trained, validated), _ = _history(settings)
        values = {
            "tokens": n, "seconds_to_tokens": first.seconds_before, "resume_seconds_to_tokens": again.seconds_before,
            "tokenise_mib": first.mib_before, "train_mib": first.mib_after, "resume_mib": again.mib_after,
            "train_loss": trained, "validation_loss": validated,
        }  # fmt: skip
        found[f"{n} tokens"] = values
        say(
            f"{n:>11,} tokens: read and tokenised in {first.seconds_before:.0f} s with {first.mib_before:,.0f} MiB, "
            f"again {again.seconds_before:.0f} s; {2 * steps} steps with {first.mib_after:,.0f} MiB, "
            f"{2 * steps} more after a resume with {again.mib_after:,.0f}; "
            f"train loss {' '.join(f'{loss:.3f}' for loss in trained)}"
        )
    return found


def workers(job: Job, quick: bool, say: Say) -> dict[str, Any]:
    """How many trials, reports and metrics a second the stores of the settings take from workers that train nothing."""
    del job
    from experiments.settings import Settings

    settings = replace(Settings.load(), experiment=f"load-{os.getpid()}")
    say(f"MLflow {_place(settings.tracking_uri)}, Optuna {_place(settings.optuna_storage)}")
    found: dict[str, Any] = {}
    fork = multiprocessing.get_context("fork")
    from experiments import claims, tracking  # before the fork: the workers share the memory

    del claims
    for n in _WORKERS[:2] if quick else _WORKERS:
        trials, name = max(8, 2 * n), f"{settings.experiment}-{n}"
        answers: Any = fork.SimpleQueue()
        _open(settings, name, trials)
        began = time.perf_counter()
        processes = [fork.Process(target=_work, args=(settings, name, trials, answers)) for _ in range(n)]
        for process in processes:
            process.start()
        told = [answers.get() for _ in processes]
        seconds = time.perf_counter() - began
        for process in processes:
            process.join()
        _remove_study(settings, name)
        errors = [answer for answer in told if isinstance(answer, str)]
        if errors:
            raise UserError(
                f"every worker must come to its end: got {len(errors)} that did not ({errors[0]}). Try fewer."
            )
        epochs = sorted(second for answer in told for second in answer)
        values = {
            "trials_a_second": trials / seconds,
            "epochs_a_second": len(epochs) / seconds,
            "metrics_a_second": len(epochs) * len(_figures(0)) / seconds,
            "epoch_p50_seconds": statistics.median(epochs),
            "epoch_p99_seconds": epochs[int(0.99 * (len(epochs) - 1))],
        }
        found[f"{n} workers"] = values
        say(
            f"{n:3} workers: {values['trials_a_second']:6.2f} trials/s  {values['epochs_a_second']:6.1f} epochs/s  "
            f"{values['metrics_a_second']:8,.0f} metrics/s  to log an epoch p50 {values['epoch_p50_seconds']:.2f} s, "
            f"p99 {values['epoch_p99_seconds']:.2f} s"
        )
    tracker = tracking.Tracker(settings)
    tracker.client.delete_experiment(tracker.experiment_id)
    most = max(values["epochs_a_second"] for values in found.values())
    say(f"so they carry {60 * most:,.0f} workers whose epochs take a minute")
    return found | {"workers_of_a_minute": 60 * most}


def _place(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _open(settings: Settings, name: str, trials: int) -> None:
    from experiments.locks import store_lock
    from experiments.study import open_storage, open_study
    from experiments.tracking import Tracker

    Tracker(settings)
    with store_lock(settings):
        open_study(open_storage(settings.optuna_storage), name, {"lr": 1e-3}, trials)


def _remove_study(settings: Settings, name: str) -> None:
    from experiments.study import open_storage

    storage = open_storage(settings.optuna_storage)
    storage.delete_study(storage.get_study_id_from_name(name))


def _figures(epoch: int) -> dict[str, float]:
    """As many figures as an epoch of the reference model has."""
    from experiments.tracking import ATTENTION_MEASURES

    figures = {f"figure_{i}": epoch + i / 100 for i in range(12)}
    for measure in ATTENTION_MEASURES:
        figures |= {f"attention_{measure}/head_{i}": 1 / (epoch + i + 1) for i in range(_HEADS)}
    return figures


def _work(settings: Settings, name: str, trials: int, answers: Any) -> None:
    try:
        answers.put(_light_worker(settings, name, trials))
    except BaseException as e:
        answers.put(f"{type(e).__name__}: {e}".splitlines()[0][:200])


def _light_worker(settings: Settings, name: str, trials: int) -> list[float]:
    """What `tune.py` asks of the stores, without training; seconds that each epoch took to be logged."""
    from experiments.claims import Claims
    from experiments.locks import store_lock
    from experiments.study import Plans, open_storage
    from experiments.tracking import Tracker

    tracker, storage = Tracker(settings), open_storage(settings.optuna_storage, settings.heartbeat_seconds)
    claims = Claims(storage, name, Plans("random"), lambda: store_lock(settings), f"worker {os.getpid()}")
    taken: list[float] = []
    while claim := claims.take(trials, 0, lambda trial: {"lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}):
        tags = {"lm.kind": "trial", "lm.study": name, "lm.trial": str(claim.number)}
        with tracker.run(f"trial {claim.number}", tags) as run:
            claim.set_run(run.id)
            run.log_params(claim.point)
            for epoch in range(1, _TRIAL_EPOCHS + 1):
                start = time.perf_counter()
                run.require_owner()
                run.log_once(_figures(epoch), epoch)
                run.log_page(f"samples/epoch_{epoch:03d}.txt", "what is an otter ?\n")
                claim.report({epoch: 100.0 / epoch + claim.number})
                claim.should_prune()
                taken.append(time.perf_counter() - start)
        claim.complete()
    return taken


def _changed(job: Job) -> list[str]:
    """The flags by which a job's config differs from the recipe."""
    from lm.config import Config

    usual = Config().flat()
    return [
        part
        for name, value in job.config.flat().items()
        if value != usual[name]
        for part in (
            (f"--{'' if value else 'no-'}{name.replace('_', '-')}",)
            if isinstance(value, bool)
            else (f"--{name.replace('_', '-')}", str(value))
        )
    ]


@contextmanager
def _store() -> Generator[tuple[Settings, dict[str, str]]]:
    """A laboratory that is thrown away: its settings, and the environment in which programs find it."""
    from experiments.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **dict.fromkeys(_OTHERS, ""), "LM_MLRUNS_DIR": folder}
        mlruns = Path(folder)
        uris = {
            "tracking_uri": f"sqlite:///{mlruns / 'mlflow.db'}",
            "optuna_storage": f"sqlite:///{mlruns / 'optuna.db'}",
        }
        yield replace(Settings.load(), mlruns=mlruns, artifact_root=str(mlruns / "artifacts"), **uris), environment


def _history(settings: Settings) -> tuple[list[list[float]], float]:
    """Train and validation loss of each epoch of the run named `run`, and its median tokens a second."""
    from experiments.tracking import Tracker

    tracker = Tracker(settings)
    run = tracker.open_run(tracker.find_run("run").info.run_id)
    curves = [list(run.history(name).values()) for name in ("train_loss", "validation_loss", "tokens_per_second")]
    return curves[:2], statistics.median(curves[2])


class _Watched:
    """A program that is run and watched: how long until it trains, and its own memory before and after that."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.seconds_before = self.mib_before = self.mib_after = 0.0
        began, trains = time.perf_counter(), threading.Event()
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process:
                watch = threading.Thread(target=self._watch, args=(process.pid, trains))
                watch.start()
                for line in process.stdout or ():
                    if line.startswith("on ") and not trains.is_set():
                        self.seconds_before = time.perf_counter() - began
                        trains.set()
            watch.join()
            if process.returncode:
                errors.seek(0)
                said = [line for line in errors.read().splitlines() if line.startswith("train.py: ")]
                raise UserError(f"a program must run to be timed: got {said[:1]}. Try it alone.")

    def _watch(self, pid: int, trains: threading.Event) -> None:
        status = Path(f"/proc/{pid}/status")
        while True:
            try:
                own = re.search(r"RssAnon:\s+(\d+)", status.read_text())
            except OSError:  # it has ended
                return
            if own is None:
                return
            mib = int(own.group(1)) / 1024
            if trains.is_set():
                self.mib_after = max(self.mib_after, mib)
            else:
                self.mib_before = max(self.mib_before, mib)
            time.sleep(0.05)


def _write_text(file: Path, n_tokens: int) -> None:
    """Sentences of made-up words, as frequent as in text (Zipf's law), each of which follows some others more often."""
    rng = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "ten", "ra", "su", "vo", "ni", "der", "pa", "qui", "sol", "ar", "en", "tu"]
    words = np.array([f"{''.join(rng.choice(syllables, rng.integers(1, 5)))}{i % 97}" for i in range(_WORDS)])
    edges = np.cumsum(1 / np.arange(1, _WORDS + 1))
    try:
        with file.open("w", encoding="utf-8") as f:
            for start in range(0, n_tokens, _A_CHUNK):
                drawn = np.searchsorted(edges, rng.random(min(_A_CHUNK, n_tokens - start)) * edges[-1])
                follows = rng.random(len(drawn)) < 0.5
                drawn[1:][follows[1:]] = (drawn[:-1][follows[1:]] * 7 + 1) % _WORDS
                for i in range(0, len(drawn), _A_RECORD):
                    f.write(json.dumps({"text": " ".join(words[drawn[i : i + _A_RECORD]])}) + "\n")
    except OSError as e:
        raise UserError(f"the disk must hold the text: got {e.strerror}. Try TMPDIR=/another/folder.") from e
