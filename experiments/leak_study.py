"""Reproduce an impossible perplexity and name its cause: two faults, apart and together, on the same text.

    python experiments/leak_study.py           a small network, minutes
    python experiments/leak_study.py --full    the write-up's size: 50,000 windows of 32, 80/20, 10 epochs; hours

Fault one: windows with stride 1 dealt at random to train and validation, so that validation text has been trained on.
Fault two: `nn.TransformerDecoder` with its own input as memory and a mask on the target alone, so that cross-attention
sees the tokens to be predicted. The audits that every run makes must name each cell that has a fault.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments import cli
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.text import Text
    from experiments.tracking import Tracker
    from lm.config import Config
    from lm.data import Windows
    from lm.model import Decoder

PUBLISHED = {"8.19, after one epoch": 8.19, "1.76": 1.76, "1.29, after ten epochs": 1.29}
_QUICK = {"d_model": 128, "n_layers": 2, "n_heads": 4, "d_ff": 512, "lr": 1e-3, "epochs": 6}
_QUICK_WINDOWS, _FULL_WINDOWS, _TRAIN_SHARE = 5_000, 50_000, 0.8


@dataclass(frozen=True)
class Cell:
    """One combination of a split and a network."""

    name: str
    dealt: bool
    network: str


CELLS = (
    Cell("no fault", dealt=False, network="causal"),
    Cell("overlapping windows", dealt=True, network="causal"),
    Cell("open memory", dealt=False, network="memory"),
    Cell("both faults", dealt=True, network="memory"),
    Cell("no mask at all, overlapping windows", dealt=True, network="unmasked"),
)


@dataclass
class Outcome:
    """What became of a cell: validation perplexity after each epoch, and what the audits found."""

    cell: Cell
    perplexities: list[float]
    findings: str

    @property
    def is_caught(self) -> bool:
        """Whether the audits name each of the cell's faults, and no other."""
        windows, network = "validation windows" in self.findings, "training path" in self.findings
        return (windows, network) == (self.cell.dealt, self.cell.network != "causal")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, train each cell, print the table, write the page, and fail if a fault went unnoticed."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("--full", action="store_true", help="the write-up's size, and the reference recipe")
    parser.add_argument("--windows", type=int, help=f"(default: {_QUICK_WINDOWS:,}, or {_FULL_WINDOWS:,} with --full)")
    parser.add_argument("--cells", type=int, nargs="+", metavar="N", help="only these cells, by number (default: all)")
    cli.add_config_flags(parser, **_QUICK)
    args = parser.parse(argv)
    config = cli.config_of(args, **({} if args.full or args.preset else _QUICK))
    if config.train.patience:
        raise UserError(f"each cell must train equally long: got --patience {config.train.patience}. Try --patience 0.")
    wanted = sorted(set(args.cells or range(1, len(CELLS) + 1)))
    if not set(wanted) <= set(range(1, len(CELLS) + 1)):
        raise UserError(f"cells must be numbers from 1 to {len(CELLS)}: got {wanted}. Try --cells 1 4.")

    if config.model.positions == "rotary" or config.model.seq_len < 2:
        raise UserError(
            "torch's layers take positions with the embeddings, and a leak needs two tokens: got positions="
            f"{config.model.positions}, seq_len={config.model.seq_len}. Try --positions sinusoidal --seq-len 32."
        )

    from experiments import run as runs
    from experiments import text as texts
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    tracker = Tracker(Settings.load())
    text = texts.read_text(config.data, tracker.settings)
    texts.check(text, config, None)
    n_windows = args.windows if args.windows is not None else _FULL_WINDOWS if args.full else _QUICK_WINDOWS
    least, most = 2 * config.train.batch_size, len(text.tokens.ids["train"]) - config.model.seq_len
    if args.windows is None and not args.full:
        n_windows = min(n_windows, most)
    if not least <= n_windows <= most:
        remedy = f"--windows {most}" if least <= most else "a larger corpus, a smaller --seq-len or --batch-size"
        raise UserError(
            f"windows must be at least {least:,} (two batches) and at most {most:,} (of this text): got {n_windows:,}. "
            f"Try {remedy}."
        )
    print(text.corpus.describe())
    print(f"on {runs.machine(config)}")
    print(f"{n_windows:,} windows of {config.model.seq_len}, {_TRAIN_SHARE:.0%} to train, {config.train.epochs} epochs")
    began, outcomes = time.perf_counter(), list[Outcome]()
    for i, number in enumerate(wanted):
        outcomes.append(train_cell(CELLS[number - 1], config, text, n_windows, tracker))
        left = (time.perf_counter() - began) / (i + 1) * (len(wanted) - i - 1)
        print(f"cell {i + 1}/{len(wanted)} done, about {cli.duration(left)} left", flush=True)
    conclude(outcomes, config, text, n_windows, tracker)
    missed = [outcome.cell.name for outcome in outcomes if not outcome.is_caught]
    if missed:
        raise AssertionError(f"an audit must name each fault and no other: missed {missed}")


