"""What is promised beyond one process, at a size that a test can pay."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import bench, scale

SMALL = ["--d-model", "32", "--n-layers", "2", "--n-heads", "2", "--d-ff", "64"]


def measured(lab: Path, mode: str, *flags: str) -> dict[str, Any]:
    bench.main([mode, "--quick", *flags])
    return json.loads((lab / f"bench/{mode}.jsonl").read_text())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_QUICK_TOKENS", (3_000_000, 9_000_000))
    found = measured(lab, "corpus", *SMALL)
    less, more = found["3000000 tokens"], found["9000000 tokens"]
    for phase in ("tokenise_mib", "resume_mib"):  # what tokenising leaves free is in the other
        bytes_a_token = 2**20 * (more[phase] - less[phase]) / 6_000_000
        assert bytes_a_token < 8, phase  # its text alone has more, as objects of Python ten times that
    for values in (less, more):
        assert values["resume_seconds_to_tokens"] < values["seconds_to_tokens"] / 2  # the text is not read again
        losses = values["train_loss"]
        assert len(losses) == 4 and losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_one_process_and_two_have_equal_losses(lab: Path) -> None:
    found = measured(lab, "parallel", *SMALL, "--precision", "fp32")
    assert found["1 process, tokens a second"] > 0
    assert found["2 processes, largest difference of a loss"] < 1e-4


def test_light_workers_end_all_trials_and_are_counted(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_WORKERS", (2,))
    found = measured(lab, "workers")
    values = found["2 workers"]
    assert values["metrics_a_second"] == pytest.approx(values["epochs_a_second"] * len(scale._figures(0)))
    assert values["epochs_a_second"] == pytest.approx(values["trials_a_second"] * scale._TRIAL_EPOCHS)
    assert found["workers_of_a_minute"] == pytest.approx(60 * values["epochs_a_second"])
