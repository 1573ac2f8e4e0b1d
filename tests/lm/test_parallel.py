"""Several processes train what one would have trained. Each case starts `torchrun` on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.parallel import Ranks

JOB = Path(__file__).with_name("ranks.py")
Figures = list[list[float]]


def train(n: int, changes: dict[str, object], folder: Path, name: str) -> Figures:
    """Epoch, step, train and validation loss and gradient norm of each epoch, trained by `n` processes."""
    out = folder / f"{name}.json"
    launcher = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command = [sys.executable, *launcher, str(JOB), json.dumps(changes), str(out), str(folder / f"checkpoint-{name}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(JOB.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def assert_equal_losses(found: Figures, expected: Figures) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row[2:4] == pytest.approx(other[2:4], abs=1e-4)
        assert row[4] == pytest.approx(other[4], rel=1e-3)


def test_two_processes_and_parts_of_a_batch_train_what_one_does(tmp_path: Path) -> None:
    """Over 200 steps with dropout; batches of seven windows, the last of a pass of one, which one process trains on."""
    alone = train(1, {}, tmp_path, "one")
    assert alone[-1][3] < alone[0][3] - 0.5
    assert_equal_losses(train(2, {"micro_batch_size": 2}, tmp_path, "two"), alone)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    unbroken = train(1, {"epochs": 2}, tmp_path, "unbroken")
    begun = train(2, {"epochs": 1}, tmp_path, "begun")
    assert_equal_losses(begun + train(1, {"epochs": 2}, tmp_path, "begun"), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "n"), [("ddp", 3), ("fsdp", 2)])
def test_processes_train_what_one_does_with_every_part_of_the_best_recipe(
    parallel: str, n: int, tmp_path: Path
) -> None:
    best = {"optimizer": "muon", "tie_embeddings": True, "norm": "pre", "positions": "rotary", "schedule": "cosine"}
    alone = train(1, {**best, "epochs": 2}, tmp_path, "one")
    assert_equal_losses(train(n, {**best, "epochs": 2, "parallel": parallel}, tmp_path, "many"), alone)


@pytest.mark.slow
def test_shares_of_weights_become_a_whole_checkpoint_and_shares_again(tmp_path: Path) -> None:
    """With uneven shares, in parts: as many passes in each process, or they would wait for each other for ever."""
    unbroken = train(1, {"epochs": 2}, tmp_path, "unbroken")
    found = train(2, {"epochs": 1, "parallel": "fsdp", "micro_batch_size": 3}, tmp_path, "shared")
    found += train(1, {"epochs": 2}, tmp_path, "shared")
    assert_equal_losses(found, unbroken)


@pytest.mark.parametrize(("n", "size"), [(7, 2), (1, 2), (32, 3), (2, 5)])
def test_shares_are_all_windows_once(n: int, size: int) -> None:
    shares = [Ranks(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
