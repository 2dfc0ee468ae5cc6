"""Run `onnxq` as a child process and account for it.

The peak is the child's own VmHWM: what wait4 gives counts the parent's memory at the fork too.
"""

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


def onnxq(*arguments: str | Path) -> Usage:
    """Run `onnxq ARGUMENTS` to its end.

    Raises:
        RuntimeError: it failed; the message is what it said last.
    """
    words = [sys.executable, "-m", "tools.bench.child", *map(str, arguments)]
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        child = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode()
    if child.returncode != 0:
        raise RuntimeError(f"onnxq {' '.join(words[3:])}: {text[-2000:]}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, int(text.split()[-1]))


def peak() -> int:
    """Bytes of this process's largest resident set so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _main() -> None:
    from onnxq.cli import main

    code = main(["-q", *sys.argv[1:]], standalone_mode=False)
    print(peak())
    sys.exit(code)


if __name__ == "__main__":
    _main()
