"""Optuna: the storage, the study and how its trials rank. Knows neither MLflow nor training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from experiments.steady import POSTGRES, STUDY, is_crowded, keep_trying, refusal
from lm.errors import UserError, masked

RUN_ID = "mlflow_run_id"
OWNER = "owner"
REASON = "reason"
TOTAL = "total"
UNTIL = "until"
SHIFTS = "shifts"
"""Who worked on a trial: [worker, began, last seen, epochs before, epochs after, how it ended if it died], each."""
_GRACE = 6
_STARTUP_TRIALS = 4
_FIRST_PRUNED_EPOCH = 2
_NO_STUDY = "a report needs a study: got an empty storage. Try python experiments/tune.py first."


def open_storage(uri: str, heartbeat_seconds: int = 10, create: bool = True) -> optuna.storages.RDBStorage:
    """Open Optuna's storage and create its schema, for which the caller holds the store's lock.

    Without `create` nothing is written, and no lock is needed.

    Raises:
        UserError: it cannot be reached or written, is neither SQLite nor PostgreSQL, or is empty and stays so.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kind = uri.split(":")[0].split("+")[0]
    if kind not in ("sqlite", "postgresql"):
        raise UserError(
            f"OPTUNA_STORAGE must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE: got {kind}. "
            "Try one of them."
        )
    if not create and kind == "sqlite" and not Path(uri.partition(":///")[2]).is_file():
        raise UserError(_NO_STUDY)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if kind == "sqlite":
        options["connect_args"] = {"timeout": 60}
    else:  # one idle connection a worker: PostgreSQL gives a hundred, by default, to all of them
        options |= {"connect_args": POSTGRES, "pool_size": 1, "max_overflow": 4}

    def opened() -> optuna.storages.RDBStorage:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
            return optuna.storages.RDBStorage(
                uri,
                engine_kwargs=options,
                heartbeat_interval=heartbeat_seconds,
                grace_period=_GRACE * heartbeat_seconds,
                skip_table_creation=not create,
            )

    try:
        return keep_trying(opened, is_crowded, STUDY)
    except ModuleNotFoundError as e:
        raise UserError(f"PostgreSQL needs its driver: got {e}. Try pip install 'small-lm-lab[postgres]'.") from e
    except Exception as e:  # SQLAlchemy's and the drivers' errors have no common base
        if refused := refusal(e, STUDY):
            raise refused from e
        if not create and re.search(r"no such table|UndefinedTable", f"{e} {e.__cause__}"):
            raise UserError(_NO_STUDY) from e
        first = masked(str(e.__cause__ or e).splitlines()[0][:200])  # Optuna's own words say little
        raise UserError(
            f"Optuna's storage must be reachable and writable: got {first}. Try another OPTUNA_STORAGE."
        ) from e


def open_study(
    storage: optuna.storages.RDBStorage,
    name: str,
    first_point: Mapping[str, Any],
    total: int,
    until: float | None = None,
) -> None:
    """Create the study, with the recipe's own point as trial 0, if it is not there; the caller holds the store's lock.

    `total` is how many trials it is to have, `until` the perplexity that ends it; both are kept for whoever asks how
    it stands.
    """
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(dict(first_point))
    study.set_user_attr(TOTAL, max(total, study.user_attrs.get(TOTAL, 0)))
    study.set_user_attr(UNTIL, until)


def run_id(trial: FrozenTrial) -> str:
    """The MLflow run that a trial is.

    Raises:
        UserError: it has none, since another program made the study.
    """
    if RUN_ID not in trial.user_attrs:
        raise UserError(
            f"a study's trials must be runs in MLflow: got trial {trial.number} without one, of another program. "
            "Try --study another."
        )
    return str(trial.user_attrs[RUN_ID])


@dataclass(frozen=True)
class Plans:
    """How points are drawn and when trials stop early; both may differ from worker to worker."""

    sampler: str = "tpe"
    pruner: str = "median"

    def new_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """A sampler whose draws follow from the seed and the trials before."""
        seed %= 2**32
        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)

    def new_pruner(self) -> optuna.pruners.BasePruner:
        """The rule that stops trials."""
        if self.pruner == "none":
            return optuna.pruners.NopPruner()
        if self.pruner == "halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=_FIRST_PRUNED_EPOCH, reduction_factor=2)
        return optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=_FIRST_PRUNED_EPOCH)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Complete and pruned trials, best first; a pruned one stands with its best epoch."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return sorted(study.get_trials(deepcopy=False, states=states), key=best_value)


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ran to their end, best first."""
    return [trial for trial in finished(study) if trial.state == TrialState.COMPLETE]


def origin(study: optuna.Study) -> FrozenTrial | None:
    """Trial 0, the recipe's own point, once it has finished an epoch."""
    first = study.get_trials(deepcopy=False)[:1]
    return first[0] if first and first[0].intermediate_values else None


def failed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that failed."""
    return study.get_trials(deepcopy=False, states=(TrialState.FAIL,))


def best_value(trial: FrozenTrial) -> float:
    """Lowest perplexity that a trial reported."""
    return min(trial.intermediate_values.values(), default=float("inf"))


def space_of(study: optuna.Study) -> list[str]:
    """Names of the parameters that were searched."""
    return sorted({name for t in study.get_trials(deepcopy=False) for name in t.params})


def latest_study(storage: optuna.storages.RDBStorage, name: str | None) -> optuna.Study:
    """A study by name, or the one that was last begun.

    Raises:
        UserError: there is none.
    """
    summaries = optuna.get_all_study_summaries(storage)
    known = [s.study_name for s in sorted(summaries, key=lambda s: str(s.datetime_start or ""))]
    if not known:
        raise UserError(_NO_STUDY)
    if name is not None and name not in known:
        raise UserError(f"a study must be named as it is stored: got {name!r}. Try {known[-1]}.")
    return optuna.load_study(study_name=name or known[-1], storage=storage)