def train_cell(cell: Cell, config: Config, text: Text, n_windows: int, tracker: Tracker) -> Outcome:
    """Train one cell in a run of its own, marked as leaking where it does."""
    from experiments import run as runs
    from lm import audit, runtime, train
    from lm.checkpoint import TrainState
    from lm.optim import build_optimizers

    train_windows, validation_windows = cut(cell, config, text, n_windows)
    runtime.seed_everything(config.train.seed)
    model = build(cell, config, len(text.tokens.vocab)).to(runtime.resolve_device(config.train.device))
    state = TrainState(model, build_optimizers(model, config.train))
    paths = tuple(audit.PATHS) if cell.network == "causal" else ("training", "evaluation")
    with tracker.run(f"leak study: {cell.name}", {"lm.kind": "leak_study", "lm.cell": cell.name}) as run:
        run.log_params({**config.flat(), "windows": n_windows, "cell": cell.name})
        run.log_corpus(text.corpus)
        runs.audit_run(run, model, text, config, True, (train_windows, validation_windows), paths)
        outcome = Outcome(cell, [], run.tags()["lm.audit"])
        print(f"\n{cell.name}\n  audit: {outcome.findings}", flush=True)
        for report in train.fit(state, train_windows, validation_windows, config.train, cli.is_terminal()):
            total = report.validation
            run.log_epoch(report, {"study_loss": total.nll, "study_perplexity": total.perplexity})
            outcome.perplexities.append(total.perplexity)
            print(f"  {report.describe(config.train.epochs)}", flush=True)
    return outcome


def cut(cell: Cell, config: Config, text: Text, n_windows: int) -> tuple[Windows, Windows]:
    """Training and validation windows of a cell: as many training windows in each.

    Dealt windows are the first of train with stride 1. The others are spread over all of train, and measured on
    validation text.
    """
    import numpy as np

    from lm.data import Windows

    ids, T = text.tokens.ids["train"], config.model.seq_len
    n_train = min(round(n_windows * _TRAIN_SHARE), n_windows - 1)
    if cell.dealt:
        order = np.random.default_rng(config.data.split_seed).permutation(n_windows)
        return Windows(ids, T, np.sort(order[:n_train])), Windows(ids, T, np.sort(order[n_train:]))
    spread = np.linspace(0, len(ids) - T - 1, n_train).astype(np.int64)
    unseen = text.tokens.ids["validation"][: (n_windows - n_train) * T + 1]
    return Windows(ids, T, spread), Windows(unseen, T)


