"""One training with everything logged: fit, log, yield onward. Who reads the reports may stop the loop."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from experiments import captures, export, plots
from experiments.captures import Capture
from experiments.scores import Sheet
from experiments.settings import Settings
from experiments.tracking import TrackedRun
from lm import attention, audit, checkpoint, data, generate, runtime, train
from lm.checkpoint import TrainState
from lm.config import Config, DataConfig
from lm.corpus import Corpus, load_corpus
from lm.errors import UserError
from lm.evaluate import Scores, bits_per_byte, evaluate
from lm.model import Decoder
from lm.overlap import RUN
from lm.vocab import Vocab

_SAMPLE_PROMPT_TOKENS = 4
_SHARED_TEXTS, _LONGEST_PROBE, _LONGEST_TAG = 2, 256, 5000
_MAY_CHANGE = {"epochs", "patience", "device"}


@dataclass(frozen=True)
class Text:
    """A corpus ready to train on."""

    corpus: Corpus
    tokens: data.TokenizedCorpus

    @cached_property
    def digest(self) -> str:
        """Of the tokens: text and vocabulary. Perplexities compare where this is equal."""
        return hashlib.sha256(f"{self.corpus.digest} {self.tokens.vocab.to_json()}".encode()).hexdigest()

    @cached_property
    def baseline(self) -> dict[str, float]:
        """`figures` of the n-gram model: `baseline_perplexity` on validation, `baseline_test_perplexity`, and so on."""
        made: dict[str, float] = {}
        for split, name in (("validation", "baseline"), ("test", "baseline_test")):
            if len(self.tokens.baseline_nats[split]):
                made |= figures(self, split, Scores(self.tokens.baseline_nats[split]), name)
        return made

    @cached_property
    def shares(self) -> dict[str, float]:
        """How much of validation and test is unknown words, and how much of it stands in train."""
        made: dict[str, float] = {}
        for split in ("validation", "test"):
            table = self.tokens.records[split]
            if len(table):
                made |= {
                    f"{split}_unknown_share": float(np.mean(self.tokens.ids[split] == self.tokens.vocab.unk_id)),
                    f"{split}_answers_in_train_share": float(table["copied"].mean()),
                    f"{split}_runs_in_train_share": float(table["shared"].mean()),
                    f"{split}_clean_share": float(self.tokens.clean(split).mean()),
                }
        return made


def read_text(config: DataConfig, settings: Settings) -> Text:
    """Read and tokenise the corpus, from the cache where it is there."""
    corpus = load_corpus(config, settings.cache, settings.wikiqa_dir, settings.wikiqa_revision)
    return Text(corpus, data.tokenize(corpus, config, settings.cache))


def machine(config: Config) -> str:
    """What the config trains on: device, precision and threads, in one line."""
    device = runtime.resolve_device(config.train.device)
    return runtime.describe(device, runtime.resolve_precision(config.train.precision, device))


def check(text: Text, config: Config, seed_text: str | None) -> str:
    """Check what only the text can tell, before any run begins, and return the seed text of generated samples.

    Returns:
        the seed text that was given, or the first known words of the validation text.

    Raises:
        UserError: a split shorter than a window, or a seed text without a word of the vocabulary.
    """
    vocab = text.tokens.vocab
    for split in ("train", "validation"):
        text.tokens.windows(split, config.model.seq_len)
    if seed_text is None:
        known = (int(i) for i in text.tokens.ids["validation"] if i != vocab.unk_id)
        seed_text = vocab.decode(list(itertools.islice(known, _SAMPLE_PROMPT_TOKENS)))
    generate.encode_prompt(vocab, seed_text)
    return seed_text


def probes(text: Text, config: Config, own: Sequence[str] = ()) -> dict[str, list[int]]:
    """The texts whose attention is kept at each epoch, by name, as ids, at most a window and `_LONGEST_PROBE` tokens.

    Two stretches of validation text, each from the start of a record that the split's seed draws, are the same for all
    runs on a corpus with one window length; a person's own texts follow.
    """
    n, ids, table = _probe_tokens(config), text.tokens.ids["validation"], text.tokens.records["validation"]
    starts = np.concatenate([[0], np.cumsum(table["tokens"])[:-1]])
    starts = np.unique(starts[starts <= max(0, len(ids) - n)])
    chosen = np.random.default_rng(config.data.split_seed).permutation(starts)[:_SHARED_TEXTS]
    made = {f"validation {i + 1}": [int(x) for x in ids[start : start + n]] for i, start in enumerate(chosen)}
    return made | {f"probe {i + 1}": text.tokens.vocab.encode(words)[:n] for i, words in enumerate(own)}


def check_probes(text: Text, config: Config, own: Sequence[str]) -> list[str]:
    """What is not shown of a person's own texts as they wrote it: the end past the window, and unknown words.

    Raises:
        UserError: an own text without a token, or more text than a run can remember.
    """
    notes, n = list[str](), _probe_tokens(config)
    if len(probes_tag(own)) > _LONGEST_TAG:
        raise UserError(
            f"probes must have at most {_LONGEST_TAG:,} characters together: got {len(probes_tag(own)):,}. "
            f"Try shorter ones: {n} tokens of each are shown."
        )
    for i, words in enumerate(own):
        encoded = text.tokens.vocab.encode(words)
        if not encoded:
            raise UserError(f"a probe must hold a word: got {words!r}. Try --probe 'what is an otter?'.")
        if len(encoded) > n:
            notes.append(f"probe {i + 1}: the first {n} of its {len(encoded)} tokens are kept")
        if unknown := encoded[:n].count(text.tokens.vocab.unk_id):
            notes.append(f"probe {i + 1}: {unknown} of its words are not in the vocabulary and stand as <unk>")
    return notes


def probes_tag(own: Sequence[str]) -> str:
    """A person's own texts as the value of a tag."""
    return json.dumps(own, ensure_ascii=False)


