"""Who works on which trial: claims that outlive killed processes, lost connections and restarted servers.

A trial keeps its number whatever happens to processes. It waits, or one process works on it and says so every few
seconds, or it is finished. One whose process died, or was not heard from for the grace period, waits again, with its
parameters, its reported epochs and its MLflow run; whoever takes it goes on from its last checkpoint. So a study's
total is the number of its trials.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import optuna
from filelock import Timeout
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import InterfaceError, OperationalError

from experiments.process import TakenOverError, is_gone, own_name
from experiments.steady import STUDY, keep_trying, refusal
from experiments.study import OWNER, REASON, RUN_ID, SHIFTS, Plans, best_value

T = TypeVar("T")
Lock = Callable[[], AbstractContextManager[None]]

_LASTING = ("disk is full", "No space left", "readonly database", "disk I/O error", "no such table")
_MOST_BARREN_DEATHS = 10
"""A trial fails for good when so many workers in a row died on it before an epoch was finished."""


@dataclass(frozen=True)
class Freed:
    """A trial whose process died or fell silent; it waits again, or has `failed` for good."""

    number: int
    run_id: str | None
    owner: str
    reason: str
    failed: bool


class Claims:
    """A study as one of the processes that work on it sees it."""

    def __init__(self, storage: optuna.storages.RDBStorage, name: str, plans: Plans, lock: Lock, worker: str):
        """`lock` is `store_lock`; `worker` is this process's name in the timeline."""
        self.storage, self.name, self._plans, self.lock, self._worker = storage, name, plans, lock, worker
        self._suspects: dict[int, float] = {}

    def study(self, seed: int = 0) -> optuna.Study:
        """The study as it stands now; a fresh object, since Optuna's own caches what other processes change."""
        return optuna.load_study(
            study_name=self.name,
            storage=self.storage,
            sampler=self._plans.new_sampler(seed),
            pruner=self._plans.new_pruner(),
        )

    def steady(self, call: Callable[[], T]) -> T:
        """Call, and again while the storage is away."""
        return keep_trying(call, is_passing, STUDY)

    def take(self, total: int, seed: int, draw: Callable[[Trial], Mapping[str, Any]]) -> Claim | None:
        """The next trial to work on: one that waits, or a new one while the study has fewer than `total`.

        What a trial draws follows from the seed, its number and the trials before it.

        Returns:
            None if there is none, finished ones and those of other processes aside.
        """
        found = self.steady(lambda: self._take(total, seed, draw))
        return Claim(self, *found) if found else None

    def _take(
        self, total: int, seed: int, draw: Callable[[Trial], Mapping[str, Any]]
    ) -> tuple[Trial, int, dict[str, Any], list[list[Any]]] | None:
        with self.lock():
            study = self.study()
            trials = study.get_trials(deepcopy=False)
            mine = [t for t in trials if t.state == TrialState.RUNNING and t.user_attrs.get(OWNER) == own_name()]
            waiting = [t for t in trials if t.state == TrialState.WAITING and t.number < total]
            free = mine or waiting  # it is mine already where the storage's answer was lost
            if not free:
                if len(trials) >= total:
                    return None
                study.add_trial(create_trial(state=TrialState.WAITING))
                free = study.get_trials(deepcopy=False)[-1:]
            number = free[0].number
            study = self.study(seed + number)
            study.get_trials(deepcopy=False)  # so that its storage knows the trial's number
            trial_id = self._id(number)
            done, now = max(free[0].intermediate_values, default=0), time.time()
            shifts = [*free[0].user_attrs.get(SHIFTS, []), [self._worker, now, now, done, done, ""]]
            self.storage.set_trial_user_attr(trial_id, OWNER, own_name())
            self.storage.set_trial_user_attr(trial_id, SHIFTS, shifts)
            self.storage.record_heartbeat(trial_id)
            self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            trial = Trial(study, trial_id)
            return trial, trial_id, dict(draw(trial)), shifts

    def release_dead(self) -> list[Freed]:
        """Let the trials of dead and of silent processes wait again.

        A process of this host is known to be gone at once. Others are given up when their heartbeat is older than
        the grace period in two looks more than two intervals apart: after an outage, or a laptop's sleep, all look
        old once.
        """
        return self.steady(self._release_dead)

    def _release_dead(self) -> list[Freed]:
        freed: list[Freed] = []
        with self.lock():
            study = self.study()
            # Optuna has no public way to ask; `fail_stale_trials` would end them.
            stale = self.storage._get_stale_trial_ids(  # pyright: ignore[reportPrivateUsage]
                self.storage.get_study_id_from_name(self.name)
            )
            now = time.monotonic()
            self._suspects = {trial_id: self._suspects.get(trial_id, now) for trial_id in stale}
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                owner, trial_id = trial.user_attrs.get(OWNER, ""), self._id(trial.number)
                silent = now - self._suspects.get(trial_id, now) > 2 * (self.storage.heartbeat_interval or 0)
                gone = not owner or is_gone(owner)  # an owner signs first: without one it is of an older program
                if owner == own_name() or not (gone or silent):
                    continue
                reason = "its worker died" if gone else "its worker was not heard from"
                freed.append(self._free(trial, trial_id, reason))
        return freed

    def _free(self, trial: FrozenTrial, trial_id: int, reason: str) -> Freed:
        shifts = trial.user_attrs.get(SHIFTS, [])
        if shifts:
            shifts = [*shifts[:-1], [*shifts[-1][:5], reason]]
        barren = 0
        for _, _, _, first, last, ended in reversed(shifts):
            if last > first or not ended:
                break
            barren += 1
        failed = barren >= _MOST_BARREN_DEATHS
        if failed:
            reason = f"{barren} workers in a row died in epoch {max(trial.intermediate_values, default=0) + 1}"
            self.storage.set_trial_user_attr(trial_id, REASON, reason)
        self.storage.set_trial_user_attr(trial_id, SHIFTS, shifts)
        self.storage.set_trial_state_values(trial_id, TrialState.FAIL if failed else TrialState.WAITING)
        return Freed(trial.number, trial.user_attrs.get(RUN_ID), trial.user_attrs.get(OWNER, ""), reason, failed)

    def trials(self) -> list[FrozenTrial]:
        """All trials as they stand now."""
        return self.steady(lambda: self.study().get_trials(deepcopy=False))

    def done(self) -> int:
        """How many trials have ended, however they did."""
        return sum(t.state.is_finished() for t in self.trials())

    def best(self) -> float:
        """The lowest perplexity that any trial has reported; infinite where none has."""
        return min((best_value(t) for t in self.trials()), default=math.inf)

    def _id(self, number: int) -> int:
        study_id = self.storage.get_study_id_from_name(self.name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, number)


