"""One training with everything logged: fit, log, yield onward. Who reads the reports may stop the loop."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import export, plots
from experiments.settings import Settings
from experiments.tracking import TrackedRun
from lm import attention, checkpoint, data, generate, runtime, train
from lm.checkpoint import TrainState
from lm.config import Config, DataConfig
from lm.corpus import Corpus, load_corpus
from lm.errors import UserError

_SAMPLE_PROMPT_TOKENS = 4
_MAY_CHANGE = {"epochs", "patience", "device"}


@dataclass(frozen=True)
class Text:
    """A corpus ready to train on."""

    corpus: Corpus
    tokens: data.TokenizedCorpus


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
    logged = run.params()
    for key, value in loaded.config.flat().items():
        if key not in _MAY_CHANGE and logged.get(key) != str(value):
            raise UserError(
                f"a run's checkpoint must be its own: got {key}={value}, the run was logged with {logged.get(key)}. "
                "Try the run's own folder."
            )
    done = loaded.state.epochs_done
    if done >= config.train.epochs:
        raise UserError(f"a finished run needs more epochs to go on: got {done} done. Try --epochs {done + 10}.")
    if train.out_of_patience(loaded.state, config.train):
        raise UserError(
            f"a run that its patience ended needs more of it to go on: got --patience {config.train.patience}. "
            f"Try --patience {config.train.patience + 5}."
        )
    return config, text, loaded.state


def train_and_log(
    config: Config,
    text: Text,
    run: TrackedRun,
    seed_text: str,
    state: TrainState | None = None,
    progress: bool = False,
) -> Iterator[train.EpochReport]:
    """Train `config` on `text`, log each epoch to `run`, and yield its report once it is safe on disk.

    When the loop ends by itself the best checkpoint is logged as the run's model. A caller that stops early
    leaves the run without one, and its checkpoints where they are.
    """
    device = runtime.resolve_device(config.train.device)
    windows = {s: text.tokens.windows(s, config.model.seq_len) for s in ("train", "validation")}
    vocab = text.tokens.vocab
    if state is None:
        runtime.seed_everything(config.train.seed)
        try:
            state = TrainState.new(config, len(vocab), device)
        except RuntimeError as e:
            raise MemoryError(f"the model must fit into memory: got {str(e).splitlines()[0][:120]}") from e
        run.log_params({**config.flat(), "vocab_size": len(vocab), "n_parameters": state.model.n_parameters()})
        run.log_corpus(text.corpus)
    tokens_digest = hashlib.sha256(f"{text.corpus.digest} {vocab.to_json()}".encode()).hexdigest()
    run.log_tags(
        {
            "lm.device": machine(config),
            "lm.tokens_digest": tokens_digest,
            "lm.epochs": config.train.epochs,  # a resumed run may have more than its param says, which is fixed
        }
    )
    probe = _probe(windows["validation"], config)
    for report in train.fit(state, windows["train"], windows["validation"], config.train, progress):
        run.log_epoch(report)
        title = f"{run.name}, epoch {report.epoch}: attention on validation text"
        shown = attention.attention_map(state.model, vocab, probe)
        run.log_page(f"attention/epoch_{report.epoch:03d}.html", plots.attention_page({report.epoch: shown}, title))
        sample = generate.generate_text(state.model, vocab, seed_text, temperature=0.8, seed=0)
        run.log_page(f"samples/epoch_{report.epoch:03d}.txt", sample + "\n")
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
        metrics = {
            "best_validation_loss": state.best_nll,
            "best_validation_perplexity": math.exp(state.best_nll),
            "best_epoch": float(state.best_epoch),
        }
        dataset = (text.corpus.name, text.corpus.digest)
        folder = run.fetch_checkpoint("best")
        model_id = export.log_model(run.client, run.id, folder, metrics, state.best_epoch, dataset, seed_text)
        run.log_tags({"lm.model_id": model_id, "lm.model_epoch": state.best_epoch})


def _probe(windows: data.Windows, config: Config) -> list[int]:
    """One window of validation text, chosen by the seed of the split: the same for all runs on a corpus."""
    rng = np.random.default_rng(config.data.split_seed)
    start = int(rng.integers(0, max(1, windows.n_full))) * windows.seq_len
    return [int(i) for i in windows.ids[start : start + windows.seq_len]]
