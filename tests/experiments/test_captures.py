from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import captures, compare, train, tune
from experiments import text as texts
from experiments.captures import Capture, load_attention
from experiments.tracking import ATTENTION_MEASURES, TrackedRun, Tracker
from lm import attention, checkpoint
from lm.errors import UserError
from tests.experiments.test_plots import HTML_LIKE, history


def one(epoch: int = 1) -> Capture:
    made = history(n=9)
    maps = {"validation 1": attention.AttentionMap(made.tokens["validation 1"], made.weights["validation 1"][0])}
    return captures.take(epoch, maps, list(maps), None, {"induction": np.ones((2, 3))})


def test_a_capture_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = one()
    (tmp_path / "c.safetensors").write_bytes(made.pack())
    read = Capture.read(tmp_path / "c.safetensors")
    assert read.epoch == 1
    assert read.tokens["validation 1"][:4] == HTML_LIKE
    np.testing.assert_array_equal(read.weights["validation 1"], made.weights["validation 1"])
    assert set(read.measures) == {*attention.measures(np.eye(3)), "agreement", "induction"}
    for name, values in made.measures.items():
        np.testing.assert_array_equal(read.measures[name], values)
    (tmp_path / "c.safetensors").write_bytes(made.pack()[:300])
    with pytest.raises(UserError, match="an attention file must be as it was written"):
        Capture.read(tmp_path / "c.safetensors")


def test_a_run_keeps_the_attention_of_each_epoch(
    tracker: Tracker, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["does the <script> zebra swim?", "the otter " * 20]
    train.main([*flags, "--run-name", "seen", "--epochs", "3", *[x for text in own for x in ("--probe", text)]])
    printed = capsys.readouterr().out
    assert "probe 1: 5 of its words are not in the vocabulary and stand as <unk>" in printed
    assert "probe 2: the first 8 of its 40 tokens are kept" in printed
    made = load_attention("seen")
    assert made.epochs == [0, 1, 2, 3]
    assert list(made.tokens) == ["validation 1", "validation 2", "probe 1", "probe 2"]
    assert made.tokens["probe 2"] == ["the", "otter"] * 4
    for name, weights in made.weights.items():
        n = len(made.tokens[name])
        assert weights.shape == (4, 2, 2, n, n)
        np.testing.assert_allclose(weights.astype(float).sum(-1), 1, atol=n * 2**-11)
        assert not np.triu(weights, 1).any()
    run = tracker.open_run(tracker.find_run("seen").info.run_id)
    last = checkpoint.load(run.fetch_checkpoint("last"))
    ids = last.vocab.encode("the otter " * 4)
    own_map = attention.attention_map(last.state.model, last.vocab, ids).weights_LHTS
    np.testing.assert_allclose(made.weights["probe 2"][3], own_map, rtol=2**-11, atol=2**-25)

    logged = run.metrics()
    assert logged["attention_entropy/layer2_head1"] == pytest.approx(made.measures["entropy"][3, 1, 0])
    assert logged["attention/change"] == pytest.approx(made.measures["change"][3].mean())
    assert made.measures["change"][2].mean() == pytest.approx(
        np.mean(
            [
                attention.divergence(made.weights[name][1].astype(np.float32), made.weights[name][2].astype(np.float32))
                for name in ("validation 1", "validation 2")
            ]
        ),
        rel=1e-5,
    )
    steps = [p.step for p in tracker.client.get_metric_history(run.id, "attention_induction/layer1_head1")]
    assert steps == [0, 1, 2, 3]
    assert set(made.measures) == set(ATTENTION_MEASURES)
    assert run.tags()["lm.attention"] == made.verdict()
    assert f"attention {made.verdict()}" in printed
    assert run.fetch_artifact("attention.html") is not None
    assert run.fetch_artifact("attention/epoch_003.html") is not None


def test_a_resumed_run_has_the_attention_of_an_unbroken_one(
    tracker: Tracker, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags += ["--epochs", "3", "--probe", "the otter"]
    train.main([*flags, "--run-name", "whole"])
    saving = TrackedRun.log_page

    def die(self: TrackedRun, path: str, content: str) -> None:
        if path == "attention/epoch_002.html":
            raise KeyboardInterrupt
        saving(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(TrackedRun, "log_page", die)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, "--run-name", "broken"])
    train.main(["--resume", "broken"])
    whole, broken = load_attention("whole"), load_attention("broken")
    assert whole.epochs == broken.epochs
    for name in whole.weights:
        np.testing.assert_array_equal(whole.weights[name], broken.weights[name])
    for name in whole.measures:
        np.testing.assert_array_equal(whole.measures[name], broken.measures[name])
    run = tracker.find_run("broken")
    for name in ("attention/change", "attention_entropy/layer1_head1"):
        steps = [p.step for p in tracker.client.get_metric_history(run.info.run_id, name)]
        assert steps == ([0] if "entropy" in name else []) + [1, 2, 3]


def test_a_resumed_run_keeps_its_probes_and_outlives_a_lost_capture(tracker: Tracker, flags: list[str]) -> None:
    train.main([*flags, "--run-name", "kept", "--probe", "the otter"])
    for other in (["the newt"], ["the otter", "the newt"]):
        with pytest.raises(UserError, match="a resumed run must keep its probes: got .*, it has ."):
            train.main(["--resume", "kept", "--epochs", "3", *[x for text in other for x in ("--probe", text)]])
    run = tracker.open_run(tracker.find_run("kept").info.run_id)
    lost = run.fetch_artifact("attention/epoch_002.safetensors")
    assert lost is not None
    lost.write_bytes(b"damaged")
    with pytest.raises(UserError, match="an attention file must be as it was written.*Try removing it"):
        train.main(["--resume", "kept", "--epochs", "4"])
    lost.unlink()
    train.main(["--resume", "kept", "--epochs", "4"])
    made = load_attention("kept")
    assert made.epochs == [0, 1, 3, 4]
    assert made.verdict() == "not measured: the maps of an epoch are missing"
    assert [bool(np.isnan(x).any()) for x in made.measures["change"]] == [True, False, True, False]
    steps = [p.step for p in tracker.client.get_metric_history(run.id, "attention/change")]
    assert steps == [1, 2, 4]


def test_more_text_than_a_tag_holds_is_refused(tracker: Tracker, flags: list[str]) -> None:
    with pytest.raises(UserError, match="probes must have at most 5,000 characters together: got 6,004"):
        train.main([*flags, "--probe", "ж" * 6000])


def test_captures_of_other_texts_are_not_joined() -> None:
    made = one()
    other = replace(made, epoch=2, tokens={"validation 1": ["x"] * 9})
    with pytest.raises(UserError, match="attention over epochs must be of the same texts: got others in r"):
        captures.join("r", [made, other])


def test_a_group_is_shown_by_its_first_seed(tracker: Tracker, flags: list[str], lab: Path) -> None:
    for name, more in (("wide", []), ("deep", ["--n-layers", "3"])):
        train.main([*flags, "--run-name", name, "--seeds", "2", *more])
    train.main(["--resume", "deep", "--epochs", "3"])
    compare.main(["wide", "deep"])
    page = (lab / "reports/compare-wide-seed0-and-deep-seed0.html").read_text("utf-8")
    assert "<td class=words>n_layers</td><td>2</td><td>3</td>" in page
    assert "<td class=words>epochs</td><td>2</td><td>3</td>" in page
    assert "<td class=words>seed</td>" not in page


def test_comparing_writes_one_page_and_logs_it(
    tracker: Tracker, flags: list[str], lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*flags, "--run-name", "a <b>"])
    train.main([*flags, "--run-name", "deep", "--n-layers", "3"])
    train.main([*flags, "--run-name", "short", "--seq-len", "6"])
    capsys.readouterr()
    compare.main(["a <b>", "deep"])
    page = (lab / "reports/compare-a-b-and-deep.html").read_text("utf-8")
    assert "<td class=words>n_layers</td><td>2</td><td>3</td>" in page
    assert "a &lt;b&gt;: perplexity" in page
    assert "a <b>" not in page.split('<script id="payload"')[0]
    [run] = tracker.client.search_runs([tracker.experiment_id], "tags.`lm.kind` = 'comparison'")
    assert tracker.open_run(run.info.run_id).fetch_artifact("report.html") is not None
    compare.main(["a <b>", "deep", "short"])
    printed = capsys.readouterr().out
    assert printed.count("validation, all records") == 3
    assert "no page of their attention: attention can be compared on equal tokens at equal epochs: got none" in printed
    with pytest.raises(UserError, match="a comparison needs two sides: got deep alone"):
        compare.main(["deep"])


