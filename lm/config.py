"""Every hyperparameter: its name, default, help and rule, declared once.

A field's name is its flag (`--clip-norm`), its Optuna parameter, its MLflow key and its column in reports.
Knows neither files nor the environment; nothing here is filled in later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, cast

from lm.errors import UserError

Scalar = int | float | str | bool


def _field(default: Scalar, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


def _require(holds: bool, rule: str, got: str, remedy: str) -> None:
    if not holds:
        raise UserError(f"{rule}: got {got}. {remedy}")


class _Section:
    """Shared checks of the frozen sections: types and choices of each field."""

    def __post_init__(self) -> None:
        for f in fields(cast(Any, self)):
            value = getattr(self, f.name)
            kind = type(f.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif type(value) is not kind:
                flag = f.name.replace("_", "-")
                raise UserError(f"{f.name} must be {kind.__name__}: got {value!r}. Try --{flag} {f.default}.")
            choices = f.metadata["choices"]
            if kind is int and abs(value) >= 2**31:
                raise UserError(
                    f"{f.name} must be below 2**31: got {value}. Try --{f.name.replace('_', '-')} {f.default}."
                )
            if choices and value not in choices:
                raise UserError(
                    f"{f.name} must be one of {', '.join(choices)}: got {value!r}. "
                    f"Try --{f.name.replace('_', '-')} {f.default}."
                )

    def _positive(self, *names: str) -> None:
        for name in names:
            value, flag = getattr(self, name), name.replace("_", "-")
            default = next(f.default for f in fields(cast(Any, self)) if f.name == name)
            finite = value == value and value not in (float("inf"), float("-inf"))
            _require(
                finite and value > 0,
                f"{name} must be a number above 0",
                f"{name}={value}",
                f"Try --{flag} {default}.",
            )

    def _fraction(self, *names: str) -> None:
        for name in names:
            value, flag = getattr(self, name), name.replace("_", "-")
            _require(
                0 <= value < 1,
                f"{name} must be at least 0 and below 1",
                f"{name}={value}",
                f"Try --{flag} 0.1.",
            )

    def _not_negative(self, *names: str) -> None:
        for name in names:
            value, flag = getattr(self, name), name.replace("_", "-")
            _require(value >= 0, f"{name} must not be negative", f"{name}={value}", f"Try --{flag} 0.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Which text, how it is split and how it becomes tokens."""

    corpus: str = _field(
        "auto", "wikiqa, sample, auto (WikiQA if at hand, else the sample), hf:NAME, a file, folder or pattern"
    )
    question_column: str = _field("question", "column of the question in a csv, tsv, jsonl or parquet file")
    answer_column: str = _field("answer", "column of the answer")
    text_column: str = _field("", "column whose texts are records by themselves; the corpus then stays on disk")
    validation_fraction: float = _field(0.1, "share of questions held out for validation (no own splits)")
    test_fraction: float = _field(0.1, "share of questions held out for test (no own splits)")
    split_seed: int = _field(0, "seed of the split by question")
    tokenizer: str = _field("word", "lower-cased words, or byte-level BPE", choices=("word", "bpe"))
    min_count: int = _field(2, "occurrences in train that make a word (or a BPE merge) part of the vocabulary")
    bpe_vocab_size: int = _field(8000, "size of the vocabulary that BPE stops at")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.corpus), "corpus must be named", repr(self.corpus), "Try --corpus sample.")
        _require(
            self.question_column != self.answer_column,
            "question and answer must be two columns",
            f"{self.question_column!r} twice",
            f"Try --text-column {self.question_column}.",
        )
        self._fraction("validation_fraction", "test_fraction")
        total = self.validation_fraction + self.test_fraction
        _require(
            self.validation_fraction > 0,
            "validation_fraction must be above 0",
            f"validation_fraction={self.validation_fraction}",
            "Try --validation-fraction 0.1.",
        )
        _require(
            total < 1,
            "validation_fraction and test_fraction must leave text to train on",
            f"{total:g} together",
            "Try --validation-fraction 0.1 --test-fraction 0.1.",
        )
        self._positive("min_count")
        self._not_negative("split_seed")
        _require(
            self.bpe_vocab_size >= 257,
            "bpe_vocab_size must hold the 256 bytes and <unk>",
            f"bpe_vocab_size={self.bpe_vocab_size}",
            "Try --bpe-vocab-size 8000.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """The shape of the decoder. The size of the vocabulary is not here: it belongs to the vocabulary."""

    d_model: int = _field(512, "width of embeddings and of the residual stream")
    n_layers: int = _field(4, "decoder layers")
    n_heads: int = _field(8, "attention heads a layer; must divide d_model")
    d_ff: int = _field(2048, "width of the feed-forward layer")
    seq_len: int = _field(32, "window: tokens the model sees at once")
    dropout: float = _field(0.1, "share of activations dropped in training")
    activation: str = _field("relu", "nonlinearity of the feed-forward layer", choices=("relu", "gelu"))
    norm: str = _field("post", "layer norm after each sublayer, or before", choices=("post", "pre"))
    positions: str = _field("sinusoidal", "position signal", choices=("sinusoidal", "learned", "rotary"))
    tie_embeddings: bool = _field(False, "one matrix for the embedding and the output head")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("d_model", "n_layers", "n_heads", "d_ff", "seq_len")
        self._fraction("dropout")
        if self.d_model % self.n_heads:
            nearest = max(h for h in range(1, 9) if self.d_model % h == 0)
            raise UserError(
                f"n_heads must divide d_model: got d_model={self.d_model}, n_heads={self.n_heads}. "
                f"Try --n-heads {nearest}."
            )
        _require(
            self.positions != "sinusoidal" or self.d_model % 2 == 0,
            "sinusoidal positions need an even d_model",
            f"d_model={self.d_model}",
            "Try --positions learned.",
        )
        _require(
            self.positions != "rotary" or self.d_model // self.n_heads % 2 == 0,
            "rotary positions need heads of an even width",
            f"d_model={self.d_model}, n_heads={self.n_heads}",
            "Try --positions learned.",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """The recipe: optimiser, schedule, length, seed and precision."""

    optimizer: str = _field("adam", "Adam, or Muon for the layers' matrices beside it", choices=("adam", "muon"))
    lr: float = _field(1e-4, "peak learning rate")
    schedule: str = _field("constant", "lr after warm-up", choices=("constant", "cosine"))
    warmup_steps: int = _field(0, "steps over which lr rises from 0")
    weight_decay: float = _field(0.0, "decoupled decay of matrices (AdamW); 0 is plain Adam")
    clip_norm: float = _field(0.5, "largest norm of the whole gradient; larger ones are scaled down to it")
    batch_size: int = _field(32, "windows a step, of all processes together")
    micro_batch_size: int = _field(0, "windows a process takes at once, their gradients added up; 0: its whole share")
    epochs: int = _field(10, "passes over the training text, or stretches of --steps-per-epoch")
    steps_per_epoch: int = _field(0, "steps between measurements and checkpoints; 0: a pass over the training text")
    patience: int = _field(0, "stop after so many epochs without a better validation loss; 0 never does")
    seed: int = _field(0, "seed of weights, order and dropout")
    precision: str = _field("auto", "arithmetic of matrix products", choices=("auto", "fp32", "bf16"))
    device: str = _field("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    parallel: str = _field(
        "ddp", "under torchrun: weights whole in each process, or in shares (FSDP2)", choices=("ddp", "fsdp")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("lr", "clip_norm", "batch_size", "epochs")
        self._not_negative("warmup_steps", "weight_decay", "patience", "seed", "micro_batch_size", "steps_per_epoch")


SECTIONS: tuple[type[DataConfig], type[ModelConfig], type[TrainConfig]] = (
    DataConfig,
    ModelConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The three sections together; `flat` and `from_flat` are inverse."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    def flat(self) -> dict[str, Scalar]:
        """All fields in one dict, in the order of their declaration."""
        sections = (self.data, self.model, self.train)
        return {f.name: getattr(s, f.name) for s in sections for f in fields(s)}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Config:
        """Build from names to values; missing names take their default.

        Raises:
            UserError: a name that no section has (with the nearest one), or a value against its rule.
        """
        refuse_unknown(flat)
        parts = [section(**{f.name: flat[f.name] for f in fields(section) if f.name in flat}) for section in SECTIONS]
        data, model, train = cast(tuple[DataConfig, ModelConfig, TrainConfig], tuple(parts))
        return cls(data=data, model=model, train=train)

    @classmethod
    def from_text(cls, texts: Mapping[str, str]) -> Config:
        """Build from fields as `str` writes them, MLflow's params for one; names that no section has are left out.

        Raises:
            UserError: a text that is no value of its field, or a value against its rule.
        """
        kinds = {f.name: type(f.default) for section in SECTIONS for f in fields(section)}
        try:
            return cls.from_flat(
                {n: t == "True" if kinds[n] is bool else kinds[n](t) for n, t in texts.items() if n in kinds}
            )
        except ValueError as e:
            raise UserError(f"a logged config must be as it was written: got {e}. Try another run.") from e

    def override(self, changes: Mapping[str, Any]) -> Config:
        """A copy with some fields changed, checked again."""
        refuse_unknown(changes)
        parts = {
            name: replace(section, **{f.name: changes[f.name] for f in fields(section) if f.name in changes})
            for name, section in (("data", self.data), ("model", self.model), ("train", self.train))
        }
        return Config(**cast(dict[str, Any], parts))


def names() -> list[str]:
    """Names of all fields."""
    return [f.name for section in SECTIONS for f in fields(section)]


def refuse_unknown(given: Iterable[str]) -> None:
    """Raise UserError for the first name that is no field, with the nearest that is."""
    known = names()
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UserError(
                f"config has no field of that name: got {name!r}. "
                f"Try {near[0] if near else 'one of ' + ', '.join(known)}."
            )


PLACEMENT = ("device", "micro_batch_size", "parallel")
"""Fields that say where and in what parts a step is computed, and not what comes of it."""

PRESETS: dict[str, dict[str, Scalar]] = {
    "reference": {},
    "best": {
        "seq_len": 256, "batch_size": 8, "epochs": 3, "optimizer": "muon", "lr": 2e-3, "schedule": "cosine",
        "warmup_steps": 100, "weight_decay": 0.1, "clip_norm": 1.0, "dropout": 0.1, "norm": "pre", "activation": "gelu",
        "positions": "rotary", "tie_embeddings": True,
    },
    "tiny": {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 256, "tie_embeddings": True, "lr": 1e-3},
}  # fmt: skip
"""What each `--preset` changes against the defaults, which are the reference recipe."""
