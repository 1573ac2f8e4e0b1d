"""What README says can be typed, can be typed."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed import run

from experiments import captures, export, train
from lm.errors import UserError
from tests.conftest import TOY_FLAGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_the_first_two_commands_do_all_the_set_up() -> None:
    assert SHELL[:2] == ["make tune", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^tune: \$\(VENV\)/\.installed\n\t\$\(BIN\)/python experiments/tune\.py --trials 20$", makefile, re.M
    )
    assert re.search(r"^test: \$\(VENV\)/\.installed-dev$", makefile, re.M)


def test_every_program_command_runs_in_the_order_of_the_page(
    lab: Path, toy_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [shlex.split(line) for line in SHELL if line.startswith("python experiments/")]
    assert len(commands) >= 6
    for _, program, *argv in commands:
        name = Path(program).stem
        if name in ("ui", "bench", "chat") or "--promote" in argv:
            continue  # in test_mlflow_ui.py, test_bench.py and test_export.py
        module = importlib.import_module(f"experiments.{name}")
        if "--resume" not in argv and name in ("train", "tune"):
            # The command's own flags are parsed first, then made small enough for a test.
            argv += [*TOY_FLAGS, "--lr", "0.003", "--no-tie-embeddings", "--corpus", str(toy_csv)]
            argv += ["--trials", "2"] if name == "tune" else ["--epochs", "10"]
        if "--text-column" in argv:
            argv += ["--text-column", "answer", "--validation-fraction", "0.1", "--steps-per-epoch", "5"]
        if name == "leak_study":
            argv += [*TOY_FLAGS, "--corpus", str(toy_csv), "--windows", "600"]
        module.main(argv)
        assert capsys.readouterr().out


def test_the_torchrun_command_is_one_that_train_takes(lab: Path) -> None:
    [command] = [shlex.split(line) for line in SHELL if line.startswith("torchrun")]
    program = command.index("experiments/train.py")
    run.get_args_parser().parse_args(command[1:])
    with pytest.raises(UserError, match="seeds must be at least 1"):  # after all other flags were read
        train.main([*command[program + 1 :], "--seeds", "0"])


def test_the_serve_command_is_the_one_that_programs_print() -> None:
    served = next(line for line in SHELL if line.startswith("mlflow models serve"))
    assert served.removeprefix("mlflow ") in export.serve_command("sqlite:////x.db")


def test_the_request_is_the_one_that_the_model_takes() -> None:
    body = next(line for line in SHELL if line.startswith("curl")).split("-d '")[1].rstrip("'")
    assert set(re.findall(r'"(\w+)":', body)) == {"inputs", "params", "max_new_tokens", "temperature", "seed"}


def test_the_python_examples_name_what_is_there() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 3
    for module, name in re.findall(r"(checkpoint|generate)\.(\w+)\(", "".join(examples)):
        assert callable(getattr(importlib.import_module(f"lm.{module}"), name))
    for module, name in re.findall(r"from (experiments\.\w+) import (\w+)", "".join(examples)):
        assert callable(getattr(importlib.import_module(module), name))
    names = {*captures.History.__dataclass_fields__, *vars(captures.History)}
    assert set(re.findall(r"history\.(\w+)", "".join(examples))) <= names


def test_the_tree_names_every_file_and_no_other() -> None:
    [tree] = re.findall(r"## Tree\n\n```text\n(.*?)```", README, re.DOTALL)
    for package in ("lm", "experiments"):
        files = {p.stem for p in (ROOT / package).glob("*.py")} - {"__init__"}
        missing = {name for name in files - {"errors"} if not re.search(rf"\b{name}\b", tree)}
        assert not missing


def test_pictures_and_pages_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z]+@", README)