class Claim:
    """A trial that this process works on, and says so until it is told or let go."""

    def __init__(
        self, claims: Claims, trial: Trial, trial_id: int, point: dict[str, Any], shifts: list[list[Any]]
    ) -> None:
        self._claims, self._trial, self._id, self._shifts = claims, trial, trial_id, shifts
        self.point = point
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    @property
    def number(self) -> int:
        """The trial's number, from 0; it stays whoever works on it."""
        return self._trial.number

    @property
    def reported(self) -> dict[int, float]:
        """Perplexities by epoch that were reported, by whichever process."""
        return self._claims.steady(lambda: dict(self._claims.storage.get_trial(self._id).intermediate_values))

    def _beat(self) -> None:
        storage = self._claims.storage
        while not self._over.wait(storage.heartbeat_interval):
            with suppress(Exception):  # an outage is seen, and waited for, where an answer is needed
                storage.record_heartbeat(self._id)

    def _require_mine(self) -> FrozenTrial:
        frozen = self._claims.storage.get_trial(self._id)
        if frozen.user_attrs.get(OWNER) != own_name() or frozen.state == TrialState.WAITING:
            raise TakenOverError(f"trial {self.number} was taken over: this process was not heard from for too long")
        return frozen

    def set_run(self, run_id: str) -> None:
        """Say which MLflow run the trial is."""
        self._claims.steady(lambda: self._claims.storage.set_trial_user_attr(self._id, RUN_ID, run_id))

    def report(self, values: Mapping[int, float]) -> None:
        """Report perplexities by epoch; those that were reported before stay.

        Raises:
            TakenOverError: the trial is another process's by now.
        """
        self._claims.steady(lambda: self._report(values))

    def _report(self, values: Mapping[int, float]) -> None:
        known = self._require_mine().intermediate_values
        for epoch in sorted(set(values) - set(known)):
            self._claims.storage.set_trial_intermediate_value(self._id, epoch, values[epoch])
        self._shifts[-1][4] = max({*values, *known}, default=0)
        self._sign()

    def _sign(self) -> None:
        self._shifts[-1][2] = time.time()
        self._claims.storage.set_trial_user_attr(self._id, SHIFTS, self._shifts)

    def should_prune(self) -> bool:
        """Whether the study's pruner would stop the trial at the epoch reported last."""

        def ask() -> bool:
            study = self._claims.study()
            trial = self._claims.storage.get_trial(self._id)
            return bool(trial.intermediate_values) and study.pruner.prune(study, trial)

        return self._claims.steady(ask)

    def complete(self) -> None:
        """Tell the trial with its best epoch's perplexity."""
        self._tell(TrialState.COMPLETE)

    def prune(self) -> None:
        """Tell the trial as pruned; its reported epochs stay."""
        self._tell(TrialState.PRUNED)

    def fail(self, reason: str) -> None:
        """Tell the trial as failed for good: its own parameters are the cause."""

        def say() -> None:
            if not self._require_mine().state.is_finished():
                self._claims.storage.set_trial_user_attr(self._id, REASON, reason)

        self._claims.steady(say)
        self._tell(TrialState.FAIL)

    def _tell(self, state: TrialState) -> None:
        def tell() -> None:
            with self._claims.lock():
                frozen = self._require_mine()
                if not frozen.state.is_finished():  # it is where the storage's answer was lost
                    self._sign()
                    value = best_value(frozen) if state == TrialState.COMPLETE else None
                    self._claims.study().tell(self.number, value, state)

        self._stop_beating()
        self._claims.steady(tell)

    def release(self) -> None:
        """Let the trial wait for whoever takes it next; where the storage is away, its heartbeat will tell."""
        self._stop_beating()
        with suppress(Exception), self._claims.lock():
            if self._require_mine().state == TrialState.RUNNING:
                self._sign()
                self._claims.storage.set_trial_state_values(self._id, TrialState.WAITING)

    def drop(self) -> None:
        """Let go of a trial that another process has taken over: say no more that this one works on it."""
        self._stop_beating()

    def _stop_beating(self) -> None:
        self._over.set()
        self._beats.join()


def is_passing(e: Exception) -> bool:
    """Whether a storage's error is one that time may mend: a lost connection, a locked database; not a full disk.

    A refused login comes as a lost connection does, and does not pass.
    """
    if refusal(e, STUDY):
        return False
    passing = any(isinstance(x, OperationalError | InterfaceError | Timeout) for x in (e, e.__cause__))
    said = f"{e} {e.__cause__}"
    return passing and not any(words in said for words in _LASTING)
