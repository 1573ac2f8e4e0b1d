import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli
from lm.config import Config, names
from lm.errors import DivergedError, UserError

ROOT = Path(__file__).parents[2]


def parsed(*argv: str) -> Config:
    parser = cli.Parser("test")
    cli.add_config_flags(parser)
    return cli.config_of(parser.parse(list(argv)))


def test_every_field_has_a_flag_of_its_name() -> None:
    parser = cli.Parser("test")
    cli.add_config_flags(parser)
    text = parser.format_help()
    assert all(f"--{name.replace('_', '-')}" in text for name in names())


def test_flags_win_over_the_preset_and_the_preset_over_defaults() -> None:
    assert parsed() == Config()
    assert parsed("--preset", "tiny").model.d_model == 64
    assert parsed("--preset", "tiny", "--d-model", "32", "--no-tie-embeddings").model.d_model == 32
    assert parsed("--preset", "tiny", "--no-tie-embeddings").model.tie_embeddings is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clip", "1"], "flags must be ones that --help lists: got --clip. Try --"),
        (["--n-layer", "1"], "got --n-layer. Try --n-layers."),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--activation", "swish"], "invalid choice: 'swish'"),
    ],
)
def test_a_wrong_flag_is_named_with_the_nearest_right_one(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("rule: got value. Try this."), 2, "rule: got value. Try this."),
        (DivergedError("loss must stay finite"), 1, "loss must stay finite"),
        (OSError(28, "No space left on device", "/x"), 2, "the disk must have room: got No space left on device: /x."),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), 2, "the disk must have room"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(fail)
    assert caught.value.code == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("program", ["train", "tune", "ui", "report", "compare", "leak_study", "bench", "chat"])
def test_help_is_quick_and_pays_for_no_library(program: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "experiments" / f"{program}.py"), "--help"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0
    assert time.perf_counter() - started < 3
    assert done.stdout.startswith("usage:")
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "mlflow", "optuna", "datasets", "plotly", "numpy"}


def test_nohup_is_respected() -> None:
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from experiments import cli;"
        "cli.run(lambda: os.kill(os.getpid(), signal.SIGHUP))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", code.replace("SIG_IGN", "SIG_DFL")], check=False).returncode == 130
