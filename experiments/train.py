"""Train one model and log it to MLflow; test is read once, at the end, with the best checkpoint.

python experiments/train.py --corpus sample
python experiments/train.py --corpus sample --seeds 5
python experiments/train.py --resume RUN --epochs 20
torchrun --standalone --nproc-per-node 2 --max-restarts 3 experiments/train.py --corpus sample
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments import cli
from lm.config import Config
from lm.errors import DivergedError, UserError

if TYPE_CHECKING:
    from experiments.settings import Settings
    from experiments.text import Text
    from experiments.tracking import MlflowRun, TrackedRun, Tracker
    from lm.checkpoint import TrainState
    from lm.parallel import Ranks

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
    cli.add_probe_flag(parser)
    parser.add_argument("--resume", metavar="RUN", help="go on with this run, or group of seeds, from its last epoch")
    parser.add_argument(
        "--seeds", type=int, default=1, help="train so many times, with seeds from --seed on (default: 1)"
    )
    parser.add_argument(
        "--context",
        choices=("window", "sliding"),
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
    from lm import parallel

    settings = Settings.load()
    with parallel.joined(config.train.device) as ranks:
        if ranks.is_first:
            _lead(args, config, settings, ranks)
            ranks.told(None)
        else:
            runs.follow(ranks, settings)
        if ranks.size > 1:
            parallel.leave()


def _lead(args: argparse.Namespace, config: Config, settings: Settings, ranks: Ranks) -> None:
    """All that is printed, logged and written; of several processes the first does it."""
    from experiments import resume
    from experiments import run as runs
    from experiments import text as texts
    from experiments.process import parent_name
    from experiments.tracking import JOB, Tracker
    from lm import parallel

    tracker = Tracker(settings)
    job = (parallel.job() or parent_name()) if parallel.launched() else ""
    found = tracker.find_run(args.resume) if args.resume is not None else None
    state, changes, tags = None, cli.given(args), {JOB: job} if job else {}
    if job and found is None and (found := _of_job(tracker, job, config, args.seeds)) is not None:
        if found.info.status == "FINISHED":
            print(f"run {found.info.run_name} of this torchrun job is finished. Another --rdzv-id begins a new one.")
            return
        changes = {}
    run = tracker.open_run(found.info.run_id) if found else None
    if found is not None:
        _take_up(args, found)
    if found is not None and run is not None and found.data.tags.get("lm.kind") == "seeds":
        config = resume.resume_group(run, changes)
        text = texts.read_text(config.data, settings)
    elif run is not None and (args.resume is not None or resume.has_checkpoint(run)):
        config, text, state = resume.resume_run(run, changes, settings, ranks)
    else:
        text = texts.read_text(config.data, settings)
    print(text.corpus.describe())
    args.seed_text = texts.check(text, config, args.seed_text)
    args.context = args.context or "window"
    for note in texts.check_probes(text, config, args.probe):
        print(note)
    print(texts.describe(text))
    in_all = f", {ranks.size} processes, {config.train.parallel}" if ranks.size > 1 else ""
    print(f"on {runs.machine(config)}{in_all}", flush=True)
    args.run_name = args.run_name or f"{text.corpus.name}-{args.preset or 'reference'}"
    run_id = found.info.run_id if found else None
    if args.seeds == 1:
        run, _ = _train(tracker, config, text, args, args.run_name, tags, run_id, state, ranks)
        if group := run.tags().get("lm.group"):
            print(f"Its group is summed up again by: python experiments/train.py --resume {group}")
    else:
        run = _train_seeds(tracker, config, text, args, tags, run_id, ranks, changes)
    print(f"Next: python experiments/ui.py, which opens {tracker.run_link(tracker.ui_address(), run.id)}")
    print(f"or:   python experiments/compare.py {run.name} ANOTHER_RUN")


def _of_job(tracker: Tracker, job: str, config: Config, seeds: int) -> MlflowRun | None:
    """The run that this torchrun job began with these flags, ready to be gone on with; said aloud.

    Raises:
        UserError: it is going on.
        DivergedError: it has ended by its own parameters, and would again.
    """
    from lm.config import PLACEMENT

    found = tracker.run_of_job(job)
    if found is None:
        return None
    asked = {key: str(value) for key, value in {**config.flat(), "seeds": seeds}.items() if key not in PLACEMENT}
    logged = {**asked, "seeds": "1", **found.data.params}
    if any(logged[key] != value for key, value in asked.items()):
        print(f"run {found.info.run_name} of this torchrun job has other flags: a new run begins")
        return None
    run = tracker.open_run(found.info.run_id)
    if run.is_live_here():
        raise UserError(
            f"a torchrun job must have an id of its own: got {job}, whose run goes on. Try another --rdzv-id."
        )
    reason = found.data.tags.get("lm.reason", "")
    if reason.startswith("DivergedError: "):
        raise DivergedError(reason.removeprefix("DivergedError: "))
    if found.info.status == "RUNNING":
        tracker.close(run.id, "KILLED", "torchrun started its processes again")
    if found.info.status != "FINISHED":
        print(f"run {run.name} ({run.id}) goes on: its processes were started again")
    return found


def _take_up(args: argparse.Namespace, found: MlflowRun) -> None:
    """Fill in what a resumed run was begun with.

    Raises:
        UserError: another --probe than then.
    """
    tags = found.data.tags
    probes = json.loads(tags.get("lm.probes", "[]"))
    if args.probe not in ([], probes):
        raise UserError(f"a resumed run must keep its probes: got {args.probe}, it has {probes}. Try --resume alone.")
    args.probe, args.run_name, args.preset = probes, found.info.run_name, tags.get("lm.preset")
    args.seed_text = args.seed_text or tags.get("lm.seed_text")
    args.context = args.context or tags.get("lm.context")
    args.seeds = int(found.data.params.get("seeds", 1))


def _train(
    tracker: Tracker,
    config: Config,
    text: Text,
    args: argparse.Namespace,
    name: str,
    tags: dict[str, str],
    run_id: str | None = None,
    state: TrainState | None = None,
    ranks: Ranks | None = None,
) -> tuple[TrackedRun, dict[str, float]]:
    """One run from start, or from `state`, to the figures of its best checkpoint."""
    from experiments import run as runs
    from lm.parallel import ALONE

    tags = {"lm.kind": "train", "lm.preset": args.preset or "reference", **tags}
    with tracker.run(name, tags, run_id) as run:
        run.log_tags(_settings(args))
        progress = cli.is_terminal()
        reports = runs.train_and_log(
            config, text, run, args.seed_text, state, progress, args.allow_leak, args.probe, ranks or ALONE
        )
        for report in reports:
            print(report.describe(config.train.epochs), flush=True)
        if verdict := run.tags().get("lm.attention"):
            print(f"attention {verdict}")
        found = _measure(run, config, text, args)
    print(f"run {run.name} ({run.id}) is finished")
    return run, found


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """Flags that are no config, as tags: `--resume` takes them up again."""
    from experiments import text as texts

    return {"lm.context": args.context, "lm.seed_text": args.seed_text, "lm.probes": texts.probes_tag(args.probe)}


def _measure(run: TrackedRun, config: Config, text: Text, args: argparse.Namespace) -> dict[str, float]:
    """The figures of a run's best checkpoint, printed a line a split."""
    from experiments import run as runs
    from experiments import text as texts

    contexts = ("window",) if args.context == "window" else ("window", "sliding")
    found: dict[str, float] = {}
    for context, split in itertools.product(contexts, ("validation", "test")):
        if made := runs.measure(run, text, config, split, context, cli.is_terminal()):
            name = split if context == "window" else f"{context}_{split}"
            warning = "LEAKING, worth nothing: " if run.leaks else ""
            words = texts.against_baseline(made, name, text.baseline)
            print(f"{warning}{name.replace('_', ' ')}, best checkpoint: {words}", flush=True)
            found |= made
    return found


