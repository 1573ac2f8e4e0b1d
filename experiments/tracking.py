"""MLflow: the store, runs with their true status, metrics, artifacts. Knows neither Optuna nor training.

A run is FINISHED only when its `with` block ends by itself; pruned and interrupted runs are KILLED, broken ones
FAILED, each with its reason as the tag `lm.reason`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import quote, urlsplit
from uuid import uuid4

import mlflow
import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.time import get_current_time_millis
from urllib3.connection import HTTPConnection

from experiments.locks import connect, local_path, store_lock
from experiments.process import TakenOverError, is_alive_here, is_gone, own_name
from experiments.settings import ROOT, Settings
from experiments.steady import RUNS, keep_trying, refusal, single, steadied
from lm.errors import UserError, masked

if TYPE_CHECKING:
    from lm.corpus import Corpus
    from lm.train import EpochReport

T = TypeVar("T")

UI_PORT = 5000
LEAK = "lm.leak"
JOB = "lm.job"
_OWNER = "lm.process"
_WEIGHTS = "lm.weights"
_METRICS_A_BATCH = 900
_PATIENT_BEATS = 3
"""Fewer than the heartbeats after whose silence a host is given up."""
ATTENTION_MEASURES = (
    "change", "entropy", "entropy_share", "distance", "self", "previous", "first", "agreement", "previous_token",
    "duplicate_token", "induction",
)  # fmt: skip
"""What `lm.attention` measures; the charts of each stand in a group of their own."""

_VIEW, _VIEW_TAG = "lm", "mlflow.sharedViewState.lm"
_FIRST_CHARTS = ("validation_perplexity", "validation_clean_perplexity", "train_perplexity", "test_perplexity")
_PACKAGES = ("torch", "mlflow", "optuna", "datasets", "plotly", "tokenizers", "safetensors", "numpy")


class StoppedError(Exception):
    """Raised where a run is to stop early; it ends KILLED with this reason."""


class PrunedError(StoppedError):
    """The trial is found not worth going on with."""


def quiet() -> None:
    """Keep MLflow's and alembic's news off the terminal; warnings stay."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a trace for each call to a store away
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # calls are made again here, where it is known how
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _forget_what_is_late(seconds: float) -> None:
    """Have the system drop a request that the server's host has not acknowledged for so long.

    Else one that is under way when a host is cut off would arrive when it is back, after the host was given up.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None:  # not on this system
        return
    options = cast(list[Any], HTTPConnection.default_socket_options)  # in place: the very list that is their default
    options[:] = [o for o in options if o[:2] != (socket.IPPROTO_TCP, option)]
    options.append((socket.IPPROTO_TCP, option, int(1000 * seconds)))


class Tracker:
    """One experiment of one store."""

    def __init__(self, settings: Settings) -> None:
        """Open the store; create its schema and the experiment if they are not there.

        Creation happens under the store's lock: processes that create a schema at the same time break it.

        Raises:
            UserError: the store cannot be reached or written.
        """
        quiet()
        _forget_what_is_late(_PATIENT_BEATS * settings.heartbeat_seconds)
        self.settings = settings
        if settings.username and settings.password:  # MLflow reads them from there alone
            os.environ["MLFLOW_TRACKING_USERNAME"] = settings.username
            os.environ["MLFLOW_TRACKING_PASSWORD"] = settings.password
        with store_lock(settings):
            if settings.tracking_uri.startswith("postgresql"):  # MLflow tries a wrong password for minutes
                connect(settings.tracking_uri, "MLFLOW_TRACKING_URI").close()
            try:
                mlflow.set_tracking_uri(settings.tracking_uri)
                mlflow.set_registry_uri(settings.tracking_uri)
                self._plain = mlflow.MlflowClient(settings.tracking_uri, settings.tracking_uri)
                self.client = self._plain
                self.experiment_id = self._experiment()
            except UserError:
                raise
            except Exception as e:  # MLflow's, SQLAlchemy's and the drivers' errors have no common base
                if refused := refusal(e, RUNS):
                    raise refused from e
                got = masked(f"{str(e).splitlines()[0][:200]} from {settings.tracking_uri}")
                raise UserError(
                    f"the store must be reachable and writable: got {got}. Try another MLFLOW_TRACKING_URI."
                ) from e
        view = _charts_view()
        if self.client.get_experiment(self.experiment_id).tags.get(_VIEW_TAG) != view:
            self.client.set_experiment_tag(self.experiment_id, _VIEW_TAG, view)
        mlflow.set_experiment(experiment_id=self.experiment_id)  # LoggedModels go to the active one
        self.client = steadied(self._plain, is_passing, RUNS)
        self._close_dead_runs()

    def _close_dead_runs(self) -> None:
        """Close RUNNING runs whose process on this host has ended: a killed process cannot do it itself."""
        for run in self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'"):
            if is_gone(run.data.tags.get(_OWNER, "")):
                self.close(run.info.run_id, "KILLED", "its process died")

    def _experiment(self) -> str:
        name = self.settings.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise UserError(
                    f"the experiment must not be deleted: got {name!r}. Try MLFLOW_EXPERIMENT_NAME=another."
                )
            return found.experiment_id
        remote = self.settings.tracking_uri.startswith("http")
        try:
            return self.client.create_experiment(name, None if remote else self.settings.artifact_root)
        except MlflowException as e:
            made = self.client.get_experiment_by_name(name)
            if e.error_code != "RESOURCE_ALREADY_EXISTS" or made is None:
                raise
            return made.experiment_id  # by another host, whose studies have another lock

    @contextmanager
    def run(self, name: str, tags: Mapping[str, str], run_id: str | None = None) -> Generator[TrackedRun]:
        """Open a run, or go on with `run_id`, and close it with its true status.

        A process that died here left the status to `close_if_left`, or to the next program's start.
        """
        if run_id is None:
            all_tags = {**_origin_tags(), **tags, _OWNER: own_name()}
            run_id = self._create_run(name, all_tags)
        else:
            self.client.set_tag(run_id, _OWNER, own_name())
            self.client.update_run(run_id, status="RUNNING")
        run = self.open_run(run_id)
        try:
            yield run
        except TakenOverError:
            raise
        except StoppedError as e:
            self.close(run_id, "KILLED", str(e))
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            self.close(run_id, "KILLED", "interrupted")
            raise
        except BaseException as e:
            run.require_owner()  # what another process did to a run that it took over is no failure of the run
            self.close(run_id, "FAILED", f"{type(e).__name__}: {e}")
            raise
        self.close(run_id, "FINISHED", "")

    def _create_run(self, name: str, tags: Mapping[str, str]) -> str:
        """Create a run, once, also where the store's first answer is lost."""
        key = uuid4().hex

        def found() -> list[str]:
            query = f"tags.`lm.key` = '{key}'"
            return [run.info.run_id for run in self._plain.search_runs([self.experiment_id], query)]

        def create() -> str:
            nonlocal tried
            known, tried = found() if tried else [], True
            if known:
                return known[0]
            return self._plain.create_run(self.experiment_id, tags={**tags, "lm.key": key}, run_name=name).info.run_id

        tried = False
        return keep_trying(create, is_passing, RUNS)

    def run_of_job(self, job: str) -> MlflowRun | None:
        """The newest run of a `torchrun` job, with which its processes go on when they are started again."""
        query = f"tags.`{JOB}` = '{job}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return found[0] if found else None

    def run_of_trial(self, study: str, trial: int) -> str | None:
        """The id of a trial's run, also where its process died before the study knew it; None if there is none."""
        query = f"tags.`lm.study` = '{study}' and tags.`lm.kind` = 'trial' and tags.`lm.trial` = '{trial}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return found[0].info.run_id if found else None

    def remove_weights(self, run: MlflowRun, why: str) -> None:
        """Remove checkpoints and models of an ended run, unless a version in the registry is made of them."""
        run_id = run.info.run_id
        if _WEIGHTS in run.data.tags or self.client.search_model_versions(f"run_id = '{run_id}'"):
            return
        keep_trying(lambda: self._remove_weights(run), is_passing, RUNS)
        shutil.rmtree(self.open_run(run_id).checkpoints, ignore_errors=True)
        self.client.set_tag(run_id, _WEIGHTS, f"removed: {why}")

    def _remove_weights(self, run: MlflowRun) -> None:
        """The same, once, which another host may do at the same time, or this one have done without an answer."""
        query = f"source_run_id = '{run.info.run_id}'"

        def standing() -> dict[str, str]:
            models = self._plain.search_logged_models([self.experiment_id], filter_string=query)
            return {model.model_id: model.artifact_location for model in models}

        for model_id, place in standing().items():
            _delete(place.removesuffix("/artifacts"))
            try:
                self._plain.delete_logged_model(model_id)
            except MlflowException:
                if model_id in standing():
                    raise
        _delete(f"{run.info.artifact_uri}/checkpoints")

    def close_if_left(self, run_id: str, owner: str, status: str, reason: str) -> None:
        """Close a run that a process left open when it died, unless another has taken it over."""
        run = self.client.get_run(run_id)
        if run.info.status == "RUNNING" and run.data.tags.get(_OWNER, "") == owner:
            self.close(run_id, status, reason)

    def close(self, run_id: str, status: str, reason: str) -> None:
        """Set a run's final status and its reason."""
        if reason or "lm.reason" in self.client.get_run(run_id).data.tags:
            self.client.set_tag(run_id, "lm.reason", reason[:5000])
        self.client.set_terminated(run_id, status)

    def tags(self, run_id: str) -> dict[str, str]:
        """Tags of a run.

        Raises:
            UserError: it is not in this store.
        """
        try:
            return dict(self.client.get_run(run_id).data.tags)
        except MlflowException as e:
            raise UserError(
                f"a study's runs must be in the MLflow store: got no run {run_id} in {self.settings.experiment!r}. "
                "Try the store that the study was made with, or --study another."
            ) from e

    def find_run(self, name_or_id: str) -> MlflowRun:
        """A run of this experiment by its id, or the newest by its name.

        Raises:
            UserError: there is none.
        """
        if re.fullmatch(r"[0-9a-f]{32}", name_or_id):
            with contextlib.suppress(MlflowException):
                found = self.client.get_run(name_or_id)
                if (found.info.lifecycle_stage, found.info.experiment_id) == ("active", self.experiment_id):
                    return found
        newest = self.client.search_runs([self.experiment_id], max_results=1000)
        for run in newest:
            if name_or_id == run.info.run_name:
                return run
        remedy = f"{newest[0].info.run_name}" if newest else "python experiments/train.py first"
        raise UserError(
            f"a run must be named by its id or name: got {name_or_id!r}, which is not in experiment "
            f"{self.settings.experiment!r}. Try {remedy}."
        )

    def open_run(self, run_id: str) -> TrackedRun:
        """A run that stands in the store, to read it or to add to it; its status stays as it is."""
        run = self.client.get_run(run_id)
        return TrackedRun(self.client, run, self.settings.mlruns / "work", LEAK in run.data.tags)

    def runs_of_group(self, group: str) -> list[MlflowRun]:
        """Runs of one configuration under several seeds, newest first, by the id of the run that sums them up."""
        query = f"tags.`lm.group` = '{group}'"
        return list(self.client.search_runs([self.experiment_id], query, max_results=1000))

    def runs_of_study(self, study: str, kind: str = "trial") -> list[MlflowRun]:
        """Runs tagged with a study's name, newest first; kind is `trial`, or `study` for its summary run."""
        query = f"tags.`lm.study` = '{study}' and tags.`lm.kind` = '{kind}'"
        return list(self.client.search_runs([self.experiment_id], query, max_results=1000))

    def publish(self, run: TrackedRun, page: str) -> tuple[Path, str]:
        """Keep a page as `reports/RUN.html` beside the stores and as the run's `report.html`; its file and address."""
        path = self.settings.mlruns / "reports" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', run.name)}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        run.log_page("report.html", page)
        return path, self.run_link(self.ui_address(), run.id, "report.html")

    def ui_address(self, port: int = UI_PORT) -> str:
        """Where the UI is: the tracking server, or the one that `ui.py` opens on this machine."""
        parts = urlsplit(self.settings.tracking_uri)
        if not parts.scheme.startswith("http"):
            return f"http://127.0.0.1:{port}"
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    def studies(self, most: int = 3) -> list[tuple[str, list[str], str | None]]:
        """The newest studies: name, run ids of the trials, id of the summary run."""
        query = "tags.`lm.kind` = 'trial'"
        runs = self.client.search_runs([self.experiment_id], query, max_results=1000)
        grouped: dict[str, list[str]] = {}
        for run in runs:
            grouped.setdefault(run.data.tags["lm.study"], []).append(run.info.run_id)
        found: list[tuple[str, list[str], str | None]] = []
        for study, run_ids in list(grouped.items())[:most]:
            summaries = self.runs_of_study(study, "study")
            found.append((study, run_ids, summaries[0].info.run_id if summaries else None))
        return found

    def charts_link(self, base: str) -> str:
        """Address of the charts page that compares the experiment's runs."""
        query = f"workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={_VIEW}"
        return f"{base}/#/experiments/{self.experiment_id}/runs?{query}"

    def compare_link(self, base: str, run_ids: Sequence[str]) -> str:
        """Address of the page that compares some runs, parallel coordinates first."""
        runs = quote(json.dumps(list(run_ids), separators=(",", ":")))
        experiments = quote(json.dumps([self.experiment_id]))
        return f"{base}/#/compare-runs?runs={runs}&experiments={experiments}"

    def run_link(self, base: str, run_id: str, artifact: str = "") -> str:
        """Address of a run's page, or of one of its artifacts."""
        tail = f"/artifacts/{artifact}" if artifact else ""
        return f"{base}/#/experiments/{self.experiment_id}/runs/{run_id}{tail}"