def build(cell: Cell, config: Config, vocab_size: int) -> Decoder:
    """The project's decoder, with torch's layers and their fault in place of its own where the cell has one."""
    from torch import Tensor, nn

    from lm.model import Decoder

    model, shape = Decoder(config.model, vocab_size), config.model
    if cell.network == "causal":
        return model
    sizes = (shape.d_model, shape.n_heads, shape.d_ff, shape.dropout, shape.activation)
    options: dict[str, Any] = {"batch_first": True, "norm_first": shape.norm == "pre"}

    class OpenMemory(nn.Module):
        """The mask hides later tokens of the target; the memory, which is the input too, shows them."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes, **options), shape.n_layers)

        def forward(self, x_BTD: Tensor, *_: object) -> tuple[Tensor, None]:
            mask_TT = nn.Transformer.generate_square_subsequent_mask(x_BTD.shape[1], device=x_BTD.device)
            return self.body(x_BTD, memory=x_BTD, tgt_mask=mask_TT), None

    class NoMask(nn.Module):
        """Every token sees every other."""

        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(*sizes, **options)
            self.body = nn.TransformerEncoder(layer, shape.n_layers, enable_nested_tensor=False)

        def forward(self, x_BTD: Tensor, *_: object) -> tuple[Tensor, None]:
            return self.body(x_BTD), None

    model.layers = nn.ModuleList([OpenMemory() if cell.network == "memory" else NoMask()])
    return model


def conclude(outcomes: Sequence[Outcome], config: Config, text: Text, n_windows: int, tracker: Tracker) -> None:
    """Print the table and what it says, write the page, and log it to a run that sums the study up."""
    from experiments import plots

    header = ["cell", "epoch 1", f"epoch {config.train.epochs}", "caught", "what the audits found"]
    rows = [
        [
            o.cell.name,
            f"{o.perplexities[0]:.2f}",
            f"{o.perplexities[-1]:.2f}",
            "yes" if o.is_caught else "NO",
            o.findings,
        ]
        for o in outcomes
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(4)]
    print()
    for row in [header, *rows]:
        print(
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:4], widths[1:], strict=True)), row[4]]
            )
        )
    first, _, last = PUBLISHED.values()

    def distance(o: Outcome) -> float:
        return abs(math.log(o.perplexities[0] / first)) + abs(math.log(o.perplexities[-1] / last))

    nearest = min(outcomes, key=distance)
    baseline = text.baseline["baseline_perplexity"]
    says = (
        f"Nearest by ratio to the published {first} after one epoch and {last} at the end comes '{nearest.cell.name}': "
        f"{nearest.perplexities[0]:.2f} and {nearest.perplexities[-1]:.2f}. "
        f"A 5-gram model on the honest split: {baseline:.2f}."
    )
    print(f"\n{says}")
    about = (
        f"{n_windows:,} windows of {config.model.seq_len} tokens, {_TRAIN_SHARE:.0%} of them to train, "
        f"{config.train.epochs} epochs, d_model {config.model.d_model}, {config.model.n_layers} layers, "
        f"corpus {text.corpus.name}. {says}"
    )
    how = "Validation perplexity after each epoch; the dashed lines are the published figures and the n-gram baseline."
    figure = curves(outcomes, baseline)
    page = plots.report_page("Leak study", about, [("The fall", how, figure)], plots.html_table(header, rows))
    with tracker.run("leak study", {"lm.kind": "leak_study_summary"}) as run:
        run.log_params({**config.flat(), "windows": n_windows})
        path, link = tracker.publish(run, page)
    print(f"report   {path}\nbrowse   python experiments/ui.py, which opens\nsummary  {link}")


def curves(outcomes: Sequence[Outcome], baseline: float) -> Any:
    """A Plotly figure: a line a cell on a logarithmic axis, with the published figures."""
    import plotly.graph_objects as go

    from experiments import plots

    figure = go.Figure()
    epochs = list(range(1, 1 + max(len(outcome.perplexities) for outcome in outcomes)))
    for outcome in outcomes:
        figure.add_scatter(x=epochs, y=outcome.perplexities, mode="lines+markers", name=outcome.cell.name)
    for label, value in {"n-gram baseline": baseline, **{f"published: {k}": v for k, v in PUBLISHED.items()}}.items():
        plots.add_level(figure, value, label, (epochs[0], epochs[-1]))
    figure.update_layout(xaxis={"title": "epoch", "dtick": 1}, yaxis_title="validation perplexity", height=560)
    figure.update_yaxes(type="log")
    return figure


if __name__ == "__main__":
    cli.run(main)
