"""Seeds, device and precision: what the machine can do, decided once and said aloud.

Knows nothing of models or data.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
from collections.abc import Generator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from lm.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: a device that this machine or this build of torch does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if available[d])
    if not available[name]:
        raise UserError(f"device must be one that this machine has: got {name}. Try --device auto.")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are done by units of their own, rather than emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(unit)) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes bf16 where the processor has units for it, else fp32."""
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `precision`; weights and sums stay fp32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


def keep_memory() -> None:
    """From now on freed memory stays with the process, to be used again without the kernel's clearing of each page.

    A training step frees and takes a quarter of a gigabyte; glibc hands large pieces back to the kernel each time,
    which takes a sixth of the step. Elsewhere than on Linux with glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def telling_of_memory() -> Generator[None]:
    """What takes memory as it goes.

    Raises:
        MemoryError: there was not enough; torch says so in a RuntimeError.
    """
    try:
        yield
    except RuntimeError as e:
        if "DefaultCPUAllocator" not in str(e) and not isinstance(e, torch.OutOfMemoryError):
            raise
        raise MemoryError(
            f"a step must fit into memory: got {str(e).splitlines()[0][:120]}. Try --micro-batch-size 8."
        ) from e


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device, precision: torch.dtype) -> str:
    """One line: device, precision and threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    short = "bf16" if precision == torch.bfloat16 else "fp32"
    threads = f", {torch.get_num_threads()} threads of {os.cpu_count()}" if device.type == "cpu" else ""
    return f"{device.type} ({name}), {short}{threads}"