def _probe_tokens(config: Config) -> int:
    return min(config.model.seq_len, _LONGEST_PROBE)


def resume_group(summary: TrackedRun, changes: Mapping[str, Any]) -> Config:
    """The config of a group of seeds, to complete it or to prolong all of it; that of its first seed.

    Raises:
        UserError: it is running or has not begun, or a change that its seeds cannot make together.
    """
    logged = summary.params()
    if summary.is_live():
        raise UserError(
            f"a group must have ended to be resumed: got {summary.name}, which is running. Try when it has."
        )
    if "lm.epochs" not in summary.tags():
        raise UserError(f"a group must have begun to be resumed: got {summary.name}. Try its command again.")
    before = Config.from_text({**logged, "epochs": summary.tags()["lm.epochs"]})
    config = before.override(changes)
    may_grow = before.train.schedule == "constant" and not before.train.patience
    if set(changes) - {"epochs", "device"} or not (
        config.train.epochs == before.train.epochs or (may_grow and config.train.epochs > before.train.epochs)
    ):
        raise UserError(
            "a resumed group must keep its config, but may have more epochs at a constant lr without patience: "
            f"got {', '.join(f'--{name} {value}' for name, value in changes.items())}. Try --resume alone."
        )
    return config


def resume(run: TrackedRun, changes: Mapping[str, Any], settings: Settings) -> tuple[Config, Text, TrainState]:
    """The last checkpoint of a run, to go on with: its config, its text and its state.

    Args:
        changes: fields that may differ from then on: epochs, patience, device.

    Raises:
        UserError: another field changed, nothing left to do, no checkpoint or a damaged one, another corpus.
    """
    if run.is_live():
        raise UserError(f"a run must have ended to be resumed: got {run.name}, which is running. Try when it has.")
    fixed = sorted(set(changes) - _MAY_CHANGE)
    if fixed:
        raise UserError(
            f"a resumed run must keep its config: got --{fixed[0].replace('_', '-')}. "
            "Try --epochs, --patience or --device alone, or a new run."
        )
    if run.tags().get("lm.kind") == "trial":
        raise UserError(
            f"a trial must stay as its study knows it: got {run.name}. Try train.py with the trial's own params."
        )
    folder = run.fetch_checkpoint("last")
    loaded = checkpoint.load(folder)
    config = loaded.config.override(changes)
    if config.train.schedule != "constant" and config.train.epochs != loaded.config.train.epochs:
        raise UserError(
            f"a {config.train.schedule} schedule must keep its length: got --epochs {config.train.epochs}, the run has "
            f"{loaded.config.train.epochs}. Try a new run."
        )
    device = runtime.resolve_device(config.train.device)
    if device.type != "cpu":
        loaded = checkpoint.load(folder, device)
    text = read_text(config.data, settings)
    if loaded.corpus_digest != text.corpus.digest:
        raise UserError(
            f"a run must be resumed on its own corpus: got digest {text.corpus.digest[:8]}, the run has "
            f"{loaded.corpus_digest[:8]}. Try the settings of the run (LM_WIKIQA_DIR)."
        )
    if loaded.vocab.to_json() != text.tokens.vocab.to_json():
        raise UserError(
            "a run must be resumed with its own vocabulary: got another one for the same text. "
            "Try the version of this project and of tokenizers that the run was made with."
        )
    logged = run.params()
    for key, value in loaded.config.flat().items():
        if key not in _MAY_CHANGE and logged.get(key) != str(value):
            raise UserError(
                f"a run's checkpoint must be its own: got {key}={value}, the run was logged with {logged.get(key)}. "
                "Try the run's own folder."
            )
    done = loaded.state.epochs_done
    if run.mlflow_run.info.status != "FINISHED" and done <= config.train.epochs:
        return config, text, loaded.state  # at the least its end is missing: audit, model, test
    if done >= config.train.epochs:
        raise UserError(f"a finished run needs more epochs to go on: got {done} done. Try --epochs {done + 10}.")
    if train.out_of_patience(loaded.state, config.train):
        raise UserError(
            f"a run that its patience ended needs more of it to go on: got --patience {config.train.patience}. "
            f"Try --patience {config.train.patience + 5}."
        )
    return config, text, loaded.state


