import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lm import checkpoint
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus
from lm.errors import UserError

FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "vocab.json"]


@pytest.fixture
def folder(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState], tmp_path: Path
) -> Path:
    state = new_state(toy_config)
    state.model(torch.zeros(1, 8, dtype=torch.int64))[0].sum().backward()
    state.optimizers[0].step()
    state.epochs_done, state.best_nll, state.best_epoch = 3, 1.25, 2
    checkpoint.save(tmp_path / "last", toy_config, toy_text.vocab, state, "digest")
    return tmp_path / "last"


def test_a_checkpoint_needs_only_its_folder(folder: Path, toy_config: Config, toy_text: TokenizedCorpus) -> None:
    assert sorted(p.name for p in folder.iterdir()) == FILES
    loaded = checkpoint.load(folder)
    assert loaded.config == toy_config
    assert loaded.vocab.to_json() == toy_text.vocab.to_json()
    assert (loaded.state.epochs_done, loaded.state.best_nll, loaded.state.best_epoch) == (3, 1.25, 2)
    assert loaded.corpus_digest == "digest"
    assert len(loaded.state.optimizers[0].state) == len(list(loaded.state.model.parameters()))


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_in_half_is_refused(name: str, folder: Path) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a checkpoint('s files)? must be .*Try the run's other checkpoint") as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match="a checkpoint must be complete: got FileNotFoundError"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "edit",
    [
        {"sha256": []},
        {"sha256": {}},
        {"epochs_done": "3"},
        {"epochs_done": -5},
        {"best_nll": None},
        {"config": {"d_model": 32}},
        {"config": {"n_layer": 1}},
    ],
    ids=str,
)
def test_an_edited_checkpoint_is_refused(edit: dict[str, object], folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **edit}))
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_another_format_version_is_refused(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "format_version": 99}))
    with pytest.raises(UserError, match="a checkpoint must have format 2: got 99"):
        checkpoint.load(folder)


def test_a_save_that_dies_leaves_the_old_checkpoint(
    folder: Path, toy_config: Config, toy_text: TokenizedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = checkpoint.load(folder).state
    state.epochs_done = 4

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, toy_config, toy_text.vocab, state, "digest")
    assert checkpoint.load(folder).state.epochs_done == 3
    assert [p.name for p in folder.parent.glob(".last*")] == []


def test_a_process_that_dies_between_the_renames_loses_nothing(folder: Path) -> None:
    folder.rename(folder.with_name(".last.old"))
    assert checkpoint.load(folder).state.epochs_done == 3


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a checkpoint must be a folder with config\.json"):
        checkpoint.load(tmp_path)
