"""Several processes of one study on this machine, with the cores shared out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.budget import Stop
from lm.errors import UserError

_GLANCE = 0.2
_MOST_RESTARTS = 10


def run(n: int, stop: Stop, argv: Sequence[str] | None) -> None:
    """Start `tune.py` n times over as workers, see them through, and start again those that are killed.

    Each is a session of its own, so that Ctrl-C reaches it through here alone, once for each time.

    Raises:
        UserError: a worker could not do what was asked; it has said why.
    """
    command = [sys.executable, str(Path(__file__).with_name("tune.py")), *(sys.argv[1:] if argv is None else argv)]
    # Fewer threads each: N processes that take all cores get in each other's way.
    threads = str(max(1, (os.cpu_count() or 1) // n))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}

    def start(number: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--worker", str(number)], env=environment, start_new_session=True)

    print(f"{n} workers of {threads} {'thread' if threads == '1' else 'threads'} each", flush=True)
    workers = {number: start(number) for number in range(1, n + 1)}
    restarts, told, failed = 0, False, False
    try:
        while workers:
            time.sleep(_GLANCE)
            for number, worker in list(workers.items()):
                code = worker.poll()
                if code is None:
                    continue
                del workers[number]
                if code < 0 and not stop.wished and restarts < _MOST_RESTARTS:
                    restarts += 1
                    print(f"worker {number} was killed by signal {-code}; another goes on", flush=True)
                    workers[number] = start(number)
                elif code > 0 and code != 130:
                    failed = True
            if (stop.wished or failed) and not told:
                told = True
                _send(workers, signal.SIGINT)
    except BaseException:
        _send(workers, signal.SIGTERM)
        for worker in workers.values():
            worker.wait()
        raise
    if failed:
        raise UserError("a study needs workers that can work: got one that stopped (see above). Try what it says.")


def _send(workers: dict[int, subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers.values():
        worker.send_signal(number)
