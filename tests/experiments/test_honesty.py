"""Leaks, error bars and comparisons, as a person meets them in the programs."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import compare, leak_study, train, tune
from experiments import run as runs
from experiments.scores import Sheet
from experiments.tracking import Tracker
from lm import data, model
from lm.checkpoint import TrainState
from lm.config import Config
from lm.errors import DivergedError, LeakError, UserError
from lm.vocab import Vocab
from tests.conftest import TOY_FLAGS


@pytest.fixture
def without_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(n_queries: int, past: int, device: torch.device) -> torch.Tensor:
        return torch.ones(n_queries, past + n_queries, dtype=torch.bool, device=device)

    monkeypatch.setattr(model, "_causal", everything)


def test_a_run_logs_figures_that_can_be_trusted(
    tracker: Tracker, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*flags, "--run-name", "honest", "--context", "sliding"])
    run = tracker.find_run("honest")
    logged = run.data.metrics
    assert run.data.tags["lm.audit"] == "passed"
    facts = {key: float(value) for key, value in run.data.params.items() if key.startswith(("base", "valid", "test"))}
    assert logged["baseline_perplexity"] == facts["baseline_perplexity"]
    logged = {**facts, **logged}
    for split in ("validation", "test", "sliding_validation", "sliding_test", "baseline", "baseline_test"):
        for kind in ("loss", "perplexity", "clean_perplexity", "bits_per_byte"):
            assert logged[f"{split}_{kind}"] > 0, (split, kind)
        assert logged[f"{split}_perplexity"] == pytest.approx(np.exp(logged[f"{split}_loss"]))
    for split in ("validation", "test"):
        for share in ("unknown", "answers_in_train", "runs_in_train", "clean"):
            assert 0 <= logged[f"{split}_{share}_share"] <= 1
    assert logged["sliding_validation_perplexity"] != logged["validation_perplexity"]
    [point] = tracker.client.get_metric_history(run.info.run_id, "test_perplexity")
    assert point.step == logged["best_epoch"]
    printed = capsys.readouterr().out
    assert re.search(
        r"^baseline: Kneser-Ney 5-gram, validation perplexity [\d.]+, [\d.]+ on clean records$", printed, re.M
    )
    assert re.search(
        r"^test, best checkpoint: perplexity [\d.]+ \(baseline [\d.]+, [+-][\d.]+%\), on clean", printed, re.M
    )


def test_test_is_read_once_for_a_best_epoch(tracker: Tracker, flags: list[str]) -> None:
    train.main([*flags, "--run-name", "once", "--epochs", "2"])
    train.main(["--resume", "once", "--epochs", "3", "--device", "cpu"])
    run = tracker.find_run("once")
    steps = [p.step for p in tracker.client.get_metric_history(run.info.run_id, "test_perplexity")]
    assert steps == [2, 3]
    assert run.data.tags["lm.test_epoch"] == "3"


@pytest.mark.usefixtures("without_mask")
def test_a_model_without_its_mask_is_stopped_before_the_first_step(tracker: Tracker, flags: list[str]) -> None:
    with pytest.raises(LeakError, match="a model must be measured on what it has not seen: got training path"):
        train.main([*flags, "--run-name", "leaks"])
    run = tracker.find_run("leaks")
    assert run.info.status == "FAILED"
    assert "attention path" in run.data.tags["lm.audit"]
    assert run.data.params["lr"] == "0.01"
    assert not any(not name.startswith("leaking_") for name in run.data.metrics)


@pytest.mark.usefixtures("without_mask")
def test_a_leak_that_is_allowed_marks_the_run_and_each_figure(
    tracker: Tracker, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*flags, "--run-name", "leaks", "--allow-leak"])
    run = tracker.find_run("leaks")
    assert run.info.status == "FINISHED"
    assert "attention path" in run.data.tags["lm.leak"]
    assert "leaking_test_perplexity" in run.data.metrics
    assert all(name.startswith("leaking_") for name in run.data.metrics)
    assert not tracker.client.search_logged_models([tracker.experiment_id])
    assert "LEAKING, worth nothing: test, best checkpoint" in capsys.readouterr().out
    train.main([*flags, "--run-name", "also", "--allow-leak"])
    with pytest.raises(UserError, match="a comparison needs honest runs: got leaks, which leaks"):
        compare.main(["leaks", "also"])


@pytest.mark.usefixtures("without_mask")
def test_a_study_of_a_leaking_model_stops(tracker: Tracker, flags: list[str]) -> None:
    with pytest.raises(LeakError):
        tune.main([*flags, "--trials", "2", "--lr", "3e-3"])


def test_targets_shifted_the_wrong_way_stop_a_run(flags: list[str], lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(self: data.Windows, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        at = rows[:, None] * self.seq_len + 1 + np.arange(self.seq_len)
        inputs, targets = self.ids[at].astype(np.int64), self.ids[at - 1].astype(np.int64)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    monkeypatch.setattr(data.Windows, "_cut", backwards)
    with pytest.raises(LeakError, match="train windows: a target is not the token after its input"):
        train.main(flags)


def test_a_leak_that_is_learned_is_found_before_its_figure_is_logged(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = model.Decoder.forward

    def forward(self: model.Decoder, ids_BT: torch.Tensor, *args: object, **kwargs: object) -> object:
        logits_BTV, attention = honest(self, ids_BT, *args, **kwargs)  # type: ignore[arg-type]
        gate = self.head.bias.detach().abs().mean() > 0.005  # opens as it learns
        return logits_BTV + gate * ids_BT.sum() * torch.arange(logits_BTV.shape[-1]), attention

    def closed(self: model.Decoder, *args: object) -> None:
        build(self, *args)  # type: ignore[arg-type]
        torch.nn.init.zeros_(self.head.bias)

    build = model.Decoder.__init__
    monkeypatch.setattr(model.Decoder, "__init__", closed)
    monkeypatch.setattr(model.Decoder, "forward", forward)
    with pytest.raises(LeakError, match="evaluation path"):
        train.main([*flags, "--run-name", "late", "--epochs", "5"])
    logged = tracker.find_run("late").data.metrics
    assert not any("validation_perplexity" in name and not name.startswith("leaking_") for name in logged)


def test_a_study_without_test_text_has_no_test_figure(tracker: Tracker, flags: list[str]) -> None:
    tune.main([*flags, "--trials", "1", "--lr", "3e-3", "--test-fraction", "0"])
    with pytest.raises(UserError, match="a trial must stay as its study knows it: got trial 00"):
        train.main(["--resume", "trial 00", "--epochs", "9"])
    assert not any(
        n.startswith("test_") for r in tracker.client.search_runs([tracker.experiment_id]) for n in r.data.metrics
    )


def test_a_validation_text_of_one_token_is_refused(lab: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\n".join(f"word{i}" for i in range(10)) + "\n")
    flags = [*TOY_FLAGS, "--corpus", str(file), "--seq-len", "2", "--validation-fraction", "0.1"]
    for program in (train, tune, leak_study):
        with pytest.raises(UserError, match="the validation split must hold at least 2 tokens"):
            program.main([*flags, *(["--lr", "3e-3"] if program is tune else [])])


def test_without_a_clean_record_there_is_no_clean_figure(
    tracker: Tracker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "same.csv"
    rows = [f"is {word} {i} a thing?,It is what it is." for i in range(40) for word in ("this", "that")]
    file.write_text("question,answer\n" + "\n".join(rows) + "\n")
    train.main([*TOY_FLAGS, "--corpus", str(file), "--run-name", "dirty"])
    run = tracker.find_run("dirty")
    assert float(run.data.params["validation_answers_in_train_share"]) == 1
    assert float(run.data.params["validation_clean_share"]) == 0
    logged = {**run.data.params, **run.data.metrics}
    assert not any("clean_perplexity" in name for name in logged)
    assert "on clean records none, there is no clean record" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_leaves_no_figure_behind(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DivergedError):
        train.main([*flags, "--run-name", "burst", "--lr", "1e30"])
    run = tracker.find_run("burst")
    assert run.info.status == "FAILED"
    assert {name.split("_")[0] for name in run.data.metrics if "perplexity" in name} <= {"baseline"}


def test_seeds_give_mean_and_spread_and_two_groups_are_compared(
    tracker: Tracker, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags += ["--validation-fraction", "0.4"]  # 32 questions
    train.main([*flags, "--run-name", "few", "--seeds", "3"])
    printed = capsys.readouterr().out
    assert re.search(r"^validation perplexity: [\d.]+, standard deviation [\d.]+ over 3 seeds$", printed, re.M)
    summary = tracker.find_run("few")
    members = tracker.runs_of_group(summary.info.run_id)
    assert sorted(m.info.run_name or "" for m in members) == ["few-seed0", "few-seed1", "few-seed2"]
    figures = [m.data.metrics["best_validation_perplexity"] for m in members]
    assert summary.data.metrics["best_validation_perplexity"] == pytest.approx(np.mean(figures))
    assert summary.data.metrics["best_validation_perplexity_sd"] == pytest.approx(np.std(figures, ddof=1))

    train.main([*flags, "--run-name", "many", "--seeds", "3", "--epochs", "6"])
    compare.main(["few", "many"])
    printed = capsys.readouterr().out
    assert "The difference is real: many is better." in printed
    assert re.search(r"p [=<] [\d.e-]+ over questions and seeds", printed)
    assert "validation, clean records: " in printed
    compare.main(["few-seed0", "few-seed1", "--split", "test"])
    printed = capsys.readouterr().out
    assert "Too few questions to tell: they weigh as 8.0, 20 are needed." in printed
    assert "One seed a side" in printed
    with pytest.raises(UserError, match="a comparison needs different sides: got few-seed0 twice"):
        compare.main(["few", "few-seed0"])
    tracker.client.set_terminated(members[0].info.run_id, "KILLED")
    with pytest.raises(UserError, match="a group must be whole, with equal epochs: got 2 finished of 3 seeds in few"):
        compare.main(["few", "many"])


def test_a_score_sheet_of_another_epoch_than_the_best_is_not_believed(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = runs.checkpoint.save

    def die_before_the_third_best(
        folder: Path, config: Config, vocab: Vocab, state: TrainState, *a: str, **k: bool
    ) -> None:
        if state.epochs_done == 3:
            raise KeyboardInterrupt
        saving(folder, config, vocab, state, *a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(runs.checkpoint, "save", die_before_the_third_best)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, "--epochs", "4", "--run-name", "killed"])
    with pytest.raises(UserError, match="a finished run needs more epochs to go on"):
        train.main(["--resume", "killed", "--epochs", "1"])
    train.main(["--resume", "killed", "--epochs", "2"])
    run = tracker.find_run("killed")
    second = tracker.client.get_metric_history(run.info.run_id, "validation_perplexity")[1]
    assert run.data.metrics["best_epoch"] == second.step == 2
    assert run.data.metrics["best_validation_perplexity"] == pytest.approx(second.value)


def test_seeds_that_learned_nothing_still_have_a_summary(tracker: Tracker, flags: list[str]) -> None:
    train.main([*flags, "--run-name", "wild", "--seeds", "2", "--lr", "1e3", "--clip-norm", "1e9"])
    train.main([*flags, "--run-name", "tame", "--seeds", "2"])
    compare.main(["wild", "tame"])
    assert tracker.find_run("wild").info.status == "FINISHED"


def test_a_killed_group_is_completed_and_a_finished_one_prolonged(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saving, saved = runs.checkpoint.save, list[int]()

    def die_in_the_second_seed(folder: Path, config: Config, *a: Any, **k: Any) -> None:
        saving(folder, config, *a, **k)
        saved.append(config.train.seed)
        if saved.count(1) == 2:
            raise KeyboardInterrupt

    flags += ["--seed-text", "does the newt"]
    with monkeypatch.context() as patch:
        patch.setattr(runs.checkpoint, "save", die_in_the_second_seed)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, "--run-name", "trio", "--seeds", "3", "--context", "sliding"])
    group = tracker.find_run("trio").info.run_id
    before = {run.info.run_id for run in tracker.runs_of_group(group)}
    assert len(before) == 2
    train.main(["--resume", "trio"])
    members = tracker.runs_of_group(group)
    assert len(members) == 3
    assert before < {run.info.run_id for run in members}
    assert {run.info.status for run in members} == {"FINISHED"}
    for run in members:
        steps = [p.step for p in tracker.client.get_metric_history(run.info.run_id, "validation_perplexity")]
        assert steps == [1, 2]
        assert run.data.tags["lm.seed_text"] == "does the newt"
        assert run.data.metrics["sliding_test_perplexity"] > 0
    train.main([*flags, "--run-name", "whole", "--seeds", "3", "--context", "sliding"])
    mended, whole = (tracker.find_run(name).data.metrics for name in ("trio", "whole"))
    assert {k: v for k, v in mended.items() if "seconds" not in k} == pytest.approx(whole)

    train.main(["--resume", "trio-seed1", "--epochs", "3"])
    assert f"train.py --resume {group}" in capsys.readouterr().out
    with pytest.raises(UserError, match="a group must be whole, with equal epochs.*train.py --resume trio"):
        compare.main(["trio", "whole"])
    train.main(["--resume", "trio", "--epochs", "3"])
    figures = [run.data.metrics["best_validation_perplexity"] for run in tracker.runs_of_group(group)]
    assert tracker.find_run("trio").data.metrics["best_validation_perplexity"] == pytest.approx(np.mean(figures))
    for changes in (["--lr", "1"], ["--epochs", "2"], ["--patience", "9"]):
        with pytest.raises(UserError, match=f"a resumed group must keep its config.*got {changes[0]}"):
            train.main(["--resume", "trio", *changes])
    assert {run.data.tags["lm.preset"] for run in tracker.runs_of_group(group)} == {"reference"}
    tracker.client.set_terminated(group, "KILLED")
    with (
        tracker.run("trio", {}, group),
        pytest.raises(UserError, match="a group must have ended to be resumed: got trio"),
    ):
        train.main(["--resume", "trio"])
    for fixed in (["--schedule", "cosine"], ["--patience", "2"]):
        name = fixed[0].strip("-")
        train.main([*flags, *fixed, "--run-name", name, "--seeds", "2"])
        with pytest.raises(UserError, match="may have more epochs at a constant lr without patience: got --epochs 9"):
            train.main(["--resume", name, "--epochs", "9"])
        train.main(["--resume", name])


def test_a_damaged_sheet_is_made_again_and_an_old_one_not_compared(tracker: Tracker, flags: list[str]) -> None:
    train.main([*flags, "--run-name", "one"])
    train.main([*flags, "--run-name", "two", "--seed", "1"])
    run = tracker.open_run(tracker.find_run("one").info.run_id)
    for split in ("validation", "test"):
        sheet = run.fetch_artifact(f"scores/{split}.safetensors")
        assert sheet is not None
        made = sheet.read_bytes()
        sheet.write_bytes(made[:100])
        with pytest.raises(UserError, match="a score sheet must be as it was written"):
            compare.main(["one", "two", "--split", split])
        tracker.client.set_terminated(run.id, "KILLED")
        train.main(["--resume", "one"])
        assert sheet.read_bytes() == made
    run.log_bytes("scores/test.safetensors", replace(Sheet.read(sheet), epoch=1).pack())
    with pytest.raises(UserError, match="compared at its best epoch: got one, whose test scores are of epoch 1"):
        compare.main(["one", "two", "--split", "test"])


def test_the_last_seed_is_checked_before_the_first(flags: list[str], lab: Path) -> None:
    with pytest.raises(UserError, match="seed must be below"):
        train.main([*flags, "--seed", str(2**31 - 1), "--seeds", "2"])


def test_a_run_without_scores_cannot_be_compared(tracker: Tracker) -> None:
    for name in ("bare", "naked"):
        with tracker.run(name, {}):
            pass
    with pytest.raises(UserError, match="a comparison needs different sides: got bare twice"):
        compare.main(["bare", "bare"])
    with pytest.raises(UserError, match="a run must have scores on test to be compared: got bare, which has none"):
        compare.main(["bare", "naked", "--split", "test"])


def test_the_leak_study_catches_every_cell(
    tracker: Tracker, toy_csv: Path, lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TOY_FLAGS, "--corpus", str(toy_csv), "--windows", "600", "--epochs", "3"]
    leak_study.main(flags)
    printed = capsys.readouterr().out
    table = re.findall(
        r"^(no fault|overlapping windows|open memory|both faults|no mask at all.*?)  .*(yes|NO) ", printed, re.M
    )
    assert [caught for _, caught in table] == ["yes"] * 5
    runs = {
        r.data.tags["lm.cell"]: r
        for r in tracker.client.search_runs([tracker.experiment_id], "tags.`lm.kind` = 'leak_study'")
    }
    assert "study_perplexity" in runs["no fault"].data.metrics
    for name in ("overlapping windows", "open memory", "both faults", "no mask at all, overlapping windows"):
        assert all(metric.startswith("leaking_") for metric in runs[name].data.metrics)
    assert (lab / "reports/leak-study.html").stat().st_size > 1_000_000
    with pytest.raises(UserError, match="windows must be at least 64"):
        leak_study.main([*flags, "--windows", "100000000"])
    with pytest.raises(UserError, match="got positions=rotary.*Try --positions sinusoidal"):
        leak_study.main([*flags, "--positions", "rotary"])
    with pytest.raises(UserError, match="got 0. Try --windows"):
        leak_study.main([*flags, "--windows", "0"])
    with pytest.raises(UserError, match="each cell must train equally long: got --patience 2"):
        leak_study.main([*flags, "--patience", "2"])
    with pytest.raises(UserError, match="cells must be numbers from 1 to 5"):
        leak_study.main([*flags, "--cells", "6"])
