from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from experiments import chat, export, report
from experiments.tracking import Tracker
from lm import checkpoint
from lm.checkpoint import TrainState
from lm.config import Config
from lm.data import TokenizedCorpus
from lm.errors import UserError


@pytest.fixture
def folder(
    toy_config: Config, toy_text: TokenizedCorpus, new_state: Callable[[Config], TrainState], tmp_path: Path
) -> Path:
    checkpoint.save(tmp_path / "best", toy_config, toy_text.vocab, new_state(toy_config), "digest", False)
    return tmp_path / "best"


def logged(tracker: Tracker, folder: Path, audit: str = "passed") -> tuple[str, str]:
    with tracker.run("test", {"lm.audit": audit}) as run:
        model_id = export.log_model(
            tracker.client, run.id, folder, {"best_validation_perplexity": 7.5}, 2, ("toy", "abc")
        )
    return run.id, model_id


@pytest.fixture
def served(tracker: Tracker, folder: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.pyfunc.PyFuncModel:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    return mlflow.pyfunc.load_model(f"models:/{logged(tracker, folder)[1]}")


def test_a_logged_model_has_its_metrics_and_its_run(tracker: Tracker, folder: Path) -> None:
    run_id, model_id = logged(tracker, folder)
    [model] = tracker.client.search_logged_models([tracker.experiment_id])
    assert (model.model_id, model.source_run_id) == (model_id, run_id)
    assert model.metrics is not None
    assert [(m.key, m.value, m.step, m.dataset_name) for m in model.metrics] == [
        ("best_validation_perplexity", 7.5, 2, "toy")
    ]


def test_a_logged_model_holds_no_pickle_and_its_own_code(tracker: Tracker, folder: Path, lab: Path) -> None:
    logged(tracker, folder)
    files = [p.name for p in (lab / "artifacts" / "models").rglob("*") if p.is_file()]
    assert {"model.safetensors", "vocab.json", "config.json", "serving_model.py", "model.py"} <= set(files)
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".pth", ".bin"))]


def test_a_loaded_model_continues_text_and_repeats_itself_for_a_seed(
    served: mlflow.pyfunc.PyFuncModel,
) -> None:
    params = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    first, again = (served.predict(["does the otter", "the heron"], params=params) for _ in range(2))
    assert first == again
    assert [text.split()[:2] for text in first] == [["does", "the"], ["the", "heron"]]
    assert len(served.predict(["does the otter"])) == 1


