"""A training state on disk: a folder of safetensors and JSON, complete or not there at all. No pickle.

    config.json           format version, every hyperparameter, progress, digests of the other files
    vocab.json            the vocabulary
    model.safetensors     weights
    optimizer.safetensors moments of the optimisers (in `last`, not in `best`)

It needs neither MLflow nor the corpus to be read again.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm import parallel, runtime
from lm.config import Config, TrainConfig
from lm.errors import UserError
from lm.model import Decoder
from lm.optim import build_optimizers
from lm.parallel import Ranks
from lm.vocab import Vocab

FORMAT_VERSION = 2


@dataclass
class TrainState:
    """All that training changes; the order of batches and the dropout follow from the seed and the steps done."""

    model: Decoder
    optimizers: list[torch.optim.Optimizer]
    epochs_done: int = 0
    steps_done: int = 0
    best_nll: float = float("inf")
    best_epoch: int = 0

    @classmethod
    def new(cls, config: Config, vocab_size: int, device: torch.device) -> TrainState:
        """A model with weights drawn from torch's current seed, and its optimisers."""
        model = Decoder(config.model, vocab_size).to(device)
        return cls(model, build_optimizers(model, config.train))

    @property
    def progress(self) -> tuple[int, int, float, int]:
        """Epochs and steps done, the best loss and its epoch."""
        return self.epochs_done, self.steps_done, self.best_nll, self.best_epoch

    @progress.setter
    def progress(self, progress: tuple[int, int, float, int]) -> None:
        self.epochs_done, self.steps_done, self.best_nll, self.best_epoch = progress

    def level(self, ranks: Ranks) -> None:
        """Give all processes the first one's state."""
        if ranks.size == 1:
            return
        moments = _optimizer_tensors(self.optimizers)
        about = {name: (value.shape, value.dtype, value.device.type) for name, value in moments.items()}
        self.progress, about = ranks.told((self.progress, about))
        if not ranks.is_first:
            moments = {
                name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype, device) in about.items()
            }
        ranks.level([*self.model.state_dict().values(), *moments.values()])
        if not ranks.is_first and moments:
            _restore(self.optimizers, moments)

    def in_shares(self, recipe: TrainConfig, ranks: Ranks) -> TrainState:
        """A state of which each process holds a share; this one stays whole in the first process alone."""
        model = copy.deepcopy(self.model)
        parallel.share_out(model, model.layers, runtime.resolve_device(recipe.device))
        shares = TrainState(model, build_optimizers(model, recipe))
        shares.progress = self.progress
        if moments := _optimizer_tensors(self.optimizers):
            _restore(shares.optimizers, moments)
        if not ranks.is_first:
            self.model.to("meta")
            self.optimizers.clear()
        return shares

    def gather(self, shares: TrainState, ranks: Ranks) -> None:
        """Bring together, in the first process, what the processes hold; all must do so at once."""
        self.progress = shares.progress
        weights, moments = shares.model.state_dict(), _optimizer_tensors(shares.optimizers)
        for tensors in (weights, moments):
            for name, share in tensors.items():
                whole = parallel.whole(share)
                tensors[name] = whole.cpu() if ranks.is_first else share
        if ranks.is_first:
            self.model.load_state_dict(weights)
            _restore(self.optimizers, moments)


