"""Fixtures: a small text of our own making, a small model, and a laboratory in a temporary folder."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

from lm import data, runtime
from lm.checkpoint import TrainState
from lm.config import Config
from lm.corpus import load_corpus
from lm.data import TokenizedCorpus

if TYPE_CHECKING:
    from experiments.tracking import Tracker

TOY: dict[str, int | float | str | bool] = {
    "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "seq_len": 8, "epochs": 2, "lr": 1e-2,
    "precision": "fp32", "device": "cpu", "min_count": 1,
}  # fmt: skip
"""A model that trains in a blink; the rest is the recipe."""

TOY_FLAGS = [part for key, value in TOY.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def toy_rows() -> list[tuple[str, str]]:
    """80 questions with two answers each."""
    animals = ["otter", "heron", "badger", "newt", "magpie", "adder", "mole", "stoat"]
    places = ["river", "marsh", "forest", "field", "garden", "hill", "pond", "shore", "moor", "cave"]
    rows: list[tuple[str, str]] = []
    for animal in animals:
        for place in places:
            question = f"does the {animal} live in the {place}?"
            rows.append((question, f"Yes, the {animal} often lives near a {place}."))
            rows.append((question, f"No, the {place} is too cold for any {animal}."))
    return rows


@pytest.fixture
def toy_csv(tmp_path: Path) -> Path:
    """The toy text as a csv file with columns question and answer."""
    file = tmp_path / "toy.csv"
    lines = ["question,answer", *(f'"{q}","{a}"' for q, a in toy_rows())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def toy_config(toy_csv: Path) -> Config:
    """The toy model on the toy text."""
    return Config.from_flat({**TOY, "corpus": str(toy_csv)})


@pytest.fixture
def toy_text(toy_config: Config, tmp_path: Path) -> TokenizedCorpus:
    """The toy text as tokens."""
    corpus = load_corpus(toy_config.data, tmp_path / "cache")
    return data.tokenize(corpus, toy_config.data, tmp_path / "cache")


@pytest.fixture
def new_state(toy_text: TokenizedCorpus) -> Callable[[Config], TrainState]:
    """A fresh toy model for a config; equal seeds give equal weights."""

    def make(config: Config) -> TrainState:
        runtime.seed_everything(config.train.seed)
        return TrainState.new(config, len(toy_text.vocab), torch.device("cpu"))

    return make


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def blank(patch: pytest.MonkeyPatch) -> None:
    """Unset every place; an empty setting is unset also where the user's .env sets it."""
    for name in (
        "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "OPTUNA_STORAGE",
        "LM_ARTIFACT_ROOT", "LM_WIKIQA_DIR", "LM_WIKIQA_REVISION",
    ):  # fmt: skip
        patch.setenv(name, "")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both databases with their schemas, made once: creating them takes seconds."""
    from experiments import study
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    folder = tmp_path_factory.mktemp("empty-store")
    patch = pytest.MonkeyPatch()
    blank(patch)
    patch.setenv("LM_MLRUNS_DIR", str(folder))
    patch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    settings = Settings.load(Path(os.devnull))
    Tracker(settings)
    study.open_storage(settings.optuna_storage)
    patch.undo()
    return folder


@pytest.fixture
def lab(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty laboratory of its own: its folder, with the environment pointing to it."""
    folder = tmp_path / "mlruns"
    folder.mkdir()
    for name in ("mlflow.db", "optuna.db"):
        shutil.copy(empty_store / name, folder / name)
    blank(monkeypatch)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "lm")
    monkeypatch.setenv("LM_MLRUNS_DIR", str(folder))
    return folder


@pytest.fixture
def tracker(lab: Path) -> Tracker:
    """The empty laboratory's store."""
    from experiments.settings import Settings
    from experiments.tracking import Tracker

    return Tracker(Settings.load())


@pytest.fixture
def flags(toy_csv: Path) -> list[str]:
    """The toy model on the toy text, as a program takes them."""
    return [*TOY_FLAGS, "--corpus", str(toy_csv)]


@pytest.fixture(scope="session")
def wikiqa_dir() -> Path:
    """The real WikiQA files."""
    named = os.environ.get("LM_WIKIQA_DIR")
    if not named:
        pytest.skip("needs the WikiQA release: set LM_WIKIQA_DIR to its folder")
    return Path(named).resolve()
