"""The figures of a study's page."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import quantiles
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from experiments.plots import add_level
from experiments.study import SHIFTS, space_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

_RESAMPLES = 40
_COLOURS = {
    "complete": "#2e7d5b", "pruned": "#d9a23b", "running": "#4a7ab5", "waiting": "#8a8f98", "handed on": "#8a8f98",
}  # fmt: skip


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


def importance_ranges(study: optuna.Study) -> dict[str, tuple[float, float]]:
    """Between which values nine of ten importances lie when the trials are drawn again with replacement (bootstrap)."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    draw, drawn = random.Random(0), dict[str, list[float]]()
    for _ in range(_RESAMPLES):
        again = optuna.create_study(direction="minimize")
        again.add_trials(draw.choices(trials, k=len(trials)))
        for name, value in importances(again).items():
            drawn.setdefault(name, []).append(value)
    ends = {name: quantiles(values, n=20) for name, values in drawn.items() if len(values) > 1}
    return {name: (cuts[0], cuts[-1]) for name, cuts in ends.items()}


def _importance_figure(study: optuna.Study, shares: dict[str, float]) -> go.Figure:
    import plotly.graph_objects as go

    ranges = importance_ranges(study)
    low, high = ([abs(ranges.get(n, (v, v))[end] - v) for n, v in shares.items()] for end in (0, 1))
    error = {"type": "data", "symmetric": False, "array": high, "arrayminus": low}
    return go.Figure(go.Bar(x=list(shares.values()), y=list(shares), orientation="h", error_x=error))


def _timeline(study: optuna.Study) -> go.Figure:
    """Who worked on which trial when; a trial that changed hands has several bars."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for trial in study.get_trials(deepcopy=False):
        shifts: Sequence[tuple[str, float, float, int, int, str]] = trial.user_attrs.get(SHIFTS, [])
        for i, (worker, began, seen, first, last, ended) in enumerate(shifts):
            outcome = ended or (trial.state.name.lower() if i + 1 == len(shifts) else "handed on")
            figure.add_bar(
                y=[worker],
                x=[1000 * (seen - began)],
                base=[datetime.fromtimestamp(began, UTC)],
                orientation="h",
                marker_color=_COLOURS.get(outcome, "#b2452e"),
                marker_line={"color": "white", "width": 1},
                text=str(trial.number),
                hovertext=f"trial {trial.number}, epochs {first + 1} to {last}: {outcome}",
                hoverinfo="text",
                showlegend=False,
            )
    figure.update_layout(barmode="overlay", xaxis={"type": "date", "title": "UTC"})
    return figure


def figures(study: optuna.Study, baseline: float | None) -> list[tuple[str, str, go.Figure]]:
    """Heading, a line on how to read it, and the figure, for the study's page.

    `baseline` is drawn as a line: the perplexity of the n-gram model on the same tokens.
    """
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
        how = (
            "How much each parameter decides whether a trial is among the best (PED-ANOVA). The lines span nine of ten "
            "values when the trials are drawn again at random: where they are long, more trials are needed to tell."
        )
        made.append(("Importances", how, _importance_figure(study, shares)))
    made += [
        ("Parallel coordinates", "A line is a trial; drag along an axis to keep only some.", parallel),
        ("Slices", "Perplexity against one parameter at a time; darker points came later.", slices),
        (
            "Timeline",
            "Who worked on which trial when, up to its last epoch: complete green, pruned amber, failed or died red.",
            _timeline(study),
        ),
    ]
    return made
