"""A study over Ray: Ray Tune's OptunaSearch draws the points, each trial is an MLflow run by train_and_log.

    pip install 'ray[tune]==2.60.0'
    python docs/cluster/ray_tune.py --trials 20 --at-once 2 --preset tiny --corpus sample

Needs no Optuna storage; MLFLOW_TRACKING_URI and the login as everywhere, on every node. It is Ray's study, not this
laboratory's: no trial goes on where another process died, and `report.py` and `tune.py --status` do not know it. For
those, run `tune.py` itself once a node (README.md beside this file).
"""

from __future__ import annotations

import functools
from typing import Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from experiments import cli
from experiments.search_space import PATIENCE, SPACE, describe, suggest
from lm.config import Config


def space(trial: Any) -> dict[str, Any]:
    """What `tune.py` searches, for OptunaSearch."""
    return suggest(trial, SPACE)


def train_point(point: dict[str, Any], config: Config, study: str) -> None:
    """One trial in a Ray worker: an MLflow run, and its best perplexity so far to Ray after each epoch."""
    from experiments import run as runs
    from experiments import text as texts
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    settings = Settings.load()
    tracker, text = Tracker(settings), texts.read_text(config.data, settings)
    trial, best = tune.get_context().get_trial_id(), float("inf")
    tags = {"lm.kind": "trial", "lm.study": study, "lm.trial": trial, "lm.preset": "reference"}
    with tracker.run(f"ray {trial}", tags) as run:
        seed_text = texts.check(text, config, None)
        for report in runs.train_and_log(config.override(point), text, run, seed_text):
            best = min(best, report.validation.perplexity)
            tune.report({"perplexity": best, "epoch": report.epoch, "mlflow_run": run.id})


def main() -> None:
    """Parse flags, let Ray run the trials, print the best one."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("--trials", type=int, default=20, help="trials in all (default: 20)")
    parser.add_argument("--at-once", type=int, default=2, help="trials at the same time (default: 2)")
    parser.add_argument("--cpus", type=float, default=1, help="cores of a trial (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a trial, also a part of one (default: 0)")
    parser.add_argument("--study", default="ray", help="name of the study in MLflow (default: ray)")
    cli.add_config_flags(parser, patience=PATIENCE)
    args = parser.parse(None)
    config = cli.config_of(args, patience=PATIENCE)

    from experiments.settings import Settings
    from experiments.tracking import Tracker

    settings = Settings.load()
    Tracker(settings)  # stops here if the store is away; makes its schema before any worker does
    first = {name: config.flat()[name] for name in SPACE}
    search = OptunaSearch(space, metric="perplexity", mode="min", seed=config.train.seed, points_to_evaluate=[first])
    tuner = tune.Tuner(
        tune.with_resources(
            functools.partial(train_point, config=config, study=args.study), {"cpu": args.cpus, "gpu": args.gpus}
        ),
        tune_config=tune.TuneConfig(num_samples=args.trials, search_alg=ConcurrencyLimiter(search, args.at_once)),
        run_config=tune.RunConfig(name=args.study, storage_path=str(settings.mlruns / "ray"), verbose=0),
    )
    ended: list[tuple[float, str]] = []
    for result in tuner.fit():
        found, point = result.metrics or {}, describe(result.config or {})
        if result.error:
            print(f"{found.get('trial_id')}  {point}  failed: {str(result.error).splitlines()[0]}")
            continue
        ended.append((found["perplexity"], point))
        print(f"{found['trial_id']}  {point}  perplexity {found['perplexity']:.2f} in {found['epoch']} epochs")
    for perplexity, point in sorted(ended)[:1]:
        print(f"best {point}  perplexity {perplexity:.2f}")


if __name__ == "__main__":
    cli.run(main)
