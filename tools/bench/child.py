"""Run a command as a child process and account for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What a finished process took: seconds, and bytes of its largest resident set."""

    wall: float
    cpu: float
    peak: int


def run(*arguments: str, environment: dict[str, str] | None = None) -> Usage:
    """Run `python ARGUMENTS` to its end.

    Raises:
        RuntimeError: it failed; the message is what it said last.
    """
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(arguments)}: {said.read().decode()[-2000:]}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def onnxq(*arguments: str | Path) -> Usage:
    """Run `onnxq ARGUMENTS`."""
    return run("-m", "onnxq.cli", "-q", *map(str, arguments))
