"""Search layers, learning rate and clipping with Optuna, every trial a run in MLflow.

    python experiments/tune.py --trials 20
    python experiments/tune.py --trials 20 --preset tiny --corpus sample
    python experiments/tune.py --search lr=1e-4:1e-2:log n_heads=4,8,16 --hours 8
    python experiments/tune.py --status

`--trials` is the study's total: a second call with the same number adds nothing, a larger one the difference. A call
beside another, here or on another host with the same stores, works on the same study. Ctrl-C finishes the epoch; the
same command goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments import cli
from experiments.search_space import PATIENCE, SPACE, Space, describe, parse, suggest
from lm.config import PLACEMENT, Config
from lm.errors import DivergedError, LeakError, UserError

if TYPE_CHECKING:
    from experiments.budget import Stop
    from experiments.claims import Claim, Claims
    from experiments.text import Text
    from experiments.tracking import TrackedRun, Tracker


class PointError(UserError):
    """What a trial drew breaks a rule between fields, such as heads that do not divide the width."""


_LOOK_AGAIN = 2.0


@dataclass(frozen=True)
class Plan:
    """What all trials of a study share, and how this process works on them."""

    name: str
    config: Config
    space: Space
    text: Text
    seed_text: str
    trials: int
    preset: str
    probes: list[str]
    keep: int | None
    progress: bool


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, run the trials that are missing, and say what was found and what to do next."""
    parser = _parser()
    args = parser.parse(argv)
    config = cli.config_of(args, patience=PATIENCE)
    space = parse(args.search, config) or SPACE

    from experiments.settings import Settings

    settings = Settings.load()
    if settings.under_torchrun:
        raise UserError(
            "a study shares its work out by trials: got torchrun. Try --workers 2, or the same command on each host."
        )
    if args.status:
        from experiments import report

        report.status(settings, args.study)
        return
    check(config, space, args.trials, args.study)
    if args.workers < 1:
        raise UserError(f"workers must be at least 1: got {args.workers}. Try --workers 2.")

    from experiments import report, workers
    from experiments import text as texts
    from experiments.budget import Stop
    from experiments.claims import Claims
    from experiments.locks import store_lock
    from experiments.run import machine
    from experiments.study import Plans, finished, open_storage, open_study, run_id
    from experiments.tracking import Tracker

    tracker = Tracker(settings)
    text = texts.read_text(config.data, settings)
    seed_text = texts.check(text, config, args.seed_text)
    is_first = args.worker is None
    notes = texts.check_probes(text, config, args.probe)
    if is_first:
        print("\n".join([text.corpus.describe(), texts.describe(text), *notes, f"on {machine(config)}"]), flush=True)
    preset = args.preset or "reference"
    plan = Plan(
        name=study_name(args.study or preset, text, config, space),
        config=config,
        space=space,
        text=text,
        seed_text=seed_text,
        trials=args.trials,
        preset=preset,
        probes=args.probe,
        keep={"all": None, "best": 1, "top3": 3}[args.keep],
        progress=is_first and args.workers == 1 and cli.is_terminal(),
    )
    with store_lock(settings):
        storage = open_storage(settings.optuna_storage, settings.heartbeat_seconds)
        open_study(storage, plan.name, {name: config.flat()[name] for name in space}, plan.trials, args.until)
    plans = Plans(args.sampler, args.pruner)
    worker = f"{platform.node()} worker {args.worker or 1}"
    claims = Claims(storage, plan.name, plans, lambda: store_lock(settings), worker)
    for trial in finished(claims.study())[:1]:
        tracker.tags(run_id(trial))  # stops here, not after the trials, if the store lacks its runs
    if is_first:
        done = claims.done()
        print(f"study {plan.name}: {done} of {plan.trials} trials are there", flush=True)
        if done < plan.trials:
            print(forecast(plan, plan.trials - done, args.workers), flush=True)
    with Stop(args.hours, args.until, not is_first) as stop:
        if args.workers > 1 and is_first:
            workers.run(args.workers, stop, argv)
            done = claims.done()
            why = "" if done >= plan.trials else stop.reason(claims.best) or "its workers were killed too often"
        else:
            why = search(claims, tracker, plan, stop)
    if not is_first:
        return
    settle(claims, tracker)
    remove_losers(claims, tracker, plan)
    if why == "interrupted":
        report.status(settings, plan.name)
        raise KeyboardInterrupt
    if why:
        print(f"stopped: {why}")
    conclude(claims, tracker, plan)


