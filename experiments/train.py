"""Train one model and log it to MLflow; test is read once, at the end, with the best checkpoint.

python experiments/train.py --corpus sample
python experiments/train.py --corpus sample --seeds 5
python experiments/train.py --resume RUN --epochs 20
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import cli
from lm.config import Config
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.run import Text
    from experiments.tracking import TrackedRun, Tracker
    from lm.checkpoint import TrainState

_SUMMED_UP = [
    f"{split}_{kind}"
    for split in ("validation", "test", "sliding_validation", "sliding_test")
    for kind in ("perplexity", "clean_perplexity", "bits_per_byte")
]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, train, print each epoch's summary as it ends, and say what to do next."""
    parser = cli.Parser(__doc__ or "")
    cli.add_config_flags(parser)
    parser.add_argument("--run-name", help="the run's name in MLflow (default: corpus and preset)")
    parser.add_argument("--seed-text", help="start of the generated samples (default: validation text)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run, by id or name, from its last epoch")
    parser.add_argument(
        "--seeds", type=int, default=1, help="train so many times, with seeds from --seed on (default: 1)"
    )
    parser.add_argument(
        "--context",
        choices=("window", "sliding"),
        default="window",
        help="sliding: at the end also measure each token with all the context the model takes (default: window)",
    )
    parser.add_argument(
        "--allow-leak",
        action="store_true",
        help="go on when an audit fails; the run and each of its figures are marked as leaking",
    )
    args = parser.parse(argv)
    config = cli.config_of(args)
    if args.seeds < 1:
        raise UserError(f"seeds must be at least 1: got {args.seeds}. Try --seeds 5.")
    # The last seed is checked before the first is trained.
    config.override({"seed": config.train.seed + args.seeds - 1})
    if args.resume is not None and (args.preset or args.run_name or args.seeds > 1):
        raise UserError("a resumed run must keep its preset, name and seed: got one of them. Try --resume alone.")

    from experiments import run as runs
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    settings = Settings.load()
    tracker = Tracker(settings)
    state, run_id = None, None
    if args.resume is not None:
        run_id = tracker.find_run(args.resume).info.run_id
        config, text, state = runs.resume(tracker.open_run(run_id), cli.given(args), settings)
    else:
        text = runs.read_text(config.data, settings)
    print(text.corpus.describe())
    args.seed_text = runs.check(text, config, args.seed_text)
    print(runs.describe(text))
    print(f"on {runs.machine(config)}", flush=True)
    args.run_name = args.run_name or f"{text.corpus.name}-{args.preset or 'reference'}"
    if args.seeds == 1:
        run, _ = _train(tracker, config, text, args, {}, run_id, state)
    else:
        run = _train_seeds(tracker, config, text, args)
    print(f"Next: python experiments/ui.py, which opens {tracker.run_link(tracker.ui_address(), run.id)}")
    print(f"or:   python experiments/compare.py {run.name} ANOTHER_RUN")


def _train(
    tracker: Tracker,
    config: Config,
    text: Text,
    args: argparse.Namespace,
    tags: dict[str, str],
    run_id: str | None = None,
    state: TrainState | None = None,
) -> tuple[TrackedRun, dict[str, float]]:
    """One run from start, or from `state`, to the figures of its best checkpoint."""
    from experiments import run as runs

    preset, name = args.preset or "reference", args.run_name
    if args.seeds > 1:
        name += f"-seed{config.train.seed}"
    with tracker.run(name, {"lm.kind": "train", "lm.preset": preset, **tags}, run_id) as run:
        progress = cli.is_terminal()
        reports = runs.train_and_log(config, text, run, args.seed_text, state, progress, args.allow_leak)
        for report in reports:
            print(report.describe(config.train.epochs), flush=True)
        contexts = ("window",) if args.context == "window" else ("window", "sliding")
        found: dict[str, float] = {}
        for context, split in itertools.product(contexts, ("validation", "test")):
            if made := runs.measure(run, text, config, split, context, progress):
                name = split if context == "window" else f"{context}_{split}"
                warning = "LEAKING, worth nothing: " if run.leaks else ""
                words = runs.against_baseline(made, name, text.baseline)
                print(f"{warning}{name.replace('_', ' ')}, best checkpoint: {words}", flush=True)
                found |= made
    print(f"run {run.name} ({run.id}) is finished")
    return run, found


def _train_seeds(tracker: Tracker, config: Config, text: Text, args: argparse.Namespace) -> TrackedRun:
    """A run for each seed and one that sums them up, which is returned; its figures are means of best epochs."""
    import numpy as np

    tags = {"lm.kind": "seeds", "lm.preset": args.preset or "reference"}
    with tracker.run(args.run_name, tags) as summary:
        summary.log_params({**config.flat(), "seeds": args.seeds})
        found: list[dict[str, float]] = []
        for i in range(args.seeds):
            seed = config.train.seed + i
            print(f"seed {seed} ({i + 1}/{args.seeds})", flush=True)
            run, figures = _train(tracker, config.override({"seed": seed}), text, args, {"lm.group": summary.id})
            if run.leaks:
                summary.mark_leaking([run.tags()["lm.audit"]])
            found.append(figures)
        for key in _SUMMED_UP:
            values = [figures[key] for figures in found if key in figures]
            if len(values) == args.seeds:
                mean = float(np.mean(values))
                sd = float(np.std(values, ddof=1)) if np.isfinite(mean) else np.inf
                name = f"best_{key}" if key.startswith("validation") else key
                summary.log_metrics({name: mean, f"{name}_sd": sd}, step=args.seeds)
                print(
                    f"{'LEAKING, worth nothing: ' if summary.leaks else ''}{key.replace('_', ' ')}: "
                    f"{mean:.3f}, standard deviation {sd:.3f} over {args.seeds} seeds"
                )
    return summary


if __name__ == "__main__":
    cli.run(main)
