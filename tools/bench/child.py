"""Run a command as a child process and account for it and all that it starts.

Between the caller and the command stands this file, run as a program of its own: what the kernel
tells of a child's peak counts its parent's memory at the fork too, and this one's is 15 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICK = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """What a finished process took.

    Attributes:
        wall: seconds by the clock.
        cpu: seconds of the CPU, user and system, of the process and all it started.
        peak: bytes of the largest resident set: of its largest process (exact, the kernel's), or
            of all of its processes together (looked at 50 times a second), whichever is more.
        code: exit code, negative for a signal; None where it was stopped for its time.
        said: the end of what it printed.
    """

    wall: float
    cpu: float
    peak: int
    code: int | None
    said: str


def measured(
    words: Sequence[str | Path],
    *,
    limit: float = 7200.0,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Usage:
    """Run a command to its end, or for `limit` seconds, and say what it took."""
    with tempfile.TemporaryDirectory() as scratch:
        result, output = Path(scratch, "usage.json"), Path(scratch, "output")
        meter = [sys.executable, "-I", "-S", __file__, str(result), str(limit)]
        with output.open("wb") as stream:
            subprocess.run(
                [*meter, *map(str, words)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                check=True,
            )
        said = output.read_bytes()[-20_000:].decode(errors="replace")
        return Usage(**json.loads(result.read_text()), said=said)


def onnxq(*arguments: str | Path) -> Usage:
    """Run `onnxq ARGUMENTS` to its end.

    Raises:
        RuntimeError: it failed; the message is what it said last.
    """
    usage = measured([sys.executable, "-m", "onnxq.cli", "-q", *arguments])
    if usage.code != 0:
        raise RuntimeError(f"onnxq {' '.join(map(str, arguments))}: {usage.said[-2000:]}")
    return usage


def peak() -> int:
    """Bytes of this process's largest resident set so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _meter(result: str, limit: str, *words: str) -> None:
    """Run `words`, write their usage as JSON to `result`."""
    started = time.monotonic()
    together = 0
    child = subprocess.Popen(words, start_new_session=True)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        wall = time.monotonic() - started
        if pid:
            break
        together = max(together, sum(map(_resident, _family(child.pid))))
        if wall > float(limit):
            os.killpg(child.pid, 9)
            _, status, usage = os.wait4(child.pid, 0)
            status = None
            break
        time.sleep(_TICK)
    content = {
        "wall": round(wall, 3),
        "cpu": round(usage.ru_utime + usage.ru_stime, 3),
        "peak": max(together, usage.ru_maxrss * 1024),
        "code": None if status is None else os.waitstatus_to_exitcode(status),
    }
    Path(result).write_text(json.dumps(content))


def _family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it has ended meanwhile
                continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    _meter(*sys.argv[1:])
