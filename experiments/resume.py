"""What a run, or a group of seeds, that stands in the store goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.settings import Settings
from experiments.text import Text, read_text
from experiments.tracking import TrackedRun
from lm import checkpoint, runtime, train
from lm.checkpoint import TrainState
from lm.config import PLACEMENT, Config
from lm.errors import UserError
from lm.parallel import ALONE, Ranks

_MAY_CHANGE = {"epochs", "patience", *PLACEMENT}


def resume_run(
    run: TrackedRun, changes: Mapping[str, Any], settings: Settings, ranks: Ranks = ALONE
) -> tuple[Config, Text, TrainState]:
    """The last checkpoint of a run, to go on with: its config, its text and its state.

    Args:
        changes: fields that may differ from then on: epochs, patience, and those of `PLACEMENT`.

    Raises:
        UserError: another field changed, nothing left to do, no checkpoint or a damaged one, another corpus.
    """
    if run.is_live():
        raise UserError(f"a run must have ended to be resumed: got {run.name}, which is running. Try when it has.")
    fixed = sorted(set(changes) - _MAY_CHANGE)
    if fixed:
        raise UserError(
            f"a resumed run must keep its config: got --{fixed[0].replace('_', '-')}. "
            "Try --epochs, --patience, --device, --micro-batch-size or --parallel alone, or a new run."
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
    device = checkpoint.place(config.train, ranks)
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
    logged = {key: str(value) for key, value in Config().flat().items()} | run.params()
    for key, value in loaded.config.flat().items():
        if key not in _MAY_CHANGE and logged[key] != str(value):
            raise UserError(
                f"a run's checkpoint must be its own: got {key}={value}, the run was logged with {logged[key]}. "
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


def resume_group(summary: TrackedRun, changes: Mapping[str, Any]) -> Config:
    """The config of a group of seeds, to complete it or to prolong all of it; that of its first seed.

    Raises:
        UserError: it is running or has not begun, or a change that its seeds cannot make together; where they are
            computed (`PLACEMENT`) may change.
    """
    tags = summary.tags()
    if summary.is_live():
        raise UserError(
            f"a group must have ended to be resumed: got {summary.name}, which is running. Try when it has."
        )
    if "lm.epochs" not in tags:
        raise UserError(f"a group must have begun to be resumed: got {summary.name}. Try its command again.")
    before = Config.from_text({**summary.params(), "epochs": tags["lm.epochs"]})
    config = before.override(changes)
    may_grow = before.train.schedule == "constant" and not before.train.patience
    if set(changes) - {"epochs", *PLACEMENT} or not (
        config.train.epochs == before.train.epochs or (may_grow and config.train.epochs > before.train.epochs)
    ):
        raise UserError(
            "a resumed group must keep its config, but may have more epochs at a constant lr without patience: "
            f"got {', '.join(f'--{name} {value}' for name, value in changes.items())}. Try --resume alone."
        )
    return config


def resume_trial(run: TrackedRun, config: Config, text: Text) -> TrainState | None:
    """The state of a study's run that another process began; None where no epoch of it is whole, which is said.

    Raises:
        UserError: the checkpoint is of another config.
    """
    if not has_checkpoint(run):
        return None
    device = runtime.resolve_device(config.train.device)
    logged = max(run.history("validation_perplexity"), default=0)
    try:
        loaded = checkpoint.load(run.fetch_checkpoint("last"), device)
        if loaded.state.epochs_done < logged - 1:  # another machine went on since
            loaded = checkpoint.load(run.fetch_checkpoint("last", again=True), device)
    except UserError as e:
        print(f"{run.name} begins again: {e}")
        return None
    here, there = config.flat(), loaded.config.flat()
    changed = [name for name in here if name not in PLACEMENT and here[name] != there[name]]
    if changed or loaded.corpus_digest != text.corpus.digest:
        raise UserError(
            f"a trial's checkpoint must be its own: got another {', '.join(changed) or 'text'} in {run.name}. "
            "Try the store that the study was made with."
        )
    return loaded.state


def has_checkpoint(run: TrackedRun) -> bool:
    """Whether a run can be resumed: it has finished an epoch."""
    return checkpoint.exists(run.checkpoints / "last") or "config.json" in run.artifacts("checkpoints/last")
