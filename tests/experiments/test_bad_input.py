"""What a person can get wrong: each is one line with rule, value and remedy, exit 2, and no traceback."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from experiments import cli, train, tune
from experiments.settings import Settings
from experiments.tracking import Tracker
from tests.conftest import TOY_FLAGS

ROOT = Path(__file__).parents[2]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], program: object = train) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: program.main(argv))  # type: ignore[attr-defined]
    assert caught.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert "Traceback" not in printed
    return printed.split(": ", 1)[1]


@pytest.mark.parametrize("program", [train, tune], ids=["train", "tune"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n-heads", "38"], "n_heads must divide d_model: got d_model=512, n_heads=38. Try --n-heads 8."),
        (["--lr", "0"], "lr must be a number above 0: got lr=0.0. Try --lr 0.0001."),
        (
            ["--clip-norm", "-1"],
            "clip_norm must be a number above 0: got clip_norm=-1.0. Try --clip-norm 0.5.",
        ),
        (
            ["--corpus", "/nowhere.csv"],
            "corpus must be wikiqa, sample, auto or an existing file: got /nowhere.csv.",
        ),
        (["--epoch", "3"], "flags must be ones that --help lists: got --epoch. Try --epochs."),
        (
            ["--corpus", "sample", "--seed-text", "qwxz vvv"],
            "the seed text must hold a word of the vocabulary",
        ),
        (["--device", "cuda"], "device must be one that this machine has: got cuda. Try --device auto."),
        (["--corpus", "sample", "--seq-len", "100000"], "the train split must hold at least 100001 tokens"),
    ],
)
def test_a_wrong_flag(
    program: object, argv: list[str], message: str, lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert fails(argv, capsys, program).startswith(message)
    assert not list((lab / "artifacts").glob("*/*"))  # nothing was begun


def test_an_empty_corpus_a_missing_column_and_a_file_that_is_not_text(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "columns.csv").write_text("q,a\nhow?,so\n")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n\0\0")
    assert fails(["--corpus", str(tmp_path / "empty.csv")], capsys).startswith("corpus must hold text: got the empty")
    missing = fails(["--corpus", str(tmp_path / "columns.csv")], capsys)
    assert missing.endswith("got 'question', it has q, a. Try --question-column q.")
    assert fails(["--corpus", str(tmp_path / "picture.csv")], capsys).startswith("corpus must be UTF-8 text")


def test_a_trial_zero_outside_the_space(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["--lr", "0.5"], capsys, tune).startswith("lr must lie in what is searched, 1e-05:0.003:log")
    assert fails(["--study", "it's"], capsys, tune).startswith(
        "study must be at most 60 letters, digits, dots and dashes"
    )
    assert fails(["--trials", "0"], capsys, tune).startswith("trials must be at least 1: got 0.")


def test_a_run_that_is_not_there(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["--resume", "nothing"], capsys).startswith("a run must be named by its id or name: got 'nothing'")


@pytest.mark.parametrize("place", ["/proc/no", "/dev/null/x"])
def test_a_store_that_cannot_be_written(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LM_MLRUNS_DIR", place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    for program in (train, tune):
        assert fails(["--corpus", "sample"], capsys, program).startswith("the store must be writable: got ")


def test_a_bad_flag_costs_the_shell_one_line_and_exit_2(toy_csv: Path, lab: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "experiments/train.py"),
        *TOY_FLAGS,
        "--corpus",
        str(toy_csv),
        "--n-heads",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "train.py: n_heads must divide d_model: got d_model=16, n_heads=3. Try --n-heads 8.\n"
    assert not list((lab / "artifacts").glob("*/*"))


@pytest.fixture
def small_disk(lab: Path) -> Generator[Path]:
    """The laboratory on a disk of 6 MB."""
    disk = lab.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        shutil.copytree(lab, disk / "mlruns")
        yield disk / "mlruns"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing_logged(
    small_disk: Path, toy_csv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LM_MLRUNS_DIR", str(small_disk))
    argv = [*TOY_FLAGS, "--corpus", str(toy_csv), "--d-model", "256", "--lr", "0.003"]
    for program in (train, tune):
        assert fails(argv, capsys, program).startswith("the disk must have room: got No space left on device")
    tracker = Tracker(Settings.load())
    runs = tracker.client.search_runs([tracker.experiment_id])
    assert [r.info.status for r in runs] == ["FAILED", "FAILED"]
    assert all("validation_perplexity" in r.data.metrics for r in runs)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as f:
        while True:
            f.write(bytes(1 << 12))
    assert fails(argv, capsys).startswith("the store must be writable: got No space left on device")
