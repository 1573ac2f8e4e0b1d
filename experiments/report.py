"""Write a study's Plotly page, and log it to the study's summary run in MLflow.

python experiments/report.py            the study begun last
python experiments/report.py STUDY
"""

from __future__ import annotations

import html
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.search_space import describe, short
from lm.config import PRESETS
from lm.errors import UserError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from experiments.settings import Settings
    from experiments.tracking import TrackedRun, Tracker

_ROWS = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, write the page, say where it is."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("study", nargs="?", help="name of the study (default: the one begun last)")
    parser.add_argument("--promote", metavar="VERSION", help="make a version of the registered model the champion")
    parser.add_argument("--rollback", action="store_true", help="make the champion before this one champion again")
    args = parser.parse(argv)
    if args.promote is not None and args.rollback:
        raise UserError("one version must be chosen: got --promote and --rollback. Try one of them.")

    from experiments import export
    from experiments import study as studies
    from experiments.locks import store_lock
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    settings = Settings.load()
    tracker = Tracker(settings)
    if args.promote is not None or args.rollback:
        version = args.promote if args.promote is not None else export.roll_back(tracker.client)
        if not args.rollback:
            export.promote(tracker.client, version)
        print(f"{export.REGISTERED}@{export.CHAMPION} is version {version}")
        print(f"serve    {export.serve_command(settings.tracking_uri)}")
        return
    with store_lock(settings):
        storage = studies.open_storage(settings.optuna_storage)
    conclude(studies.latest_study(storage, args.study), tracker, register=False)


def conclude(study: optuna.Study, tracker: Tracker, register: bool = True) -> None:
    """Print the trials against trial 0, write and log the page, register the winner, and print the links."""
    from experiments import export
    from experiments import study as studies

    ranked = studies.finished(study)
    header, rows = table(study, ranked)
    recipe = studies.origin(study)
    shown = rows[:_ROWS] + [row for row in rows[_ROWS:] if recipe and row[0] == str(recipe.number)]
    print("\n" + _columns(header, shown))
    if len(rows) > len(shown):
        print(f"... and {len(rows) - len(shown)} more on the page below")
    for trial in studies.failed(study):
        print(f"trial {trial.number} failed: {trial.user_attrs.get(studies.REASON, '')}")
    path, link = write_page(study, tracker, ranked, header, rows)
    complete = studies.complete(study)
    if complete:
        print(f"\n{_measured(tracker.open_run(studies.run_id(complete[0])))}")
    if register and complete:
        tags = tracker.tags(studies.run_id(complete[0]))
        champion = export.register_champion(
            tracker.client,
            studies.run_id(complete[0]),
            tags["lm.model_id"],
            studies.best_value(complete[0]),
            tags["lm.tokens_digest"],
        )
        what = "is now" if champion.moved else "stays"
        print(f"\n{export.REGISTERED}@{export.CHAMPION} {what} version {champion.version}: {champion.reason}")
    base = tracker.ui_address()
    run_ids = [t.user_attrs[studies.RUN_ID] for t in ranked if studies.RUN_ID in t.user_attrs]
    print(f"\nreport   {path}")
    print("browse   python experiments/ui.py, which opens")
    print(f"charts   {tracker.charts_link(base)}")
    print(f"compare  {tracker.compare_link(base, run_ids)}")
    print(f"summary  {link}")
    if complete:
        print(f"again    {train_command(tracker.open_run(studies.run_id(complete[0])))}")
        print(f"serve    {export.serve_command(tracker.settings.tracking_uri)}")