@dataclass
class TrackedRun:
    """One open run: where figures, pages and checkpoints of a training go."""

    client: mlflow.MlflowClient
    mlflow_run: MlflowRun
    work: Path
    leaks: bool = False

    def mark_leaking(self, findings: Sequence[str]) -> None:
        """From here on each metric's name says that the model was measured on what it had seen."""
        self.leaks = True
        self.log_tags({LEAK: "; ".join(findings)})

    def metric_name(self, name: str) -> str:
        """The name under which a metric of this run is logged."""
        return f"leaking_{name}" if self.leaks else name

    @property
    def id(self) -> str:
        """MLflow's run id."""
        return self.mlflow_run.info.run_id

    @property
    def name(self) -> str:
        """MLflow's run name."""
        return self.mlflow_run.info.run_name or self.id

    @property
    def checkpoints(self) -> Path:
        """Local folder of `last` and `best`: the run's own artifact folder where that is a local one."""
        return (local_path(self.mlflow_run.info.artifact_uri) or self.work / self.id) / "checkpoints"

    def publish_checkpoint(self, name: str) -> None:
        """Send a checkpoint to the artifact store, where that is not the folder it was written to."""
        if local_path(self.mlflow_run.info.artifact_uri) is None:
            self.client.log_artifacts(self.id, str(self.checkpoints / name), f"checkpoints/{name}")

    def artifacts(self, folder: str) -> list[str]:
        """Names of the files in a folder of this run's artifacts."""
        here = local_path(self.mlflow_run.info.artifact_uri)
        if here is not None:
            return [file.name for file in (here / folder).glob("*") if file.is_file()]
        listed = self.client.list_artifacts(self.id, "" if folder == "." else folder)
        return [Path(file.path).name for file in listed if not file.is_dir]

    def fetch_artifact(self, path: str) -> Path | None:
        """Local file of an artifact of this run, downloaded if it is not here; None where the run has none."""
        here = local_path(self.mlflow_run.info.artifact_uri)
        if here is not None:
            return here / path if (here / path).is_file() else None
        if Path(path).name not in self.artifacts(str(Path(path).parent)):
            return None
        folder = self.work / self.id
        folder.mkdir(parents=True, exist_ok=True)
        return Path(self.client.download_artifacts(self.id, path, str(folder)))

    def fetch_checkpoint(self, name: str, again: bool = False) -> Path:
        """Local folder of a checkpoint of this run, downloaded if it is not here, or `again`."""
        folder = self.checkpoints / name
        if local_path(self.mlflow_run.info.artifact_uri) is None and (again or not folder.exists()):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:  # half of one must not pass for a whole
                came = self.client.download_artifacts(
                    self.id, f"checkpoints/{name}", fresh
                )  # where is the store's choice
                shutil.rmtree(folder, ignore_errors=True)
                Path(came).rename(folder)
        return folder

    def tags(self) -> dict[str, str]:
        """The run's tags as they stand now."""
        return dict(self.client.get_run(self.id).data.tags)

    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return dict(self.client.get_run(self.id).data.metrics)

    def params(self) -> dict[str, str]:
        """The params it was logged with."""
        return dict(self.client.get_run(self.id).data.params)

    def steady(self, call: Callable[[], T]) -> T:
        """Call, and again while the store is away; for calls of several steps that may be begun again."""
        return keep_trying(call, is_passing, RUNS)

    def require_owner(self) -> None:
        """Raise TakenOverError if another process works on the run by now: this one was suspended, and given up."""
        owner = self.tags().get(_OWNER)
        if owner != own_name():
            raise TakenOverError(f"run {self.name} was taken over by {owner}")

    def is_live_here(self) -> bool:
        """Whether the run is open in a process of this host."""
        run = self.client.get_run(self.id)
        return run.info.status == "RUNNING" and is_alive_here(run.data.tags.get(_OWNER, ""))

    def is_live(self) -> bool:
        """Whether the run is open in a process that may be alive."""
        run = self.client.get_run(self.id)
        return run.info.status == "RUNNING" and not is_gone(run.data.tags.get(_OWNER, ""))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log all params at once; equal values may be logged again."""
        self.client.log_batch(self.id, params=[Param(k, str(v)) for k, v in params.items()])

    def log_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags."""
        self.client.log_batch(self.id, tags=[RunTag(k, str(v)) for k, v in tags.items()])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log up to `_METRICS_A_BATCH` metrics at one step: all or none."""
        self.client.log_batch(self.id, metrics=self._points(metrics, step))

    def _points(self, metrics: Mapping[str, float], step: int) -> list[Metric]:
        now = get_current_time_millis()
        return [Metric(self.metric_name(k), v, now, step) for k, v in metrics.items()]

    def log_once(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics at a step, those aside that stand there already: of a process that died after it logged them.

        Each attempt looks again: in an outage another host may take the run over, and log the step.
        """
        names, client = list(metrics), single(self.client)

        def log(points: Sequence[Metric]) -> None:
            if all(point.step != step for point in client.get_metric_history(self.id, points[0].key)):
                client.log_batch(self.id, metrics=points)

        for start in reversed(range(0, len(names), _METRICS_A_BATCH)):  # the first, which count, go last
            points = self._points({name: metrics[name] for name in names[start : start + _METRICS_A_BATCH]}, step)
            self.steady(partial(log, points))

    def history(self, name: str) -> dict[int, float]:
        """A metric's values by step."""
        return {point.step: point.value for point in self.client.get_metric_history(self.id, self.metric_name(name))}

    def log_corpus(self, corpus: Corpus) -> None:
        """Log the text as the run's dataset: name, digest, source and sizes."""
        sizes = {f"{split}_records": len(records) for split, records in corpus.splits.items()}
        dataset = Dataset(
            name=corpus.name,
            digest=corpus.digest[:32],
            source_type="code",
            source=json.dumps({"tags": {"source": corpus.source}}),
            profile=json.dumps(sizes),
        )
        inputs = DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", "train")])
        self.client.log_inputs(self.id, [inputs])
        self.log_tags({"lm.corpus": corpus.name, "lm.corpus_digest": corpus.digest})

    def log_epoch(self, report: EpochReport, validation: Mapping[str, float]) -> None:
        """Log the figures of one epoch at step `epoch`; an epoch that stands there already is not logged twice."""
        self.log_once(
            {
                **validation,
                "train_loss": report.train.nll,
                "train_perplexity": report.train.perplexity,
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "clipped_share": report.clipped_share,
                "tokens_per_second": report.tokens_per_second,
                "epoch_seconds": report.seconds,
            },
            report.epoch,
        )

    def log_page(self, path: str, content: str) -> None:
        """Write a text artifact (a page, a sample, a table)."""
        self.client.log_text(self.id, content, path)

    def log_bytes(self, path: str, content: bytes) -> None:
        """Write a binary artifact."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            file.write_bytes(content)
            self.client.log_artifact(self.id, str(file), str(Path(path).parent))


def _charts_view() -> str:
    """The state of a shared view of the charts page, as the UI stores it in a tag of the experiment.

    By itself the UI puts every group of metrics, open, before those without one: hundreds of charts of single heads
    before the first perplexity. Here the runs' own figures come first, and heads are closed.
    """
    names = ["Model metrics", "attention", *(f"attention_{name}" for name in ATTENTION_MEASURES)]
    sections = [
        {
            "uuid": f"lm-{i}", "name": name, "display": i < 2, "isReordered": i == 0, "deleted": False,
            "isGenerated": True,
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    charts = [
        {
            "uuid": f"lm-{key}", "type": "LINE", "metricSectionId": "lm-0", "metricKey": key, "deleted": False,
            "isGenerated": True, "lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear", "range": {},
            "xAxisKey": "step", "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [],
            "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
        }
        for key in _FIRST_CHARTS
    ]  # fmt: skip
    return json.dumps({"compareRunSections": sections, "compareRunCharts": charts, "isAccordionReordered": True})


def _delete(uri: str) -> None:
    here = local_path(uri)
    if here is not None:
        shutil.rmtree(here, ignore_errors=True)
    else:
        get_artifact_repository(uri).delete_artifacts()


def is_passing(e: Exception) -> bool:
    """Whether an error of the MLflow store is one that time may mend: away, busy, restarting; not a full disk."""
    if refusal(e, RUNS):
        return False
    if isinstance(e, requests.exceptions.HTTPError):
        return e.response is not None and e.response.status_code >= 500
    if isinstance(e, requests.exceptions.ConnectionError | requests.exceptions.Timeout):
        return True
    if not isinstance(e, MlflowException) or any(words in str(e) for words in ("disk is full", "readonly database")):
        return False
    away = r"API request to \S+ failed with (timeout )?exception|failed with error code 5\d\d|too many 5\d\d"
    return e.error_code == "TEMPORARILY_UNAVAILABLE" or re.search(away, str(e)) is not None


def _origin_tags() -> dict[str, str]:
    """Code, packages and machine that a run was made with."""
    tags = {f"version.{name}": version(name) for name in _PACKAGES}
    tags |= {"version.python": platform.python_version(), "lm.host": platform.node()}
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        return tags | {"lm.code_version": f"unknown: {getattr(e, 'stderr', None) or e}"[:200]}
    return tags | {"mlflow.source.git.commit": commit.strip(), "lm.uncommitted_changes": str(bool(changed))}
