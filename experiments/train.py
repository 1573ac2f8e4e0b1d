"""Train one model and log it to MLflow; test is read once, at the end, with the best checkpoint.

python experiments/train.py --corpus sample
python experiments/train.py --corpus sample --seeds 5
python experiments/train.py --resume RUN --epochs 20
"""

from __future__ import annotations

import argparse
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
    for split in ("validation", "test")
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
    print(runs.describe(text))
    print(f"on {runs.machine(config)}", flush=True)
    args.seed_text = runs.check(text, config, args.seed_text)
    args.run_name = args.run_name or f"{text.corpus.name}-{args.preset or 'reference'}"
    if args.seeds == 1:
        name = _train(tracker, config, text, args, {}, run_id, state)[0].name
    else:
        name = _train_seeds(tracker, config, text, args)
    link = tracker.run_link(tracker.ui_address(), tracker.find_run(name).info.run_id)
    print(f"Next: python experiments/ui.py, which opens {link}")
    print(f"or:   python experiments/compare.py {name} ANOTHER_RUN")


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
        splits = ("validation", "test") if len(text.tokens.ids["test"]) > 1 else ("validation",)
        found: dict[str, float] = {}
        for context in contexts:
            for split in splits:
                made = runs.measure(run, text, config, split, context, progress)
                print(_line(split, context, made, run, text), flush=True)
                found |= made
    print(f"run {run.name} ({run.id}) is finished")
    return run, found


def _line(split: str, context: str, made: dict[str, float], run: TrackedRun, text: Text) -> str:
    """A split's figures beside the baseline's, in one line."""
    from experiments import run as runs

    prefix = {"validation": "baseline", "test": "baseline_test"}[split]
    name, baseline = split if context == "window" else f"{context}_{split}", runs.baseline_figures(text)

    def against(kind: str) -> str:
        if f"{name}_{kind}" not in made:
            return "none, there is no clean record"
        value, other = made[f"{name}_{kind}"], baseline[f"{prefix}_{kind}"]
        return f"{value:.2f} (baseline {other:.2f}, {value / other - 1:+.1%})"

    return (
        f"{'LEAKING, worth nothing: ' if run.leaks else ''}{name.replace('_', ' ')}, best checkpoint: perplexity "
        f"{against('perplexity')}, on clean records {against('clean_perplexity')}, "
        f"{made[f'{name}_bits_per_byte']:.3f} bits a byte"
    )


def _train_seeds(tracker: Tracker, config: Config, text: Text, args: argparse.Namespace) -> str:
    """A run for each seed and one that sums them up; returns the name of that one."""
    import statistics

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
                mean, sd = statistics.mean(values), statistics.stdev(values)
                summary.log_metrics({key: mean, f"{key}_sd": sd}, step=args.seeds)
                print(f"{key.replace('_', ' ')}: {mean:.3f}, standard deviation {sd:.3f} over {args.seeds} seeds")
    return summary.name


if __name__ == "__main__":
    cli.run(main)
