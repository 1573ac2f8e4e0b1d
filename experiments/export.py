"""A checkpoint to an MLflow model, and a model to the registry. Knows neither Optuna nor training."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.time import get_current_time_millis

import lm
from lm import service
from lm.errors import UserError
from lm.service import Service

REGISTERED = "lm"
CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_AUDIT, _PASSED = "lm.audit", "passed"
SERVE_PORT = 5001
_EPOCH = "lm.epoch"
_REQUIRED = ("mlflow", "torch", "tokenizers", "safetensors", "numpy", "tqdm")


@dataclass(frozen=True)
class Champion:
    """What became of the alias: the version it names, and why."""

    version: str
    moved: bool
    reason: str


def log_model(
    client: mlflow.MlflowClient,
    run_id: str,
    checkpoint: Path,
    metrics: Mapping[str, float],
    epoch: int,
    dataset: tuple[str, str],
    example: str = "what is",
) -> str:
    """Log a checkpoint as a LoggedModel that serves text, with the metrics of its epoch linked to it.

    Args:
        client: of the store that the run is in.
        run_id: the run that trained it.
        checkpoint: folder of the best checkpoint.
        metrics: figures of the checkpoint, logged at step `epoch` with the model.
        epoch: the epoch that it was taken at.
        dataset: name and digest of the corpus.
        example: a seed text of known words, which MLflow shows and tries.

    Returns:
        the model's id; that of the model which stands there already, if a process died between logging and saying so.
    """
    made = _made_before(client, run_id, epoch) or _log(run_id, checkpoint, epoch, example)
    known = {metric.key for metric in client.get_logged_model(made).metrics or []}
    now = get_current_time_millis()  # fixed here: a call that is made again must not be another point
    for key, value in metrics.items():
        if key not in known:
            client.log_metric(
                run_id,
                key,
                value,
                timestamp=now,
                step=epoch,
                model_id=made,
                dataset_name=dataset[0],
                dataset_digest=dataset[1][:32],
            )
    return made


def _made_before(client: mlflow.MlflowClient, run_id: str, epoch: int) -> str | None:
    """The run's model of an epoch; what a process left half made is removed."""
    experiment = client.get_run(run_id).info.experiment_id
    found: str | None = None
    for model in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)
        elif model.tags.get(_EPOCH) == str(epoch):
            found = model.model_id
    return found


def _log(run_id: str, checkpoint: Path, epoch: int, example: str) -> str:
    here = Path(__file__).parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own defaults; the signature is tested
        info = Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            name="model",
            run_id=run_id,
            step=epoch,
            tags={_EPOCH: str(epoch)},
            python_model=str(here / "serving_model.py"),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(Path(lm.__file__).parent)],
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _REQUIRED],
            input_example=(
                [example],
                service.PARAMS,
            ),
        )
    return str(info.model_id)


def register_champion(
    client: mlflow.MlflowClient, run_id: str, model_id: str, perplexity: float, tokens_digest: str
) -> Champion:
    """Register a model as a version of `lm` and give it the alias `champion`.

    The alias stays where it is if its model has a better validation perplexity on the same tokens. On other tokens,
    of another text or another vocabulary, perplexities cannot be compared: then the newer study's model has it.
    """
    audit = client.get_run(run_id).data.tags.get(_AUDIT, "none")
    if audit != _PASSED:
        return Champion("none", False, f"its audit must have passed: {audit[:100]}")
    try:
        client.create_registered_model(REGISTERED)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    current = _holder(client, CHAMPION)
    made = next(iter(client.search_model_versions(f"name = '{REGISTERED}' and run_id = '{run_id}'")), None)
    if made is None:
        tags = {"validation_perplexity": f"{perplexity:.4f}", "tokens_digest": tokens_digest}
        made = client.create_model_version(REGISTERED, f"models:/{model_id}", run_id, tags=tags, model_id=model_id)
    if current is not None:
        if str(current.version) == str(made.version):
            return Champion(str(current.version), False, "it is the champion already")
        standing = float(current.tags["validation_perplexity"])
        if current.tags["tokens_digest"] == tokens_digest and standing <= perplexity:
            reason = f"{standing:.2f} against {perplexity:.2f} of version {made.version} on the same tokens"
            client.set_registered_model_alias(REGISTERED, CHALLENGER, str(made.version))
            return Champion(str(current.version), False, reason)
    promote(client, str(made.version))
    return Champion(str(made.version), True, f"validation perplexity {perplexity:.2f}")


def promote(client: mlflow.MlflowClient, version: str) -> None:
    """Make a version the champion; the one that was is the challenger, and can be rolled back to.

    Raises:
        UserError: no such version, or one whose run was found to leak.
    """
    try:
        promoted = client.get_model_version(REGISTERED, version)
    except MlflowException as e:
        if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(f"a version must be in the registry: got {version}. Try one that the MLflow UI shows.") from e
    audit = client.get_run(promoted.run_id).data.tags.get(_AUDIT, "none") if promoted.run_id else "none"
    if audit != _PASSED:
        raise UserError(f"a champion must have passed its audit: got {audit[:100]}. Try another version.")
    before = _holder(client, CHAMPION)
    client.set_registered_model_alias(REGISTERED, CHAMPION, version)
    if before is not None and str(before.version) != version:
        for alias in (PREVIOUS, CHALLENGER):
            client.set_registered_model_alias(REGISTERED, alias, str(before.version))


def roll_back(client: mlflow.MlflowClient) -> str:
    """Make the champion before this one champion again; returns its version.

    Raises:
        UserError: there was none.
    """
    previous, current = _holder(client, PREVIOUS), _holder(client, CHAMPION)
    if previous is None or (current is not None and previous.version == current.version):
        raise UserError("to roll back there must have been another champion: got none. Try --promote VERSION.")
    promote(client, str(previous.version))
    return str(previous.version)


def _holder(client: mlflow.MlflowClient, alias: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(REGISTERED, alias)
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model, or no such alias
            return None
        raise


def load_service(model_uri: str) -> Service:
    """The service within a registered model, in this process.

    Raises:
        UserError: no such model, or one that this project did not make.
    """
    try:
        served = mlflow.pyfunc.load_model(model_uri).unwrap_python_model()
    except MlflowException as e:
        if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        first = str(e).splitlines()[0][:200]
        raise UserError(f"the model must be in the registry: got {model_uri} ({first}). Try tune.py first.") from e
    if not hasattr(served, "service"):
        raise UserError(f"the model must be one of this project's present form: got {model_uri}. Try to train it anew.")
    return served.service


def serve_command(tracking_uri: str) -> str:
    """The command that serves the champion, to be pasted into a shell."""
    mlflow_program = Path(sys.executable).parent / "mlflow"
    place = f"MLFLOW_TRACKING_URI={shlex.quote(tracking_uri)}"
    if urlsplit(tracking_uri).password:
        place = "MLFLOW_TRACKING_URI=$MLFLOW_TRACKING_URI"  # a password does not belong on the terminal
    program = str(mlflow_program) if mlflow_program.exists() else "mlflow"
    return (
        f"{place} {shlex.quote(program)} models serve "
        f"-m models:/{REGISTERED}@{CHAMPION} -p {SERVE_PORT} --env-manager local"
    )