def test_a_run_without_attention_says_so(
    tracker: Tracker, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        tracker.run("bare", {}),
        pytest.raises(UserError, match="a run must have attention files to be shown: got bare"),
    ):
        load_attention("bare")
    for name in ("old", "new"):
        train.main([*flags, "--run-name", name])
    run = tracker.open_run(tracker.find_run("old").info.run_id)
    for epoch in (0, 1, 2):
        file = run.fetch_artifact(f"attention/epoch_{epoch:03d}.safetensors")
        assert file is not None
        file.unlink()
    compare.main(["old", "new"])
    assert "no page of their attention: a run must have attention files to be shown: got old" in capsys.readouterr().out


def test_a_probe_without_a_word_is_refused_and_studies_have_probes_too(tracker: Tracker, flags: list[str]) -> None:
    for program in (train, tune):
        with pytest.raises(UserError, match="a probe must hold a word: got '  '"):
            program.main([*flags, "--lr", "3e-3", "--probe", "  "])
    tune.main([*flags, "--trials", "1", "--lr", "3e-3", "--probe", "the otter"])
    assert load_attention("trial 00").tokens["probe 1"] == ["the", "otter"]


def test_probes_begin_where_a_record_begins_and_are_the_same_for_every_run(toy_csv: Path, lab: Path) -> None:
    from experiments.settings import Settings
    from lm.config import Config

    config = Config.from_flat({"corpus": str(toy_csv), "min_count": 1, "seq_len": 8})
    text = texts.read_text(config.data, Settings.load())
    made = texts.probes(text, config)
    assert made == texts.probes(text, config.override({"seed": 5, "n_layers": 2}))
    for ids in made.values():
        assert text.tokens.vocab.decode(ids).startswith("does the")
        assert len(ids) == 8
    n = len(text.tokens.ids["validation"])
    assert n > 256
    long = texts.probes(text, config.override({"seq_len": 100_000}), ["the otter " * 400])
    assert {len(ids) for ids in long.values()} == {256}
    assert texts.check_probes(text, config.override({"seq_len": n}), ["the otter " * 400]) == [
        "probe 1: the first 256 of its 800 tokens are kept"
    ]