def _parser() -> cli.Parser:
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("--trials", type=int, default=20, help="trials of the study in all (default: 20)")
    parser.add_argument("--hours", type=float, help="stop at the end of the epoch after so many hours")
    parser.add_argument("--until", type=float, metavar="PERPLEXITY", help="stop when a trial has reached it")
    parser.add_argument(
        "--search",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="fields to search instead: lr=1e-4:1e-2:log, n_layers=2:8, n_heads=4,8,16",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that share this machine's cores; faster than one for small models (default: 1)",
    )
    parser.add_argument("--sampler", choices=("tpe", "random"), default="tpe", help="how points are drawn")
    parser.add_argument(
        "--pruner",
        choices=("median", "halving", "none"),
        default="median",
        help="which trials stop early, beside those that --patience ends (default: median)",
    )
    parser.add_argument(
        "--keep",
        choices=("all", "top3", "best"),
        default="top3",
        help="whose weights stay when a trial has ended: those of the three best complete trials (default), "
        "of the best one, or all; figures, pages and samples always stay",
    )
    parser.add_argument("--study", help="first part of the study's name (default: the preset); with --status, the name")
    parser.add_argument("--status", action="store_true", help="say how the study stands, and do nothing")
    parser.add_argument("--seed-text", help="start of the generated samples (default: validation text)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    cli.add_probe_flag(parser)
    cli.add_config_flags(parser, patience=PATIENCE)
    return parser


def check(config: Config, space: Space, trials: int, label: str | None) -> None:
    """Raise UserError unless the study can begin with the config's own point."""
    if label is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", label):
        raise UserError(f"study must be at most 60 letters, digits, dots and dashes: got {label!r}. Try --study mine.")
    if trials < 1:
        raise UserError(f"trials must be at least 1: got {trials}. Try --trials 20.")
    for key, searched in space.items():
        value = config.flat()[key]
        if not searched.has(value):
            raise UserError(
                f"{key} must lie in what is searched, {searched.describe()}, since trial 0 is the config's own point: "
                f"got {value}. Try another --{key.replace('_', '-')}."
            )


def study_name(label: str, text: Text, config: Config, space: Space) -> str:
    """A name that changes with the text, the space and all that shapes a figure, so that results cannot mix."""
    searched = {key: values.describe() for key, values in space.items()}
    fields = {name: value for name, value in config.flat().items() if name not in PLACEMENT}
    shared = json.dumps([{**fields, "corpus": text.corpus.name}, searched], sort_keys=True)
    return f"{label}-{text.corpus.name}-{text.corpus.digest[:8]}-{hashlib.sha256(shared.encode()).hexdigest()[:6]}"


def forecast(plan: Plan, trials: int, n_workers: int) -> str:
    """What the study will cost at the most, in one line: trial 0's time and disk for each."""
    from experiments import budget

    config, text = plan.config, plan.text
    windows, validation = (text.tokens.windows(s, config.model.seq_len) for s in ("train", "validation"))
    vocab_size = len(text.tokens.vocab)
    try:
        epoch = budget.seconds_an_epoch(config, vocab_size, windows, validation)
    except (MemoryError, RuntimeError) as e:
        return f"forecast: none, since trial 0 cannot be tried ({str(e).splitlines()[0][:100]})"
    weights = budget.checkpoint_bytes(config, vocab_size) / 1e9
    held = trials if plan.keep is None else min(trials, plan.keep + n_workers)
    return (
        f"forecast: about {cli.duration(epoch)} an epoch, at most {cli.duration(epoch * config.train.epochs * trials)} "
        f"in all if each trial is like trial 0; {weights * held:.2g} GB of disk for weights"
    )


def search(claims: Claims, tracker: Tracker, plan: Plan, stop: Stop) -> str:
    """Work on trials until the study has its total; a bar for a person, a line a trial otherwise.

    Returns:
        why it stopped before; empty where it did not.
    """
    from tqdm import tqdm

    from experiments.process import TakenOverError

    began = time.perf_counter()
    done_before = claims.done()
    bar = tqdm(
        total=plan.trials,
        initial=min(done_before, plan.trials),
        desc="trials",
        disable=not plan.progress,
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar:30}| {elapsed}{postfix}",
    )
    why, waiting = "", False
    while True:
        release_dead(claims, tracker)
        if why := stop.reason(claims.best):
            break
        claim = claims.take(plan.trials, plan.config.train.seed, lambda trial: suggest(trial, plan.space))
        if claim is None:
            running = [t for t in claims.trials() if not t.state.is_finished() and t.number < plan.trials]
            if not running:
                break
            if not waiting:
                numbers = ", ".join(str(t.number) for t in running)
                tqdm.write(f"waiting for trials of other processes: {numbers}")
            waiting = True
            time.sleep(_LOOK_AGAIN)
            continue
        try:
            outcome = run_trial(claim, claims, tracker, plan, stop)
        except TakenOverError as e:
            claim.drop()
            outcome = str(e)
        done = claims.done()
        seconds_a_trial = (time.perf_counter() - began) / max(1, done - done_before)
        best, left = claims.best(), cli.duration(seconds_a_trial * max(0, plan.trials - done))
        bar.update(done - bar.n)
        bar.set_postfix(best=f"{best:.2f}", left=left)
        line = f"trial {claim.number} ({done}/{plan.trials} done)  {outcome}  best {best:.2f}  about {left} left"
        tqdm.write(line) if plan.progress else print(line, flush=True)
        remove_losers(claims, tracker, plan)
    bar.close()
    return why


