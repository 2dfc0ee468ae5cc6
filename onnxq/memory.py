"""How much memory this process holds, and how much the machine has left; sizes in words."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def megabytes(size: float) -> str:
    """`164.0 MB`, or `5.13 GB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def resident_memory() -> int:
    """Bytes this process holds in memory now; 0 where the system does not say (not Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most bytes this process ever held; 0 where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return 0


def trim_memory() -> None:
    """Give what was freed back to the system, where the C library does not do so by itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int | None:
    """Bytes that can still be taken without swapping; None where the system does not say.

    The smaller of the machine's and of the control group's: a container may own far less.
    """
    found = [size for size in (_machine(), _control_group()) if size is not None]
    return min(found, default=None)


def _machine() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit = int((root / "memory.max").read_text())  # "max" = no limit: ValueError
        used = int((root / "memory.current").read_text())
        statistics = (root / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    # The page cache of files counts as used, but is given back on demand.
    lines = [line.split() for line in statistics.splitlines()]
    cache = sum(int(value) for name, value in lines if name == "inactive_file")
    return limit - used + cache
