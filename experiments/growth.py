"""How time and memory grow with vocabulary, window, layers and corpus: measured, and drawn as a page."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rivals import Contestant, Job, peak_mib
from lm.errors import UserError

_CHUNK = 1_000_000


@dataclass(frozen=True)
class Axis:
    """What is varied: a field, its values, and what it is called on the page."""

    name: str
    values: Sequence[int]
    quick: Sequence[int]
    label: str

    def job(self, job: Job, value: int) -> Job:
        """The job with that value; a longer window has as many tokens a step."""
        if self.name == "vocab_size":
            return Job(job.config, value)
        changes = {self.name: value}
        if self.name == "seq_len":
            changes["batch_size"] = max(1, job.tokens // value)
        return Job(job.config.override(changes), job.vocab_size)


AXES = (
    Axis("vocab_size", (2_000, 8_000, 18_707, 32_000, 64_000), (2_000, 8_000), "words in the vocabulary"),
    Axis("seq_len", (32, 64, 128, 256, 512, 1024), (32, 64), "tokens in a window, at as many tokens a step"),
    Axis("n_layers", (1, 2, 4, 8, 16), (1, 2), "layers"),
    Axis("d_model", (128, 256, 512, 1024), (128, 256), "width"),
)
CORPUS = (1_000_000, 10_000_000, 100_000_000)


def measure(job: Job, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Time a token and peak memory along each axis, with the exponent by which each grows; writes a page."""
    from experiments.settings import Settings

    found: dict[str, Any] = {}
    plan = {axis: {v: axis.job(job, v) for v in (axis.quick if quick else axis.values)} for axis in AXES}
    for axis, jobs in plan.items():
        points: list[tuple[int, float, float]] = []
        for value, varied in jobs.items():
            contestant = Contestant("ours", varied)
            contestant.run(2)
            seconds = statistics.median(contestant.run(3 if quick else 7)) / varied.tokens
            points.append((value, seconds, contestant.close()))
            say(f"{axis.name:10} {value:>11,}  {1e6 * seconds:8.3g} us a token  {points[-1][2]:8,.0f} MiB")
        found[axis.name] = _points(points)
    points = []
    for n_tokens in CORPUS[:1] if quick else CORPUS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            seconds, memory = alone.submit(_corpus, job, n_tokens).result()
        points.append((n_tokens, seconds, memory))
        say(f"{'corpus':10} {n_tokens:>11,}  {1e6 * seconds:8.3g} us a token  {memory:8,.0f} MiB")
    found["corpus"] = _points(points)
    folder = Settings.load().mlruns / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "growth.html"
    path.write_text(_page(found), encoding="utf-8")
    say(f"page     {path}")
    return found


def _points(points: Sequence[tuple[int, float, float]]) -> dict[str, Any]:
    values, seconds, memory = zip(*points, strict=True)
    return {
        "values": values,
        "seconds_a_token": seconds,
        "peak_mib": memory,
        "time_exponent": _exponent(values, seconds),
        "memory_exponent": _exponent(values, memory),
    }


def _exponent(values: Sequence[float], measured: Sequence[float]) -> float | None:
    """The power by which it grew between the two largest values; None of a single one, or of nothing."""
    if len(values) < 2 or min(measured[-2:]) <= 0:
        return None
    return math.log(measured[-1] / measured[-2]) / math.log(values[-1] / values[-2])


def _corpus(job: Job, n_tokens: int) -> tuple[float, float]:
    """Seconds a token to cut the batches of an epoch from a file of ids, and the process's own memory (MiB).

    The text is made a million tokens at a time and never held; batches are cut from the memory-mapped file, whose pages
    are not counted: the kernel takes them back when it needs them.
    """
    from lm.data import Windows

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids"
        try:
            with path.open("wb") as f:
                for start in range(0, n_tokens, _CHUNK):
                    drawn = rng.zipf(1.2, min(_CHUNK, n_tokens - start)) % job.vocab_size
                    f.write(drawn.astype(np.uint32).tobytes())
        except OSError as e:
            raise UserError(f"the disk must hold {4 * n_tokens:,} bytes: got {e.strerror}. Try TMPDIR=/another.") from e
        windows = Windows(np.memmap(path, np.uint32, "r"), job.config.model.seq_len)
        start, taken = time.perf_counter(), 0
        for inputs_BT, _ in windows.shuffled(job.config.train.batch_size, 0):
            taken += inputs_BT.numel()
            if time.perf_counter() - start > 20:
                break
        seconds = (time.perf_counter() - start) / taken
    status = Path("/proc/self/status")
    own = status.read_text().partition("RssAnon:")[2].split() if status.exists() else []
    return seconds, int(own[0]) / 1024 if own else peak_mib()


def _page(found: dict[str, Any]) -> str:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from experiments import plots

    labels = {axis.name: axis.label for axis in AXES} | {"corpus": "tokens in the corpus (cutting batches alone)"}
    figures: list[tuple[str, str, go.Figure]] = []
    for name, points in found.items():
        figure = make_subplots(specs=[[{"secondary_y": True}]])
        figure.add_scatter(x=points["values"], y=[1e6 * s for s in points["seconds_a_token"]], name="us a token")
        figure.add_scatter(x=points["values"], y=points["peak_mib"], name="MiB at the most", secondary_y=True)
        figure.update_xaxes(type="log", title_text=labels[name])
        figure.update_yaxes(type="log", title_text="microseconds a token", secondary_y=False)
        figure.update_yaxes(type="log", title_text="MiB", secondary_y=True)
        exponent = points["time_exponent"]
        memory = points["memory_exponent"]
        says = "Too few points to say how it grows."
        if exponent is not None and memory is not None:
            says = f"At its end time a token grows with power {exponent:.2f}, memory with power {memory:.2f}."
        figures.append((labels[name], says, figure))
    header = ["axis", "value", "us a token", "MiB"]
    rows = [
        [name, f"{value:,}", f"{1e6 * seconds:.3g}", f"{memory:,.0f}"]
        for name, points in found.items()
        for value, seconds, memory in zip(points["values"], points["seconds_a_token"], points["peak_mib"], strict=True)
    ]
    about = (
        "Training steps of this machine, one thing varied at a time from the reference shape; both axes logarithmic."
    )
    return plots.report_page("Growth", about, figures, plots.html_table(header, rows))