def run_trial(claim: Claim, claims: Claims, tracker: Tracker, plan: Plan, stop: Stop) -> str:
    """One trial, in one run, from its start or from where another process left it; returns its outcome in words.

    The `with` closes the run: FINISHED, KILLED when pruned or interrupted, FAILED when its parameters were the cause.
    The clauses below tell the study: complete, pruned, failed, or waiting for the next process.
    """
    import torch

    from experiments.process import TakenOverError
    from experiments.tracking import PrunedError, StoppedError

    words = describe(claim.point)
    tags = {"lm.kind": "trial", "lm.study": plan.name, "lm.trial": str(claim.number), "lm.preset": plan.preset}
    run_id = tracker.run_of_trial(plan.name, claim.number)
    try:
        with tracker.run(f"trial {claim.number:02d}", tags, run_id) as run:
            claim.set_run(run.id)
            train_trial(claim, claims, run, plan, stop)
        claim.complete()
        return f"{words}  perplexity {min(claim.reported.values()):.2f} in {max(claim.reported)} epochs"
    except PrunedError as e:
        claim.prune()
        return f"{words}  {e}"
    except TakenOverError:
        raise
    except (DivergedError, MemoryError, torch.OutOfMemoryError, PointError, LeakError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        claim.fail(reason)
        if isinstance(e, LeakError):
            raise
        return f"{words}  failed: {reason}"
    except StoppedError as e:
        claim.release()
        return f"{words}  {e}"
    except BaseException:
        claim.release()
        raise


def train_trial(claim: Claim, claims: Claims, run: TrackedRun, plan: Plan, stop: Stop) -> None:
    """Train a trial to its end.

    Raises:
        StoppedError: it is pruned, or to be left at the end of an epoch.
        PointError: what it drew cannot be trained.
    """
    from experiments import resume
    from experiments import run as runs
    from experiments.tracking import PrunedError, StoppedError

    try:
        config = plan.config.override(claim.point)
        for split in ("train", "validation"):
            plan.text.tokens.windows(split, config.model.seq_len)
    except UserError as e:
        raise PointError(str(e)) from e
    state = resume.resume_trial(run, config, plan.text)
    epochs = config.train.epochs

    def decide(epoch: int) -> None:
        if epoch < epochs and claim.should_prune():
            raise PrunedError(f"pruned after epoch {epoch}: worse than earlier trials were")

    if state is not None:
        logged = run.history("validation_perplexity")
        claim.report({epoch: value for epoch, value in logged.items() if epoch <= state.epochs_done})
        decide(state.epochs_done)
    reports = runs.train_and_log(
        config, plan.text, run, plan.seed_text, state, progress=plan.progress, own_probes=plan.probes
    )
    for report in reports:
        claim.report({report.epoch: report.validation.perplexity})
        decide(report.epoch)
        if report.epoch < epochs and (why := stop.reason(claims.best)):
            raise StoppedError(f"{why} after epoch {report.epoch}; the study goes on from there")


def release_dead(claims: Claims, tracker: Tracker) -> None:
    """Let the trials of dead processes wait again, and close their runs."""
    for freed in claims.release_dead():
        if freed.run_id is not None:
            status = "FAILED" if freed.failed else "KILLED"
            tracker.close_if_left(freed.run_id, freed.owner, status, freed.reason)
        what = "failed for good" if freed.failed else "goes on from its last epoch"
        print(f"trial {freed.number}: {freed.reason}; it {what}", flush=True)


def settle(claims: Claims, tracker: Tracker) -> None:
    """Give runs the status that their trials have, where a process died between telling the one and the other."""
    trials = claims.trials()
    runs = {run.data.tags["lm.trial"]: run for run in tracker.runs_of_study(claims.name)}
    true = {
        "COMPLETE": ["FINISHED"], "PRUNED": ["KILLED"], "FAIL": ["FAILED"], "WAITING": ["KILLED", "FAILED"],
    }  # fmt: skip
    for trial in trials:
        run, allowed = runs.get(str(trial.number)), true.get(trial.state.name, [])
        if (
            run is not None
            and allowed
            and run.info.status not in allowed
            and not tracker.open_run(run.info.run_id).is_live()
        ):
            tracker.close(run.info.run_id, allowed[0], "" if allowed[0] == "FINISHED" else "its worker died")


def remove_losers(claims: Claims, tracker: Tracker, plan: Plan) -> None:
    """Remove the weights of ended trials that are not among the best complete ones, as `--keep` says."""
    from experiments.study import best_value

    if plan.keep is None:
        return
    ended = [trial for trial in claims.trials() if trial.state.is_finished()]  # one look: else a new best may be missed
    complete = sorted((t for t in ended if t.state.name == "COMPLETE"), key=best_value)
    best = {str(trial.number) for trial in complete[: plan.keep]}
    losers = {str(trial.number) for trial in ended} - best
    for run in tracker.runs_of_study(plan.name):
        if run.data.tags["lm.trial"] in losers:
            tracker.remove_weights(run, f"not among the best {plan.keep}")


def conclude(claims: Claims, tracker: Tracker, plan: Plan) -> None:
    """Measure the best trial on test, write the study's page, and say what to do next.

    Under the store's lock: workers that were started one by one all end here at once.
    """
    from experiments import report
    from experiments import run as runs
    from experiments.locks import store_lock
    from experiments.study import complete, run_id

    with store_lock(tracker.settings):
        study = claims.study()
        for trial in complete(study)[:1]:
            winner = tracker.open_run(run_id(trial))
            runs.measure(winner, plan.text, plan.config.override(trial.params), "test", "window", plan.progress)
        report.conclude(study, tracker)


if __name__ == "__main__":
    cli.run(main)
