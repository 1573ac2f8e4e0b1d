"""Which process this is, in a form that others can check: host, pid and the moment it began."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from pathlib import Path


class TakenOverError(Exception):
    """Another process works on it by now: this one was not heard from for too long, and given up."""


def own_name() -> str:
    """`host:pid:start`; the start tells a process from a later one of the same pid."""
    return f"{_host()}:{os.getpid()}:{_started(os.getpid())}"


def parent_name() -> str:
    """The same of the process that started this one."""
    return f"{_host()}:{os.getppid()}:{_started(os.getppid())}"


def is_gone(name: str) -> bool:
    """Whether a process of this host has ended; False for those of other hosts, which cannot be seen from here."""
    host, _, rest = name.partition(":")
    pid, _, start = rest.partition(":")
    if host != _host() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(int(pid)) != start


def is_alive_here(name: str) -> bool:
    """Whether it is a process of this host that has not ended."""
    return name.partition(":")[0] == _host() and not is_gone(name)


@cache
def _host() -> str:
    """The machine's name; with its boot and its namespace of pids, so that containers of one name are told apart."""
    try:
        boot, pids = Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return platform.node()
    return f"{platform.node()}~{hashlib.sha256((boot + pids).encode()).hexdigest()[:8]}"


def _started(pid: int) -> str:
    """Start time in the kernel's ticks; empty where /proc is not, so that the pid alone decides."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