def table(study: optuna.Study, ranked: Sequence[FrozenTrial]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the trials, best first, each against trial 0 (the recipe's own point)."""
    from experiments import study as studies

    params = studies.space_of(study)
    recipe = studies.origin(study)
    origin = studies.best_value(recipe) if recipe else None
    rows: list[list[str]] = []
    for trial in ranked:
        value = studies.best_value(trial)
        change = f"{(value / origin - 1) * 100:+.1f} %" if origin else ""
        values = [short(trial.params[p]) if p in trial.params else "" for p in params]
        epochs = str(max(trial.intermediate_values, default=0))
        rows.append([str(trial.number), *values, epochs, trial.state.name.lower(), f"{value:.2f}", change])
    return ["trial", *params, "epochs", "state", "perplexity", "to trial 0"], rows


def train_command(run: TrackedRun) -> str:
    """The command that trains a run's config again, in one line."""
    from lm.config import Config

    config, preset = Config.from_text(run.params()), run.tags().get("lm.preset", "reference")
    base = Config.from_flat(PRESETS[preset]).flat()
    words = ["python experiments/train.py", *([] if preset == "reference" else [f"--preset {preset}"])]
    for name, value in config.flat().items():
        if value != base[name]:
            flag = name.replace("_", "-")
            yes = "" if value else "no-"
            words.append(f"--{yes}{flag}" if isinstance(value, bool) else f"--{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def status(settings: Settings, name: str | None) -> None:
    """Print how a study stands, and each trial that is not finished; reads its storage alone, and writes nothing."""
    from experiments import study as studies

    storage = studies.open_storage(settings.optuna_storage, settings.heartbeat_seconds, create=False)
    study = studies.latest_study(storage, name)
    trials = study.get_trials(deepcopy=False)
    counts = Counter(t.state.name.lower() for t in trials)
    told = ", ".join(f"{n} {state.replace('fail', 'failed')}" for state, n in counts.items())
    print(f"study {study.study_name}: {told} of {study.user_attrs.get(studies.TOTAL, len(trials))} trials")
    for trial in trials:
        if not trial.state.is_finished():
            epochs = max(trial.intermediate_values, default=0)
            point = describe(trial.params)
            print(f"trial {trial.number}  {trial.state.name.lower()} after epoch {epochs}  {point}{_last_seen(trial)}")
    if ranked := studies.finished(study):
        best = ranked[0]
        print(f"best: trial {best.number}, perplexity {studies.best_value(best):.2f}")
    until = study.user_attrs.get(studies.UNTIL)
    if until is not None and ranked and studies.best_value(ranked[0]) <= until:
        print(f"Reached --until {until:g}: what waits, waits for a tune.py without it")
    elif counts["waiting"] or counts["running"]:
        print("Next: the same tune.py command goes on with what waits")


def _last_seen(trial: FrozenTrial) -> str:
    from experiments.study import SHIFTS

    shifts = trial.user_attrs.get(SHIFTS, [])
    return f"  {shifts[-1][0]}, {cli.duration(time.time() - shifts[-1][2])} ago" if shifts else ""


def write_page(
    study: optuna.Study,
    tracker: Tracker,
    ranked: Sequence[FrozenTrial],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> tuple[Path, str]:
    """Write `reports/STUDY.html` beside the stores and log it to the study's one summary run.

    Returns:
        the file, and the page's address in the UI.
    """
    from experiments import plots, study_page
    from experiments import study as studies

    about = f"{len(ranked)} trials; value is the lowest validation perplexity of a trial's epochs."
    if complete := studies.complete(study):
        about += " " + _measured(tracker.open_run(studies.run_id(complete[0])))
    baseline = None
    if ranked:
        logged = tracker.open_run(studies.run_id(ranked[0])).metrics()
        baseline = logged.get("baseline_perplexity")
    figures = study_page.figures(study, baseline) if ranked else []
    table = plots.html_table(header, rows) + _winner(tracker, complete)
    page = plots.report_page(f"Study {study.study_name}", about, figures, table)
    standing = tracker.runs_of_study(study.study_name, "study")
    tags = {"lm.kind": "study", "lm.study": study.study_name}
    with tracker.run(study.study_name, tags, standing[0].info.run_id if standing else None) as run:
        path, link = tracker.publish(run, page)
        if ranked and run.metrics().get("best_validation_perplexity") != studies.best_value(ranked[0]):
            run.log_metrics({"best_validation_perplexity": studies.best_value(ranked[0])}, len(ranked))
            run.log_tags({"lm.best_trial": ranked[0].number, "lm.best_params": ranked[0].params})
    return path, link


def _winner(tracker: Tracker, complete: Sequence[FrozenTrial]) -> str:
    """HTML: the winner's config, and the command that trains it again."""
    from experiments import plots
    from experiments import study as studies
    from lm.config import Config

    if not complete:
        return ""
    run = tracker.open_run(studies.run_id(complete[0]))
    rows = [[name, str(value)] for name, value in Config.from_text(run.params()).flat().items()]
    command = html.escape(train_command(run))
    return (
        f'<h2>The best trial</h2><p>Trained again by</p><pre style="white-space: pre-wrap">{command}</pre>'
        f"<details><summary>All its hyperparameters</summary>{plots.html_table(['hyperparameter', 'value'], rows)}"
        "</details>"
    )


def _measured(winner: TrackedRun) -> str:
    """The best trial's figures beside the baseline's, test among them where it was read."""
    from experiments import text as texts

    found = winner.metrics()
    baseline = {name: float(value) for name, value in winner.params().items() if name.startswith("baseline")}
    parts = [
        f"{what}: {texts.against_baseline(found, name, baseline)}"
        for what, name in (("validation", "best_validation"), ("test", "test"))
        if f"{name}_perplexity" in found
    ]
    return f"Best trial. {'. '.join(part.capitalize() for part in parts)}."


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [header, *rows])


if __name__ == "__main__":
    cli.run(main)