@pytest.mark.parametrize(
    ("inputs", "params", "message"),
    [
        (["qwxz"], {}, "the seed text must hold a word of the vocabulary"),
        (["the"], {"temperature": -1.0}, "temperature must be 0"),
        (["the"], {"max_new_tokens": 0}, "max_new_tokens must be from 1 to 1,000: got 0"),
        (["the"] * 65, {}, "inputs must be 1 to 64: got 65"),
        (["the"] * 40, {"num_return_sequences": 2}, "num_return_sequences times inputs must be at most 64: got 80"),
        (["the " * 5000], {}, "an input must have at most 10,000 characters: got 20000"),
    ],
)
def test_a_bad_request_is_an_invalid_parameter(
    served: mlflow.pyfunc.PyFuncModel, inputs: list[str], params: dict[str, object], message: str
) -> None:
    with pytest.raises(MlflowException, match=message) as caught:
        served.predict(inputs, params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_the_champion_changes_for_a_better_model_or_another_corpus_only(tracker: Tracker, folder: Path) -> None:
    def register(perplexity: float, corpus: str) -> export.Champion:
        return export.register_champion(tracker.client, *logged(tracker, folder), perplexity, corpus)

    assert register(9.0, "a") == export.Champion("1", True, "validation perplexity 9.00")
    worse = register(9.5, "a")
    assert (worse.version, worse.moved) == ("1", False)
    assert worse.reason == "9.00 against 9.50 of version 2 on the same tokens"
    assert register(8.0, "a").version == "3"
    assert register(50.0, "b").version == "4"
    assert version_of(tracker, "champion") == "4"
    assert version_of(tracker, "challenger") == "3"


def version_of(tracker: Tracker, alias: str) -> str:
    return str(tracker.client.get_model_version_by_alias("lm", alias).version)


def test_a_champion_is_promoted_and_rolled_back_by_hand(
    tracker: Tracker, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="to roll back there must have been another champion: got none"):
        report.main(["--rollback"])
    with pytest.raises(UserError, match="one version must be chosen"):
        report.main(["--rollback", "--promote", "1"])
    export.register_champion(tracker.client, *logged(tracker, folder), 8.0, "a")
    export.register_champion(tracker.client, *logged(tracker, folder), 9.0, "a")
    assert (version_of(tracker, "champion"), version_of(tracker, "challenger")) == ("1", "2")
    report.main(["--promote", "2"])
    assert (version_of(tracker, "champion"), version_of(tracker, "challenger")) == ("2", "1")
    report.main(["--rollback"])
    assert (version_of(tracker, "champion"), version_of(tracker, "challenger")) == ("1", "2")
    assert "lm@champion is version 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="a version must be in the registry: got 9"):
        report.main(["--promote", "9"])


def test_a_model_that_leaks_is_no_champion(tracker: Tracker, folder: Path) -> None:
    leaking = logged(tracker, folder, "training path: the logits see the future")
    refused = export.register_champion(tracker.client, *leaking, 1.29, "a")
    assert refused == export.Champion(
        "none", False, "its audit must have passed: training path: the logits see the future"
    )
    assert tracker.client.search_model_versions("name = 'lm'") == []


def test_a_roll_back_goes_to_the_champion_before_and_not_to_one_that_lost(tracker: Tracker, folder: Path) -> None:
    for perplexity in (10.0, 9.0, 5000.0):
        export.register_champion(tracker.client, *logged(tracker, folder), perplexity, "a")
    assert (version_of(tracker, "champion"), version_of(tracker, "challenger")) == ("2", "3")
    assert export.roll_back(tracker.client) == "1"
    assert version_of(tracker, "champion") == "1"


def test_a_full_answer_tells_tokens_and_reasons(served: mlflow.pyfunc.PyFuncModel) -> None:
    [full] = served.predict(["does the otter"], params={"max_new_tokens": 4, "seed": 1, "return": "full"})
    assert full["finish_reason"] == "length"
    assert len(full["tokens"]) == len(full["log_probabilities"]) == 4
    assert full["text"].startswith(full["prompt"])
    assert full["prompt_perplexity"] > 1
    [text] = served.predict(["does the otter"], params={"max_new_tokens": 4, "seed": 1})
    assert text == full["text"]


def test_a_stream_gives_the_same_text_in_pieces(served: mlflow.pyfunc.PyFuncModel) -> None:
    params = {"max_new_tokens": 6, "seed": 1}
    pieces = list(served.predict_stream(["does the otter"], params=params))
    assert len(pieces) == 6
    assert ["does the otter" + "".join(pieces)] == served.predict(["does the otter"], params=params)


def test_chat_continues_lines_and_shows_candidates(
    tracker: Tracker, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export.register_champion(tracker.client, *logged(tracker, folder), 8.0, "a")
    typed = ["does the otter", "/next", "/set temperature=0", "", "/set warmth=1", "/what", "qwxz", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed) + "\n"))
    chat.main(["--max-new-tokens", "3", "--seed", "0"])
    printed = capsys.readouterr().out
    assert printed.count("does the otter") == 2
    assert printed.count("%  ") == 10
    assert "a parameter must be one of max_new_tokens, temperature, " in printed
    assert "a command must be /next, /set or /quit: got /what" in printed
    assert "the seed text must hold a word of the vocabulary" in printed
    with pytest.raises(UserError, match="the model must be in the registry: got models:/lm/77"):
        chat.main(["--model", "models:/lm/77"])


def test_the_champion_is_not_registered_twice(tracker: Tracker, folder: Path) -> None:
    run_id, model_id = logged(tracker, folder)
    assert export.register_champion(tracker.client, run_id, model_id, 9.0, "a").moved
    again = export.register_champion(tracker.client, run_id, model_id, 9.0, "a")
    assert again == export.Champion("1", False, "it is the champion already")
    export.register_champion(tracker.client, *logged(tracker, folder), 8.0, "a")
    assert export.register_champion(tracker.client, run_id, model_id, 9.0, "a").version == "2"
    assert len(tracker.client.search_model_versions("name = 'lm'")) == 2


def test_the_serve_command_does_not_show_a_password() -> None:
    assert "MLFLOW_TRACKING_URI=sqlite:////x.db " in export.serve_command("sqlite:////x.db")
    assert "MLFLOW_TRACKING_URI='sqlite:////my project/x.db' " in export.serve_command("sqlite:////my project/x.db")
    assert "secret" not in export.serve_command("http://user:secret@host")
