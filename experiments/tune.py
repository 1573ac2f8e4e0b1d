"""Search layers, learning rate and clipping with Optuna, every trial a run in MLflow.

    python experiments/tune.py --trials 20
    python experiments/tune.py --trials 20 --preset tiny --corpus sample

`--trials` is the study's total: a second call with the same number adds nothing, a larger one the difference.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments import cli
from experiments.search_space import SPACE, suggest
from lm.config import Config
from lm.errors import DivergedError, UserError

if TYPE_CHECKING:
    import optuna

    from experiments.text import Text
    from experiments.tracking import Tracker

PATIENCE = 2
"""Trials stop after so many epochs without a better validation loss; a trial's value is its best epoch's."""


@dataclass(frozen=True)
class Plan:
    """What all trials of a study share."""

    name: str
    config: Config
    text: Text
    seed_text: str
    trials: int
    preset: str
    probes: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, run the trials that are missing, and say what was found and what to do next."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("--trials", type=int, default=20, help="trials of the study in all (default: 20)")
    parser.add_argument("--study", help="first part of the study's name (default: the preset)")
    parser.add_argument("--seed-text", help="start of the generated samples (default: validation text)")
    cli.add_probe_flag(parser)
    cli.add_config_flags(parser, patience=PATIENCE)
    args = parser.parse(argv)
    config = cli.config_of(args, patience=PATIENCE)
    check(config, args.trials, args.study)

    from experiments import report
    from experiments import run as runs
    from experiments import study as studies
    from experiments import text as texts
    from experiments.settings import Settings
    from experiments.tracking import Tracker, store_lock

    settings = Settings.load()
    tracker = Tracker(settings)
    text = texts.read_text(config.data, settings)
    print(text.corpus.describe())
    seed_text = texts.check(text, config, args.seed_text)
    print(texts.describe(text))
    for note in texts.check_probes(text, config, args.probe):
        print(note)
    print(f"on {runs.machine(config)}")
    preset = args.preset or "reference"
    name = study_name(args.study or preset, text, config)
    plan = Plan(name, config, text, seed_text, args.trials, preset, args.probe)
    with store_lock(settings):
        storage = studies.open_storage(settings.optuna_storage)
        study = studies.open_study(storage, name, {k: config.flat()[k] for k in SPACE})
        studies.release_dead(study)
    for trial in studies.finished(study)[:1]:
        tracker.tags(trial.user_attrs[studies.RUN_ID])  # stops here, not after the trials, if the store lacks its runs
    print(f"study {name}: {studies.count(study)} of {plan.trials} trials are there", flush=True)
    search(study, tracker, plan)
    for trial in studies.complete(study)[:1]:
        winner = tracker.open_run(trial.user_attrs[studies.RUN_ID])
        runs.measure(winner, text, config.override(trial.params), "test", "window", cli.is_terminal())
    report.conclude(study, tracker)


def check(config: Config, trials: int, label: str | None) -> None:
    """Raise UserError unless the study can begin with the config's own point."""
    if label is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", label):
        raise UserError(f"study must be at most 60 letters, digits, dots and dashes: got {label!r}. Try --study mine.")
    if trials < 1:
        raise UserError(f"trials must be at least 1: got {trials}. Try --trials 20.")
    for key, searched in SPACE.items():
        value = config.flat()[key]
        assert not isinstance(value, str)
        if not searched.low <= value <= searched.high:
            raise UserError(
                f"{key} must lie in the searched range {searched.low:g} to {searched.high:g}, since trial 0 is "
                f"the config's own point: got {value:g}. Try another --{key.replace('_', '-')}."
            )


def study_name(label: str, text: Text, config: Config) -> str:
    """A name that changes with the text, the space and every hyperparameter, so that results cannot mix."""
    space = {key: searched.describe() for key, searched in SPACE.items()}
    shared = json.dumps([{**config.flat(), "corpus": text.corpus.name}, space], sort_keys=True)
    return f"{label}-{text.corpus.name}-{text.corpus.digest[:8]}-{hashlib.sha256(shared.encode()).hexdigest()[:6]}"


def search(study: optuna.Study, tracker: Tracker, plan: Plan) -> None:
    """Run trials until the study has its total; a bar for a person, a line a trial otherwise."""
    from tqdm import tqdm

    from experiments import study as studies
    from experiments.tracking import store_lock

    began, done_before = time.perf_counter(), studies.count(study)
    bar = tqdm(
        total=plan.trials,
        initial=min(done_before, plan.trials),
        desc="trials",
        disable=not cli.is_terminal(),
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar:30}| {elapsed}{postfix}",
    )
    while True:
        with store_lock(tracker.settings):
            trial = studies.ask(study, plan.trials, plan.config.train.seed)
        if trial is None:
            break
        outcome = run_trial(study, trial, tracker, plan)
        done = studies.count(study)
        seconds_a_trial = (time.perf_counter() - began) / max(1, done - done_before)
        best = studies.finished(study)
        best_so_far = f"{studies.best_value(best[0]):.2f}" if best else "none"
        left = cli.duration(seconds_a_trial * max(0, plan.trials - done))
        bar.update(done - bar.n)
        bar.set_postfix(best=best_so_far, left=left)
        line = f"trial {done}/{plan.trials}  {outcome}  best {best_so_far}  about {left} left"
        tqdm.write(line) if cli.is_terminal() else print(line, flush=True)
    bar.close()


def run_trial(study: optuna.Study, trial: optuna.Trial, tracker: Tracker, plan: Plan) -> str:
    """One trial, in one run; returns its outcome in words.

    The `with` closes the run: FINISHED, KILLED when pruned or interrupted, FAILED when diverged. The clauses
    below tell the study: complete, pruned, failed for good, or to be done again.
    """
    import torch

    from experiments import run as runs
    from experiments import study as studies
    from experiments.tracking import PrunedError

    words, last = "", None
    try:
        point = suggest(trial, SPACE)
        words = "  ".join(f"{key}={value:.3g}" for key, value in point.items())
        tags = {
            "lm.kind": "trial",
            "lm.study": plan.name,
            "lm.trial": str(trial.number),
            "lm.preset": plan.preset,
        }
        with tracker.run(f"trial {trial.number:02d}", tags) as run:
            trial.set_user_attr(studies.RUN_ID, run.id)
            config = plan.config.override(point)
            progress = cli.is_terminal()
            for last in runs.train_and_log(
                config, plan.text, run, plan.seed_text, progress=progress, own_probes=plan.probes
            ):
                trial.report(last.validation.perplexity, last.epoch)
                if last.epoch < config.train.epochs and trial.should_prune():
                    raise PrunedError(f"pruned after epoch {last.epoch}: worse than the median of earlier trials")
    except PrunedError as e:
        studies.tell_pruned(study, trial)
        return f"{words}  {e}"
    except (DivergedError, MemoryError, torch.OutOfMemoryError) as e:
        studies.tell_failed(study, trial)
        return f"{words}  failed: {e}"
    except BaseException:
        studies.requeue(study, trial)
        raise
    assert last is not None
    value = math.exp(last.best_nll)
    study.tell(trial, value)
    return f"{words}  perplexity {value:.2f} in {last.epoch} epochs"


if __name__ == "__main__":
    cli.run(main)
