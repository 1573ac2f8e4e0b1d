"""One training with everything logged: fit, log, yield onward. Who reads the reports may stop the loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from experiments import captures, export, plots
from experiments.captures import Capture
from experiments.scores import Sheet
from experiments.settings import Settings
from experiments.text import Text, figures, probes, read_text
from experiments.tracking import TrackedRun
from lm import attention, audit, checkpoint, data, generate, runtime, train
from lm.checkpoint import TrainState
from lm.config import Config
from lm.errors import UserError
from lm.evaluate import Scores, evaluate
from lm.model import Decoder
from lm.parallel import ALONE, Ranks
from lm.vocab import Vocab


def machine(config: Config) -> str:
    """What the config trains on: device, precision and threads, in one line."""
    device = runtime.resolve_device(config.train.device)
    return runtime.describe(device, runtime.resolve_precision(config.train.precision, device))


def train_and_log(
    config: Config,
    text: Text,
    run: TrackedRun,
    seed_text: str,
    state: TrainState | None = None,
    progress: bool = False,
    allow_leak: bool = False,
    own_probes: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Iterator[train.EpochReport]:
    """Train `config` on `text`, log each epoch to `run`, and yield its report once it is safe on disk.

    Of several processes the first does this, while the others `follow`.

    When the loop ends by itself the best checkpoint is audited and logged as the run's model. A caller that stops early
    leaves the run without one, and its checkpoints where they are.

    Raises:
        LeakError: the model sees what it is to predict, or the splits share windows, and `allow_leak` is not given.
    """
    device = checkpoint.place(config.train, ranks)
    windows = {s: text.tokens.windows(s, config.model.seq_len) for s in ("train", "validation")}
    vocab = text.tokens.vocab
    is_new = state is None

    if state is None:
        runtime.seed_everything(config.train.seed)
        try:
            state = TrainState.new(config, len(vocab), device)
        except RuntimeError as e:
            raise MemoryError(f"the model must fit into memory: got {str(e).splitlines()[0][:120]}") from e
        run.log_params({**config.flat(), "vocab_size": len(vocab), "n_parameters": state.model.n_parameters()})
        run.log_params({**text.shares, **text.baseline})  # facts of the text, which would crowd the charts
        run.log_corpus(text.corpus)
    audit_run(run, state.model, text, config, allow_leak, (windows["train"], windows["validation"]))
    run.log_tags(
        {
            "lm.device": machine(config),
            "lm.tokens_digest": text.digest,
            "lm.epochs": config.train.epochs,  # a resumed run may have more than its param says, which is fixed
        }
    )
    read = probes(text, config, own_probes)
    if is_new:
        taken = [_capture(state.model, vocab, read, 0, None)]
        captures.log(run, taken[0])
        baseline = text.baseline["baseline_perplexity"]
        run.log_once({"baseline_perplexity": baseline, **captures.metrics(taken[0])}, step=0)
    else:
        taken = captures.read(run, state.epochs_done)

    ranks.told({"config": config.flat(), "tokens": text.digest})
    for report in train.fit(state, windows["train"], windows["validation"], config.train, progress, ranks):
        run.require_owner()
        if report.is_best:
            # Before its figures are logged: a leak may be learned.
            audit_run(run, state.model, text, config, allow_leak, paths=["evaluation"])
        taken.append(_capture(state.model, vocab, read, report.epoch, taken[-1] if taken else None))
        run.log_epoch(report, {**figures(text, "validation", report.scores), **captures.metrics(taken[-1])})
        _log_attention(run, taken)
        sample = generate.generate_text(state.model, vocab, seed_text, temperature=0.8, seed=0)
        run.log_page(f"samples/epoch_{report.epoch:03d}.txt", sample + "\n")
        if report.is_best:
            _log_sheet(run, text, "validation", report.scores, config, report.epoch)
        run.require_owner()  # again, since all of the above takes time in which a process may be suspended
        for name, due in (("best", report.is_best), ("last", True)):
            if due:
                checkpoint.save(
                    run.checkpoints / name,
                    config,
                    vocab,
                    state,
                    text.corpus.digest,
                    with_optimizer=name == "last",
                )
                run.publish_checkpoint(name)
        yield report
    if run.tags().get("lm.model_epoch") != str(state.best_epoch):
        folder = run.fetch_checkpoint("best")
        best = checkpoint.load(folder, device).state.model
        audit_run(run, best, text, config, allow_leak)
        if not run.leaks:  # what is served computes in ways of its own
            served = generate.for_generation(best, runtime.resolve_precision(config.train.precision, device))
            audit_run(run, served, text, config, allow_leak, paths=["cached generation"])
        if run.leaks:
            return  # it has checkpoints, and no model that could be registered
        measured = measure(run, text, config, "validation", "window", progress)
        metrics = {"best_epoch": float(state.best_epoch), **{f"best_{key}": value for key, value in measured.items()}}
        dataset = (text.corpus.name, text.corpus.digest)

        def log_model() -> str:
            run.require_owner()  # a process that was given up would take the other's model for a half-made one
            return export.log_model(run.client, run.id, folder, metrics, state.best_epoch, dataset, seed_text)

        model_id = run.steady(log_model)
        run.log_tags({"lm.model_id": model_id, "lm.model_epoch": state.best_epoch})


def follow(ranks: Ranks, settings: Settings) -> None:
    """Take part in what the first process trains and logs, until it says that there is no more.

    Raises:
        UserError: this process has another text.
    """
    while (said := ranks.told()) is not None:
        config = Config.from_flat(said["config"])
        text = read_text(config.data, settings)
        if text.digest != said["tokens"]:
            raise UserError(
                f"all processes must read the same text: got digest {text.digest[:8]} in rank {ranks.rank}, the first "
                f"has {said['tokens'][:8]}. Try the same files and settings (LM_WIKIQA_DIR) on each host."
            )
        windows = [text.tokens.windows(split, config.model.seq_len) for split in ("train", "validation")]
        state = TrainState.new(config, len(text.tokens.vocab), checkpoint.place(config.train, ranks))
        for _ in train.fit(state, windows[0], windows[1], config.train, ranks=ranks):
            pass


def audit_run(
    run: TrackedRun,
    model: Decoder,
    text: Text,
    config: Config,
    allow_leak: bool,
    windows: tuple[data.Windows, data.Windows] | None = None,
    paths: Sequence[str] = tuple(audit.PATHS),
) -> None:
    """Audit some paths of the model, and where given its windows of train and validation; tag the run with the outcome.

    Raises:
        LeakError: there are findings, and `allow_leak` is not given.
    """
    precision = runtime.resolve_precision(config.train.precision, model.device)
    chosen = {name: audit.PATHS[name] for name in paths}
    findings = audit.causality(model, len(text.tokens.vocab), precision, paths=chosen)
    if windows is not None:
        train_windows, validation_windows = windows
        findings += audit.alignment(train_windows, "train")
        findings += audit.alignment(validation_windows, "validation")
        findings += audit.separation(train_windows, validation_windows)
    if findings:
        run.log_tags({"lm.audit": "; ".join(findings)})
        run.mark_leaking(findings)
        if not allow_leak:
            audit.require(findings)
    elif not run.leaks:  # an audit of fewer paths does not clear a run that was found to leak
        run.log_tags({"lm.audit": "passed"})


def measure(
    run: TrackedRun, text: Text, config: Config, split: str, context: Literal["window", "sliding"], progress: bool
) -> dict[str, float]:
    """Score a split with the run's best checkpoint, log figures and score sheet, and return the figures.

    Test is to be read once, at the end: a split whose sheet for the best epoch is there is not scored again. A split
    without targets has no figures.
    """
    if len(text.tokens.ids[split]) < 2:
        return {}
    name = split if context == "window" else f"{context}_{split}"
    best = checkpoint.load(run.fetch_checkpoint("best"), runtime.resolve_device(config.train.device)).state
    file, done = run.fetch_artifact(f"scores/{name}.safetensors"), f"lm.{name}_epoch"
    sheet, was_read = None, run.tags().get(done) == str(best.epochs_done)
    if file is not None:
        try:
            sheet = Sheet.read(file)
        except UserError as e:
            print(f"{e} It is made again from the same checkpoint.")
    if sheet is not None and sheet.epoch == best.epochs_done and (name == "validation" or was_read):
        return figures(text, split, Scores(sheet.nats), name)
    windows = text.tokens.windows(split, config.model.seq_len)
    precision = runtime.resolve_precision(config.train.precision, best.model.device)
    scores = evaluate(best.model, windows, precision, f"{name}, best checkpoint" if progress else None, context)
    made = figures(text, split, scores, name)
    _log_sheet(run, text, name, scores, config, best.epochs_done)
    if name != "validation" and not was_read:  # those the epoch itself has logged
        run.log_once(made, best.epochs_done)
        run.log_tags({done: best.epochs_done})
    return made


def _log_sheet(run: TrackedRun, text: Text, name: str, scores: Scores, config: Config, epoch: int) -> None:
    table = text.tokens.records[name.removeprefix("sliding_")]
    columns = {column: np.ascontiguousarray(table[column]) for column in table.dtype.names or ()}
    first_nats = math.log(len(text.tokens.vocab))
    sheet = Sheet(scores.nats_N, columns, text.digest, text.corpus.digest, config.train.seed, epoch, first_nats)
    run.log_bytes(f"scores/{name}.safetensors", sheet.pack())


def _capture(
    model: Decoder, vocab: Vocab, texts: Mapping[str, list[int]], epoch: int, before: Capture | None
) -> Capture:
    """Attention on the probes, and its measures on those that all runs share."""
    maps = {name: attention.attention_map(model, vocab, ids) for name, ids in texts.items()}
    shared = [name for name, ids in texts.items() if name.startswith("validation") and len(ids) > 1]
    return captures.take(epoch, maps, shared, before, attention.head_kinds(model, len(vocab)))


def _log_attention(run: TrackedRun, taken: Sequence[Capture]) -> None:
    """Store the newest capture, its page, and the explorer of all epochs so far."""
    newest = taken[-1]
    captures.log(run, newest)
    history = captures.join(run.name, taken)
    title = f"{run.name}, epoch {newest.epoch}: attention"
    run.log_page(
        f"attention/epoch_{newest.epoch:03d}.html", plots.attention_page([captures.join(run.name, [newest])], title)
    )
    run.log_page("attention.html", plots.attention_page([history], f"{run.name}: attention over training"))
    run.log_tags({"lm.attention": history.verdict()})
