"""Optuna: the storage, the study, its trials and its figures. Knows neither MLflow nor training.

The total of a study counts trials that are complete, pruned, running, or failed for good; a trial whose process died
or was interrupted is queued again with the same parameters, and counts when it is taken up.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from experiments.plots import add_level
from experiments.process import is_gone, own_name
from lm.errors import UserError

if TYPE_CHECKING:
    import plotly.graph_objects as go

RUN_ID = "mlflow_run_id"
_OWNER = "owner"
_FAILED_FOR_GOOD = "failed_for_good"
_REQUEUED = "requeued"
_STARTUP_TRIALS = 4
_FIRST_PRUNED_EPOCH = 2


def open_storage(uri: str) -> optuna.storages.RDBStorage:
    """Open Optuna's storage and create its schema; the caller holds the store's lock.

    Raises:
        UserError: it cannot be reached or written.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.storages.RDBStorage(uri)
    except Exception as e:  # SQLAlchemy's and the drivers' errors have no common base
        first = str(e).splitlines()[0][:200]
        raise UserError(
            f"Optuna's storage must be reachable and writable: got {first}. Try another OPTUNA_STORAGE."
        ) from e


def open_study(storage: optuna.storages.RDBStorage, name: str, first_point: Mapping[str, Any]) -> optuna.Study:
    """Create the study, with the recipe's own point as trial 0, or go on with it."""
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="minimize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=_FIRST_PRUNED_EPOCH),
    )
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(dict(first_point))
    return study


def count(study: optuna.Study) -> int:
    """Trials that count towards the total, the queued ones not among them."""
    return sum(
        t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        or (t.state == TrialState.FAIL and _FAILED_FOR_GOOD in t.user_attrs)
        for t in study.get_trials(deepcopy=False)
    )


def ask(study: optuna.Study, total: int, seed: int) -> Trial | None:
    """The next trial, marked as this process's; None if the study has its total. The caller holds the store's lock.

    What a trial draws follows from the seed, its number and the trials before it: neither two processes nor a
    study that is continued draw the same point twice.
    """
    if count(study) >= total:
        return None
    n_trials = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=(seed + n_trials) % 2**32, n_startup_trials=_STARTUP_TRIALS)
    trial = study.ask()
    trial.set_user_attr(_OWNER, own_name())
    return trial


def release_dead(study: optuna.Study) -> None:
    """Fail and queue again the running trials whose process on this host is gone. The caller holds the store's lock."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.user_attrs.get(_OWNER)
        if owner is None or is_gone(owner):  # without an owner it died in `ask`, which this host's lock keeps us out of
            requeue(study, trial)


def requeue(study: optuna.Study, trial: Trial | FrozenTrial) -> None:
    """Tell a trial as failed and queue its parameters again, also those it was queued with and had not yet drawn."""
    trials = study.get_trials(deepcopy=False)
    frozen = trials[trial.number]
    queued: dict[str, Any] = frozen.system_attrs.get("fixed_params", {})
    params = {**queued, **frozen.params}
    # First queued, then told: a process that dies in between leaves the trial to be released again, not lost.
    if params and not any(t.user_attrs.get(_REQUEUED) == trial.number for t in trials):
        study.enqueue_trial(params, user_attrs={_REQUEUED: trial.number})
    study.tell(trial.number, state=TrialState.FAIL)


def tell_pruned(study: optuna.Study, trial: Trial) -> None:
    """Tell a trial as pruned; its reported epochs stay."""
    study.tell(trial, state=TrialState.PRUNED)


def tell_failed(study: optuna.Study, trial: Trial) -> None:
    """Tell a trial as failed for good: its own parameters are the cause, and it counts."""
    trial.set_user_attr(_FAILED_FOR_GOOD, True)
    study.tell(trial, state=TrialState.FAIL)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Complete and pruned trials, best first; a pruned one stands with its best epoch."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return sorted(study.get_trials(deepcopy=False, states=states), key=best_value)


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that ran to their end, best first."""
    return [trial for trial in finished(study) if trial.state == TrialState.COMPLETE]


def origin(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial of the recipe's own point: trial 0, or the one that took it up after an interruption."""
    trials = study.get_trials(deepcopy=False)
    number, found = 0, trials[0] if trials else None
    for trial in trials[1:]:
        if trial.user_attrs.get(_REQUEUED) == number:
            number, found = trial.number, trial
    return found if found is not None and found.intermediate_values else None


def failed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that failed for good."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [t for t in trials if _FAILED_FOR_GOOD in t.user_attrs]


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
        raise UserError("a report needs a study: got an empty storage. Try python experiments/tune.py first.")
    if name is not None and name not in known:
        raise UserError(f"a study must be named as it is stored: got {name!r}. Try {known[-1]}.")
    return optuna.load_study(study_name=name or known[-1], storage=storage)


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each parameter decides whether a trial is among the best (PED-ANOVA, Watanabe et al. 2023).

    Empty where there are too few trials to tell: Optuna warns then and calls all parameters equal.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError, UserWarning):
            return {}


def figures(study: optuna.Study, baseline: float | None) -> list[tuple[str, str, go.Figure]]:
    """Heading, a line on how to read it, and the figure, for the study's page.

    `baseline` is drawn as a line: the perplexity of the n-gram model on the same tokens.
    """
    import plotly.graph_objects as go
    from optuna import visualization

    params = space_of(study)
    history = visualization.plot_optimization_history(study, target_name="validation perplexity")
    epochs = visualization.plot_intermediate_values(study)
    epochs.update_layout(xaxis_title="epoch", yaxis_title="validation perplexity")
    parallel = visualization.plot_parallel_coordinate(study, params=params, target_name="perplexity")
    slices = visualization.plot_slice(study, params=params, target_name="perplexity")
    for figure in (history, epochs, slices):
        figure.update_yaxes(type="log")  # a trial that did not learn would flatten the others
    if baseline is not None:
        trials = study.get_trials(deepcopy=False)
        last_epoch = max((epoch for t in trials for epoch in t.intermediate_values), default=1)
        for figure, ends in ((history, (0, len(trials) - 1)), (epochs, (1, last_epoch))):
            add_level(figure, baseline, f"n-gram baseline {baseline:.1f}", ends)
    made: list[tuple[str, str, go.Figure]] = [
        ("History", "Each point is a trial that ran to its end; the line is the best so far.", history),
        ("Epoch by epoch", "Validation perplexity of each trial as it learned; pruned trials stop early.", epochs),
    ]
    if shares := importances(study):
        bars = go.Figure(go.Bar(x=list(shares.values()), y=list(shares), orientation="h"))
        how = "How much each parameter decides whether a trial is among the best (PED-ANOVA); rough for few trials."
        made.append(("Importances", how, bars))
    made += [
        ("Parallel coordinates", "A line is a trial; drag along an axis to keep only some.", parallel),
        ("Slices", "Perplexity against one parameter at a time; darker points came later.", slices),
    ]
    return made
