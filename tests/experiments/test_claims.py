"""Who works on which trial, with processes that die, fall silent and come back."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from experiments import claims as claiming
from experiments.claims import Claim, Claims
from experiments.locks import store_lock
from experiments.process import TakenOverError, is_gone, own_name
from experiments.search_space import SPACE, suggest
from experiments.settings import Settings
from experiments.study import OWNER, REASON, SHIFTS, Plans, open_storage, open_study

GONE = "from experiments.process import own_name; print(own_name())"
POINT = {"n_layers": 4, "lr": 1e-4, "clip_norm": 0.5}


@pytest.fixture
def storage(lab: Path) -> RDBStorage:
    storage = open_storage(Settings.load().optuna_storage, heartbeat_seconds=1)
    open_study(storage, "test", POINT, 20)
    return storage


@pytest.fixture
def claims(storage: RDBStorage) -> Claims:
    settings = Settings.load()
    return Claims(storage, "test", Plans(), lambda: store_lock(settings), "here")


@pytest.fixture(scope="module")
def gone() -> str:
    """The name of a process of this host that has ended."""
    done = subprocess.run([sys.executable, "-c", GONE], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def works_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let this process go by another's name."""

    def change(name: str) -> None:
        monkeypatch.setattr(claiming, "own_name", lambda: name)

    return change


def take(claims: Claims, total: int = 20) -> Claim:
    claim = claims.take(total, 0, lambda trial: suggest(trial, SPACE))
    assert claim is not None
    return claim


def states(claims: Claims) -> list[str]:
    return [t.state.name for t in claims.trials()]


def test_the_total_is_the_number_of_trials_however_each_ends(
    claims: Claims, works_as: Callable[[str], None], gone: str
) -> None:
    for number, end in enumerate((Claim.complete, Claim.prune, lambda c: c.fail("diverged"), Claim.release)):
        claim = take(claims, total=4)
        assert claim.number == number
        claim.report({1: 10.0})
        end(claim)
    assert states(claims) == ["COMPLETE", "PRUNED", "FAIL", "WAITING"]
    again = take(claims, total=4)
    assert (again.number, again.reported) == (3, {1: 10.0})
    works_as("another:1:1")
    assert claims.take(4, 0, lambda trial: suggest(trial, SPACE)) is None
    assert len(claims.trials()) == 4


def test_a_trial_left_by_a_dead_process_goes_on_where_it_was(
    claims: Claims, works_as: Callable[[str], None], gone: str
) -> None:
    works_as(gone)
    left = take(claims)
    left.set_run("run of trial 0")
    left.report({1: 12.0, 2: 11.0})
    works_as(own_name())
    [freed] = claims.release_dead()
    assert (freed.number, freed.run_id, freed.owner, freed.failed) == (0, "run of trial 0", gone, False)
    again = take(claims)
    assert (again.number, again.point, again.reported) == (0, POINT, {1: 12.0, 2: 11.0})
    again.report({2: 99.0, 3: 10.0})  # what stands there stays
    again.complete()
    [trial] = claims.trials()
    assert (trial.value, trial.intermediate_values) == (10.0, {1: 12.0, 2: 11.0, 3: 10.0})
    assert [(first, last, ended) for _, _, _, first, last, ended in trial.user_attrs[SHIFTS]] == [
        (0, 2, "its worker died"),
        (2, 3, ""),
    ]


def test_what_a_trial_draws_does_not_depend_on_who_died(
    claims: Claims, works_as: Callable[[str], None], gone: str, storage: RDBStorage
) -> None:
    def study(name: str, dies: bool) -> list[dict[str, object]]:
        open_study(storage, name, POINT, 20)
        settings = Settings.load()
        mine = Claims(storage, name, Plans(), lambda: store_lock(settings), "here")
        points: list[dict[str, object]] = []
        for i in range(8):
            if dies:
                works_as(gone)
                take(mine)
                works_as(own_name())
                mine.release_dead()
            claim = take(mine)
            claim.report({1: 100.0 - i})
            claim.complete()
            points.append(claim.point)
        return points

    assert study("unbroken", dies=False) == study("broken", dies=True)