def place(recipe: TrainConfig, ranks: Ranks) -> torch.device:
    """Where a state is whole: where it is trained, or the CPU where each process trains a share of its weights."""
    return runtime.resolve_device("cpu" if parallel.shares_weights(recipe.parallel, ranks) else recipe.device)


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, read and checked; without optimizers where they were not saved."""

    config: Config
    vocab: Vocab
    state: TrainState
    corpus_digest: str


def save(
    folder: Path,
    config: Config,
    vocab: Vocab,
    state: TrainState,
    corpus_digest: str,
    with_optimizer: bool = True,
) -> None:
    """Write a checkpoint in place of the one at `folder`.

    The new one is written beside it and renamed, so a killed process leaves the old or the new one whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*"):  # drafts of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        weights = {k: v for k, v in state.model.state_dict().items() if not _is_tied(state.model, k)}
        _write(weights, draft / "model.safetensors")
        if with_optimizer:
            _write(_optimizer_tensors(state.optimizers), draft / "optimizer.safetensors")
        (draft / "vocab.json").write_text(vocab.to_json(), encoding="utf-8")
        about = {
            "format_version": FORMAT_VERSION,
            "config": config.flat(),
            "corpus_digest": corpus_digest,
            "epochs_done": state.epochs_done,
            "steps_done": state.steps_done,
            "best_nll": state.best_nll,
            "best_epoch": state.best_epoch,
            "sha256": {p.name: _sha256(p) for p in sorted(draft.iterdir())},
        }
        (draft / "config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
        draft.chmod(0o755)
        for file in (*draft.iterdir(), draft):
            _sync(file)
        old = _retired(folder)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        draft.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint to load, damaged or not."""
    return folder.exists() or _retired(folder).exists()


def load(folder: Path, device: torch.device | None = None) -> Checkpoint:
    """Read a checkpoint and check weights, moments and vocabulary against their digests.

    Args:
        device: where the weights go; the CPU by default.

    Raises:
        UserError: nothing there, a file cut short or changed, or a format of another version.
    """
    if not folder.exists() and _retired(folder).exists():
        folder = _retired(folder)  # the process died between the two renames of `save`
    if not (folder / "config.json").is_file():
        raise UserError(f"a checkpoint must be a folder with config.json: got {folder}. Try a run's last or best.")
    try:
        about: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        version = about["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"a checkpoint must have format {FORMAT_VERSION}: got {version} in {folder}. "
                "Try the version of this project that wrote it."
            )
        if not {"model.safetensors", "vocab.json"} <= set(about["sha256"]):
            raise UserError(f"a checkpoint must name its files: got {sorted(about['sha256'])}. Try another copy.")
        for name, digest in about["sha256"].items():
            if _sha256(folder / name) != digest:
                raise UserError(
                    f"a checkpoint's files must be as they were written: got a damaged {name} in {folder}. "
                    "Try the run's other checkpoint (last or best)."
                )
        config = Config.from_flat(about["config"])
        vocab = Vocab.from_json((folder / "vocab.json").read_text(encoding="utf-8"))
        model = Decoder(config.model, len(vocab)).to(device or torch.device("cpu"))
        goes_on = "optimizer.safetensors" in about["sha256"]
        state = TrainState(model, build_optimizers(model, config.train) if goes_on else [])
        weights = load_file(folder / "model.safetensors")
        if config.model.tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        state.model.load_state_dict(weights)
        if goes_on:
            _restore(state.optimizers, load_file(folder / "optimizer.safetensors"))
        state.epochs_done, state.steps_done, state.best_epoch = (
            _count(about[name]) for name in ("epochs_done", "steps_done", "best_epoch")
        )
        state.best_nll = float(about["best_nll"])
        return Checkpoint(config, vocab, state, str(about["corpus_digest"]))
    except UserError:
        raise
    except Exception as e:  # files that somebody changed fail in as many ways as there are readers
        first = (str(e).splitlines() or [""])[0][:150]
        raise UserError(
            f"a checkpoint must be complete: got {type(e).__name__} ({first}) in {folder}. "
            "Try the run's other checkpoint (last or best)."
        ) from e


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


def _retired(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as e:
        if "No space left" in str(e):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from e
        raise


def _sync(path: Path) -> None:
    """Have a file or folder on the disk before a rename makes it count."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_tied(model: Decoder, name: str) -> bool:
    return name == "head.weight" and model.head.weight is model.embedding.weight


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
        tensors |= {f"{number}.{i}.{name}": value for i, moments in state.items() for name, value in moments.items()}
    return tensors


def _restore(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in tensors.items():
        number, i, name = key.split(".", 2)
        states[int(number)].setdefault(int(i), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        kinds = {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for i, moments in state.items():
            if set(moments) != kinds or any(m.shape != weights[i].shape for m in moments.values() if m.ndim):
                raise TypeError(f"the moments of weight {i} do not fit it")
            state[i] = {name: parallel.like(value, weights[i]) for name, value in moments.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