def _train_seeds(
    tracker: Tracker,
    config: Config,
    text: Text,
    args: argparse.Namespace,
    tags: dict[str, str],
    summary_id: str | None,
    ranks: Ranks,
    changes: dict[str, Any],
) -> TrackedRun:
    """A run for each seed and one that sums them up, which is returned; its figures are means of best epochs."""
    import numpy as np

    tags = {"lm.kind": "seeds", "lm.preset": args.preset or "reference", **tags}
    with tracker.run(args.run_name, tags, summary_id) as summary:
        if summary_id is None:
            summary.log_params({**config.flat(), "seeds": args.seeds})
        summary.log_tags({"lm.epochs": config.train.epochs, **_settings(args)})
        found: list[dict[str, float]] = []
        for i in range(args.seeds):
            seed = config.train.seed + i
            print(f"seed {seed} ({i + 1}/{args.seeds})", flush=True)
            run, figures = _train_member(tracker, config.override({"seed": seed}), text, args, summary, ranks, changes)
            if run.leaks:
                summary.mark_leaking([run.tags()["lm.audit"]])
            found.append(figures)
        logged = summary.metrics()
        for key in _SUMMED_UP:
            values = [figures[key] for figures in found if key in figures]
            if len(values) == args.seeds:
                mean = float(np.mean(values))
                sd = float(np.std(values, ddof=1)) if np.isfinite(mean) else np.inf
                name = f"best_{key}" if key.startswith("validation") else key
                if logged.get(summary.metric_name(name)) != mean:
                    summary.log_metrics({name: mean, f"{name}_sd": sd}, step=config.train.epochs)
                print(
                    f"{'LEAKING, worth nothing: ' if summary.leaks else ''}{key.replace('_', ' ')}: "
                    f"{mean:.3f}, standard deviation {sd:.3f} over {args.seeds} seeds"
                )
    return summary


def _train_member(
    tracker: Tracker,
    config: Config,
    text: Text,
    args: argparse.Namespace,
    summary: TrackedRun,
    ranks: Ranks,
    changes: dict[str, Any],
) -> tuple[TrackedRun, dict[str, float]]:
    """One seed of a group: trained, gone on with where it was begun, or only measured where it is done."""
    from experiments import resume

    name = f"{args.run_name}-seed{config.train.seed}"
    members = [m for m in tracker.runs_of_group(summary.id) if m.data.params.get("seed") == str(config.train.seed)]
    for member in sorted(members, key=lambda m: m.info.status != "FINISHED"):
        run = tracker.open_run(member.info.run_id)
        if (member.info.status, member.data.tags.get("lm.epochs")) == ("FINISHED", str(config.train.epochs)):
            return run, _measure(run, config, text, args)
        if run.is_live():
            raise UserError(
                f"a group's runs must have ended to be resumed: got {run.name}, which is running. Try then."
            )
        if resume.has_checkpoint(run):
            config, text, state = resume.resume_run(
                run, {**changes, "epochs": config.train.epochs}, tracker.settings, ranks
            )
            return _train(tracker, config, text, args, name, {}, run.id, state, ranks)
    return _train(tracker, config, text, args, name, {"lm.group": summary.id}, ranks=ranks)


if __name__ == "__main__":
    cli.run(main)
