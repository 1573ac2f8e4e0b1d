"""Say whether runs really differ (the same tokens, paired, with a 95 % interval), and show their attention together.

    python experiments/compare.py RUN RUN
    python experiments/compare.py GROUP GROUP --split test

A run is named by its id or its name; the name given to `train.py --seeds` stands for all its seeds. Of several runs
each is held against the first. The page is logged to MLflow; of a group it shows the first seed's attention.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import cli
from lm import config
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.scores import Difference, Side
    from experiments.tracking import MlflowRun, Tracker


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, read the score sheets, print the difference and the verdict."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="two or more runs or groups of seeds")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="(default: validation)")
    args = parser.parse(argv)

    from experiments import scores
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    if len(args.runs) < 2:
        raise UserError(f"a comparison needs two sides: got {args.runs[0]} alone. Try another run beside it.")
    tracker = Tracker(Settings.load())
    members = [_members(tracker, tracker.find_run(name)) for name in args.runs]
    seen: set[str] = set()
    for name, runs in zip(args.runs, members, strict=True):
        ids = {run.info.run_id for run in runs}
        if ids & seen:
            raise UserError(f"a comparison needs different sides: got {name} twice. Try another run.")
        seen |= ids
    a, *others = (_side(tracker, *side, args.split) for side in zip(args.runs, members, strict=True))
    said: list[str] = []
    for b in others:
        said.append(describe(a, b, scores.compare(a, b), f"{args.split}, all records"))
        records = a.sheets[0].records
        if (records["copied"] | records["shared"]).all():
            said.append(f"{args.split}, clean records: there is none")
        else:
            said.append(describe(a, b, scores.compare(a, b, clean=True), f"{args.split}, clean records"))
    if min(len(side.sheets) for side in (a, *others)) == 1:
        said.append("One seed a side, and another seed moves each as well: try train.py --seeds 5 for both.")
    print("\n".join(said))
    show_attention(tracker, [runs[0] for runs in members], "\n".join(said))


def show_attention(tracker: Tracker, runs: Sequence[MlflowRun], said: str) -> None:
    """Log a page of some runs, with what differs in their configs, to a run of its own; say why where there is none."""
    from experiments import plots
    from experiments.captures import load_attention

    names = [run.info.run_name or run.info.run_id for run in runs]
    title = " and ".join(names)
    header, rows = ["", *names], _config_differences(runs) + _perplexities(tracker, runs)
    above = f"<pre>{html.escape(said)}</pre>{plots.html_table(header, rows) if rows else ''}"
    try:
        histories = [load_attention(tracker.open_run(run.info.run_id)) for run in runs]
        page = plots.attention_page(histories, title, above=above)
    except UserError as e:
        print(f"no page of their attention: {e}")
        return
    with tracker.run(f"compare {title}"[:200], {"lm.kind": "comparison"}) as run:
        path, link = tracker.publish(run, page)
    print(f"report   {path}\nbrowse   python experiments/ui.py, which opens\n         {link}")


def _config_differences(runs: Sequence[MlflowRun]) -> list[list[str]]:
    """A row for each config field in which the runs differ."""
    logged = [{**run.data.params, "epochs": run.data.tags.get("lm.epochs", "")} for run in runs]
    values = {name: [params.get(name, "") for params in logged] for name in config.names()}
    return [[name, *row] for name, row in values.items() if len(set(row)) > 1]


def _perplexities(tracker: Tracker, runs: Sequence[MlflowRun]) -> list[list[str]]:
    """A row for each epoch with the validation perplexity of the runs."""
    logged = [
        {
            point.step: point.value
            for point in tracker.client.get_metric_history(run.info.run_id, "validation_perplexity")
        }
        for run in runs
    ]
    epochs = sorted({epoch for points in logged for epoch in points})
    return [
        [f"perplexity, epoch {e}", *(f"{points[e]:.2f}" if e in points else "" for points in logged)] for e in epochs
    ]


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
    return sorted(members, key=lambda run: int(run.data.params["seed"]))


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
        sheet = Sheet.read(file)
        best = run.fetch_artifact("scores/validation.safetensors") if split != "validation" else None
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