def has_checkpoint(run: TrackedRun) -> bool:
    """Whether a run can be resumed: it has finished an epoch."""
    return checkpoint.exists(run.checkpoints / "last") or "config.json" in run.artifacts("checkpoints/last")


def train_and_log(
    config: Config,
    text: Text,
    run: TrackedRun,
    seed_text: str,
    state: TrainState | None = None,
    progress: bool = False,
    allow_leak: bool = False,
    own_probes: Sequence[str] = (),
) -> Iterator[train.EpochReport]:
    """Train `config` on `text`, log each epoch to `run`, and yield its report once it is safe on disk.

    When the loop ends by itself the best checkpoint is audited and logged as the run's model. A caller that stops early
    leaves the run without one, and its checkpoints where they are.

    Raises:
        LeakError: the model sees what it is to predict, or the splits share windows, and `allow_leak` is not given.
    """
    device = runtime.resolve_device(config.train.device)
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
    if is_new:
        run.log_metrics({"baseline_perplexity": text.baseline["baseline_perplexity"]}, step=0)
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
        run.log_metrics(captures.metrics(taken[0]), step=0)
    else:
        taken = captures.read(run, state.epochs_done)

    for report in train.fit(state, windows["train"], windows["validation"], config.train, progress):
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
        if run.leaks:
            return  # it has checkpoints, and no model that could be registered
        measured = measure(run, text, config, "validation", "window", progress)
        metrics = {"best_epoch": float(state.best_epoch), **{f"best_{key}": value for key, value in measured.items()}}
        dataset = (text.corpus.name, text.corpus.digest)
        model_id = export.log_model(run.client, run.id, folder, metrics, state.best_epoch, dataset, seed_text)
        run.log_tags({"lm.model_id": model_id, "lm.model_epoch": state.best_epoch})


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


def figures(text: Text, split: str, scores: Scores, name: str | None = None) -> dict[str, float]:
    """What the scores of a split come to, by metric name; `name` stands before each (default: the split).

    The perplexity of clean records is left out where there is no clean record.
    """
    name, table = name or split, text.tokens.records[split]
    total = scores.total
    made = {
        f"{name}_loss": total.nll,
        f"{name}_perplexity": total.perplexity,
        f"{name}_bits_per_byte": bits_per_byte(
            scores, len(text.tokens.vocab), float(table["written_nats"].sum()), int(table["bytes"].sum())
        ),
    }
    clean = scores.where(text.tokens.of_targets(split, text.tokens.clean(split)))
    if clean is not None:
        made[f"{name}_clean_perplexity"] = clean.perplexity
    return made


def describe(text: Text) -> str:
    """Two lines: what of the validation text is unknown or in train already, and the baseline on it."""
    shares, baseline = text.shares, text.baseline
    clean = baseline.get("baseline_clean_perplexity")
    on_clean = f"{clean:.2f} on clean records" if clean else "there is no clean record"
    return (
        f"validation: {shares['validation_unknown_share']:.1%} of tokens unknown; in train stand "
        f"{shares['validation_answers_in_train_share']:.1%} of its answers and a run of {RUN} words of "
        f"{shares['validation_runs_in_train_share']:.1%} of its records; "
        f"{shares['validation_clean_share']:.1%} are clean\n"
        f"baseline: Kneser-Ney {data.BASELINE_ORDER}-gram, validation perplexity "
        f"{baseline['baseline_perplexity']:.2f}, {on_clean}"
    )


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
        run.log_metrics(made, best.epochs_done, {done: best.epochs_done})
    return made


def against_baseline(found: Mapping[str, float], name: str, baseline: Mapping[str, float]) -> str:
    """The figures of `name` (validation, test, sliding_test, ...) beside the n-gram model's, in words."""
    other = "baseline_test" if name.endswith("test") else "baseline"

    def beside(kind: str) -> str:
        if f"{name}_{kind}" not in found:
            return "none, there is no clean record"
        value, reference = found[f"{name}_{kind}"], baseline[f"{other}_{kind}"]
        return f"{value:.2f} (baseline {reference:.2f}, {value / reference - 1:+.1%})"

    return (
        f"perplexity {beside('perplexity')}, on clean records {beside('clean_perplexity')}, "
        f"{found[f'{name}_bits_per_byte']:.3f} bits a byte"
    )


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
