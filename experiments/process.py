"""Which process this is, in a form that others can check: host, pid and the moment it began."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def own_name() -> str:
    """`host:pid:start`; the start tells a process from a later one of the same pid."""
    return f"{platform.node()}:{os.getpid()}:{_started(os.getpid())}"


def is_gone(name: str) -> bool:
    """Whether a process of this host has ended; False for those of other hosts, which cannot be seen from here."""
    host, _, rest = name.partition(":")
    pid, _, start = rest.partition(":")
    if host != platform.node() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(int(pid)) != start


def _started(pid: int) -> str:
    """Start time in the kernel's ticks; empty where /proc is not, so that the pid alone decides."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
