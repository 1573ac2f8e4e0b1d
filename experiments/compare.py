"""Say whether two runs really differ: the same tokens, paired, with a 95 % interval.

    python experiments/compare.py RUN RUN
    python experiments/compare.py GROUP GROUP --split test

A run is named by its id or its name; the name given to `train.py --seeds` stands for all its seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import cli
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.scores import Difference, Side
    from experiments.tracking import MlflowRun, Tracker


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, read the score sheets, print the difference and the verdict."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a run, or a group of seeds")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="(default: validation)")
    args = parser.parse(argv)

    from experiments import scores
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    tracker = Tracker(Settings.load())
    found = [tracker.find_run(name) for name in args.runs]
    members = [_members(tracker, run) for run in found]
    if {run.info.run_id for run in members[0]} & {run.info.run_id for run in members[1]}:
        raise UserError(f"a comparison needs two sides: got {args.runs[0]} on both. Try another run.")
    a, b = (_side(tracker, *side, args.split) for side in zip(args.runs, members, strict=True))
    print(describe(a, b, scores.compare(a, b), f"{args.split}, all records"))
    records = a.sheets[0].records
    if (records["copied"] | records["shared"]).all():
        print(f"{args.split}, clean records: there is none")
    else:
        print(describe(a, b, scores.compare(a, b, clean=True), f"{args.split}, clean records"))
    if min(len(a.sheets), len(b.sheets)) == 1:
        print("One seed a side, and another seed moves each as well: try train.py --seeds 5 for both.")


def _members(tracker: Tracker, found: MlflowRun) -> list[MlflowRun]:
    """The run, or the finished runs of a group, which must be whole."""
    if found.data.tags.get("lm.kind") != "seeds":
        return [found]
    members = [run for run in tracker.runs_of_group(found.info.run_id) if run.info.status == "FINISHED"]
    wanted, name = int(found.data.params["seeds"]), found.info.run_name
    if len(members) != wanted or len({member.data.tags.get("lm.epochs") for member in members}) > 1:
        raise UserError(
            f"a group must be whole, with equal epochs: got {len(members)} finished of {wanted} seeds in {name}. "
            f"Try python experiments/train.py --resume {name}, or a single run ({name}-seed0)."
        )
    return members


def _side(tracker: Tracker, name: str, members: Sequence[MlflowRun], split: str) -> Side:
    """The score sheets of some runs, each of its best epoch."""
    from experiments.scores import Sheet, Side

    sheets: list[Sheet] = []
    for member in members:
        run = tracker.open_run(member.info.run_id)
        if member.info.status != "FINISHED":
            print(f"{run.name} is {member.info.status}: it stands with its best epoch so far")
        if run.leaks:
            raise UserError(f"a comparison needs honest runs: got {run.name}, which leaks. Try another run.")
        file = run.fetch_artifact(f"scores/{split}.safetensors")
        if file is None:
            raise UserError(
                f"a run must have scores on {split} to be compared: got {run.name}, which has none. "
                f"Try {'--split validation, or ' if split == 'test' else ''}a run that train.py finished."
            )
        sheet, best = Sheet.read(file), run.fetch_artifact("scores/validation.safetensors")
        if best is not None and Sheet.read(best).epoch != sheet.epoch:
            raise UserError(
                f"a run must be compared at its best epoch: got {run.name}, whose {split} scores are of epoch "
                f"{sheet.epoch}. Try python experiments/train.py --resume {run.name}."
            )
        sheets.append(sheet)
    return Side(name, sheets)


def describe(a: Side, b: Side, found: Difference, what: str) -> str:
    """The two sides, their difference and the verdict, in five lines."""
    from experiments.scores import LEAST_QUESTIONS

    unit = "perplexity" if found.unit == "token" else "bits a byte"

    def side(name: str, means: list[float]) -> str:
        shown = [math.exp(min(x, 700)) if found.unit == "token" else x / math.log(2) for x in means]
        mean = sum(shown) / len(shown)
        spread = (
            f" +- {statistics.stdev(shown):.3f} (standard deviation of {len(shown)} seeds)" if len(shown) > 1 else ""
        )
        return f"{name}: {unit} {mean:.3f}{spread}"

    better, worse, sign = (b.name, a.name, 1) if found.less > 0 else (a.name, b.name, -1)
    low, high = sorted((sign * found.low, sign * found.high))
    p = f"= {found.p:.2g}" if found.p else "< 0.0002"
    over = "questions and seeds" if found.has_seeds else "questions"
    if found.is_real:
        verdict = f"The difference is real: {better} is better."
    elif found.n_effective < LEAST_QUESTIONS:
        verdict = f"Too few questions to tell: they weigh as {found.n_effective:.1f}, {LEAST_QUESTIONS} are needed."
    elif found.is_shown:
        verdict = (
            f"These two checkpoints differ, {better} is better; whether the configurations do, only seeds can tell."
        )
    else:
        verdict = "No difference is shown."
    change = f" ({math.exp(-abs(found.less)) - 1:+.1%} perplexity)" if found.unit == "token" else ""
    return (
        f"{what}: {found.n_targets:,} tokens of {found.n_questions:,} questions\n"
        f"  A {side(a.name, found.a)}\n  B {side(b.name, found.b)}\n"
        f"  {better} pays {abs(found.less):.4f} nats a {found.unit} less than {worse}{change}, "
        f"95 % interval {low:.4f} to {high:.4f}, p {p} over {over}\n  {verdict}"
    )


if __name__ == "__main__":
    cli.run(main)