def test_a_process_that_was_given_up_loses_its_trial(claims: Claims, works_as: Callable[[str], None]) -> None:
    works_as("elsewhere:1:1")
    silent = take(claims)
    silent._over.set()
    assert claims.release_dead() == []  # another host's process cannot be seen; its heartbeat is fresh
    works_as(own_name())
    deadline, freed = time.monotonic() + 30, []
    while not freed and time.monotonic() < deadline:
        time.sleep(0.5)
        freed = claims.release_dead()
    assert [f.reason for f in freed] == ["its worker was not heard from"]
    mine = take(claims)
    mine.report({1: 5.0})
    works_as("elsewhere:1:1")
    with pytest.raises(TakenOverError, match="trial 0 was taken over"):
        silent.report({1: 6.0})
    with pytest.raises(TakenOverError):
        silent.complete()
    silent.release()
    works_as(own_name())
    assert states(claims) == ["RUNNING"]
    mine.complete()
    assert claims.trials()[0].value == 5.0


def test_a_heartbeat_that_looks_old_once_is_not_given_up(
    claims: Claims, works_as: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    works_as("elsewhere:1:1")
    living = take(claims)
    works_as(own_name())
    monkeypatch.setattr(claims.storage, "_get_stale_trial_ids", lambda _: [living._id])  # as after a laptop's sleep
    assert claims.release_dead() == []
    time.sleep(1)
    monkeypatch.undo()
    assert claims.release_dead() == []
    assert states(claims) == ["RUNNING"]


def test_a_trial_that_kills_every_worker_fails_at_last(
    claims: Claims, works_as: Callable[[str], None], gone: str
) -> None:
    works_as(gone)
    take(claims).report({1: 9.0})
    for _ in range(11):
        works_as(own_name())
        [freed] = claims.release_dead()
        if freed.failed:
            break
        works_as(gone)
        take(claims)
    [trial] = claims.trials()
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs[REASON] == "10 workers in a row died in epoch 2"


def test_an_answer_that_was_lost_changes_nothing(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    def lose_the_answer_of(name: str) -> None:
        whole = getattr(RDBStorage, name)
        lost = iter([True])

        def once(self: RDBStorage, *args: object, **kwargs: object) -> object:
            result = whole(self, *args, **kwargs)
            if next(lost, False):
                raise OperationalError("", None, Exception("server closed the connection unexpectedly"))
            return result

        monkeypatch.setattr(RDBStorage, name, once)

    for name in ("_create_new_trial", "set_trial_state_values", "set_trial_user_attr", "record_heartbeat"):
        lose_the_answer_of(name)
    claim = take(claims)
    lose_the_answer_of("set_trial_intermediate_value")
    claim.report({1: 4.0})
    lose_the_answer_of("set_trial_state_values")
    claim.complete()
    [trial] = claims.trials()
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.COMPLETE, 4.0, {1: 4.0})


def test_a_process_of_the_same_pid_that_began_later_is_another(gone: str) -> None:
    host, pid, start = own_name().rsplit(":", 2)
    assert not is_gone(f"{host}:{pid}:{start}")
    assert is_gone(f"{host}:{pid}:{int(start) - 1}")
    assert not is_gone(f"elsewhere:{pid}:{start}")
    assert not is_gone("")
    assert is_gone(gone)


def test_the_owner_is_kept_for_whoever_asks(claims: Claims) -> None:
    claim = take(claims)
    assert claims.trials()[0].user_attrs[OWNER] == own_name()
    claim.release()


def test_errors_that_pass_are_known_bare_and_wrapped() -> None:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import OperationalError

    for said, passes in (("server closed the connection", True), ("could not extend file: No space left", False)):
        driver = RuntimeError(said)
        bare = OperationalError("", None, driver)
        bare.__cause__ = driver
        wrapped = StorageInternalError("An exception is raised during the commit.")
        wrapped.__cause__ = bare
        assert claiming.is_passing(bare) == claiming.is_passing(wrapped) == passes


def test_a_trial_of_an_older_program_that_signed_nothing_is_set_free(claims: Claims) -> None:
    optuna.load_study(study_name="test", storage=Settings.load().optuna_storage).ask()
    [freed] = claims.release_dead()
    assert (freed.number, freed.owner, freed.run_id) == (0, "", None)
    assert claims.trials()[0].state == TrialState.WAITING
