"""Train one model and log it to MLflow.

python experiments/train.py --corpus sample
python experiments/train.py --resume RUN --epochs 20
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments import cli
from lm.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, train, print each epoch's summary as it ends, and say what to do next."""
    parser = cli.Parser(__doc__ or "")
    cli.add_config_flags(parser)
    parser.add_argument("--run-name", help="the run's name in MLflow (default: corpus and preset)")
    parser.add_argument("--seed-text", help="start of the generated samples (default: validation text)")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run, by id or name, from its last epoch")
    args = parser.parse(argv)
    config = cli.config_of(args)

    from experiments import run as runs
    from experiments.settings import Settings
    from experiments.tracking import TrackedRun, Tracker

    settings = Settings.load()
    tracker = Tracker(settings)
    state, run_id = None, None
    if args.resume is not None:
        if args.preset or args.run_name:
            raise UserError("a resumed run must keep its preset and name: got one of them. Try --resume alone.")
        found = tracker.find_run(args.resume)
        run_id = found.info.run_id
        tracked = TrackedRun(tracker.client, found, settings.mlruns / "work")
        config, text, state = runs.resume(tracked, cli.given(args), settings)
    else:
        text = runs.read_text(config.data, settings)
    print(text.corpus.describe())
    print(f"on {runs.machine(config)}", flush=True)
    seed_text = runs.check(text, config, args.seed_text)

    preset = args.preset or "reference"
    name = args.run_name or f"{text.corpus.name}-{preset}"
    with tracker.run(name, {"lm.kind": "train", "lm.preset": preset}, run_id) as run:
        reports = runs.train_and_log(config, text, run, seed_text, state, progress=cli.is_terminal())
        for report in reports:
            print(report.describe(config.train.epochs), flush=True)
    print(f"run {run.name} ({run.id}) is finished. Next: python experiments/ui.py, which opens")
    print(tracker.run_link(tracker.ui_address(), run.id))


if __name__ == "__main__":
    cli.run(main)
