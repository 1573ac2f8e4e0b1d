"""The benchmark's arithmetic, what it prints and keeps, and that its rivals are what it says they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import bench, rivals
from lm.config import Config
from lm.errors import UserError

SMALL = ["--d-model", "16", "--n-layers", "2", "--n-heads", "2", "--d-ff", "32", "--batch-size", "4"]
SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "seq_len": 8, "dropout": 0.0}


def measured(mode: str, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(bench, mode, lambda *_: found)
    bench.main([mode, *SMALL, *flags])


def test_flops_are_six_a_weight_in_matrix_products_and_attention() -> None:
    network = rivals.literal_network(rivals.Job(Config.from_flat(SHAPE), 50))
    own = torch.nn.Linear(16, 50).weight.numel() + 2 * (4 * 16 * 16 + 2 * 16 * 32)
    assert bench.flops_a_token(Config.from_flat(SHAPE), 50) == 6 * own + 12 * 2 * 8 * 16
    assert network(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 50)


def test_the_writeups_network_cannot_see_the_future_here() -> None:
    network = rivals.literal_network(rivals.Job(Config.from_flat(SHAPE), 50)).eval()
    before = torch.arange(8)[None]
    after = before.clone()
    after[:, 5:] += 7
    torch.testing.assert_close(network(before)[:, :5], network(after)[:, :5])
    assert not torch.allclose(network(before)[:, 5:], network(after)[:, 5:])


def test_training_is_timed_in_one_object(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_QUICK_SECONDS", 1.0)
    bench.main(["train", "--quick", "--json", "--vocab-size", "500", *SMALL])
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert {"ratio_vs_literal", "ratio_vs_gpt2", "fraction_of_matmul_rate", "tokens_per_second"} <= set(found)
    assert set(found["versions"]) == {"torch", "transformers", "mlflow"}
    assert found["machine"]
    ours, literal = found["contestants"]["ours"], found["contestants"]["literal"]
    assert found["tokens_per_second"] == pytest.approx(4 * 32 / ours["seconds"])
    assert 0.1 < found["ratio_vs_literal"] / (literal["seconds"] / ours["seconds"]) < 10
    assert min(ours["peak_mib"], literal["peak_mib"]) > 50
    assert json.loads((lab / "bench/train.jsonl").read_text()) == found


def test_generation_is_timed_with_and_without_the_cache(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_QUICK_SECONDS", 1.0)
    bench.main(["generate", "--quick", "--vocab-size", "500", *SMALL])
    printed = capsys.readouterr().out
    assert "x without a cache after 12 tokens" in printed
    assert f"kept in  {lab / 'bench/generate.jsonl'}" in printed
    with pytest.raises(UserError, match=r"the window must hold 32 tokens: got seq_len=16. Try --seq-len 256"):
        bench.main(["generate", "--seq-len", "16"])


def test_a_ratio_that_fell_fails_the_check(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match="--check needs an earlier result of this shape, machine and these versions: got none in "
    ):
        measured("train", {"ratio_vs_gpt2": 1.5}, monkeypatch, "--check")
    assert not (lab / "bench").exists()
    for ratio in (1.4, 1.5, 1.6):
        measured("train", {"ratio_vs_gpt2": ratio, "tokens_per_second": 1.0}, monkeypatch)
    measured("train", {"ratio_vs_gpt2": 1.3, "tokens_per_second": 0.1}, monkeypatch, "--check")
    with pytest.raises(UserError, match=r"ratios must not fall: got ratio_vs_gpt2 1.20 against 1.45"):
        measured("train", {"ratio_vs_gpt2": 1.2}, monkeypatch, "--check")
    with pytest.raises(UserError, match="got none"):
        measured("train", {"ratio_vs_gpt2": 1.2}, monkeypatch, "--check", "--vocab-size", "99")
    with pytest.raises(UserError, match="vocab_size must be at least 2: got 1"):
        bench.main(["train", "--vocab-size", "1"])


@pytest.mark.slow
def test_programs_are_timed_until_they_help_train_and_serve(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["startup", "--quick", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert all(found[name] < 1 for name in found if name.startswith("help_"))
    assert 0 < found["first_step_seconds"] < 60
    assert 0 < found["served_echo_seconds"] < 100


@pytest.mark.slow
def test_a_study_is_held_against_the_writeups_loop(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["study", "--quick", "--json", *SMALL, "--epochs", "2", "--lr", "0.003"])
    found = json.loads(capsys.readouterr().out)
    assert found["trials"] == 4
    assert found["ratio_vs_literal"] == pytest.approx(found["literal_seconds"] / found["seconds"])
    assert 1 < found["perplexity"] < 2000
    assert 1 < found["literal_perplexity"] < 2000


@pytest.mark.slow
def test_growth_is_drawn(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["growth", "--quick", *SMALL])
    assert "n_layers" in capsys.readouterr().out
    assert "Plotly" in (lab / "reports/growth.html").read_text()


def test_a_flag_that_a_mode_does_not_read_is_refused(lab: Path) -> None:
    for argv, flag in ((["train", "--epochs", "3"], "--epochs"), (["startup", "--lr", "0.1"], "--lr")):
        with pytest.raises(UserError, match=f"a flag must be one that bench.py {argv[0]} reads: got {flag}"):
            bench.main(argv)
    with pytest.raises(UserError, match=r"--check needs ratios: got growth"):
        bench.main(["growth", "--check"])


def test_a_contestant_that_fails_says_why_in_one_line(lab: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"ours must be able to run here: got .*memory.* Try a smaller shape"):
        bench.main(["train", *SMALL, "--vocab-size", str(2**40)])
    assert "Traceback" not in capfd.readouterr().err
