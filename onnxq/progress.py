"""How long work tells how far it is. The library reports; only the command line draws."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

_QUIET_FIRST = 2.0
_EVERY = 0.2
_PLAIN_EVERY = 15.0


class Progress(Protocol):
    """Called as `progress(step, done, total)`; `total` is 0 while it is unknown."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """The default: say nothing."""


class ProgressLine:
    """Draws steps that last longer than two seconds: one live line on a terminal, else a plain
    line now and then. Nothing with `quiet`."""

    def __init__(self, stream: TextIO, live: bool, quiet: bool) -> None:
        self._stream, self._live, self._quiet = stream, live, quiet
        self._step, self._since, self._last = "", 0.0, 0.0
        self._first, self._drawn = 0, False

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step != self._step:
            self.close()
            self._step, self._since, self._last, self._first = step, now, now, done
        every = _EVERY if self._live else _PLAIN_EVERY
        if self._quiet or now - self._since < _QUIET_FIRST or now - self._last < every:
            return
        self._last, self._drawn = now, True
        text = f"{step}: {done} of {total}" if total else f"{step}: {now - self._since:.0f} s"
        if total and done > self._first:
            left = (now - self._since) / (done - self._first) * (total - done)
            text += f", {left:.0f} s left"
        self._stream.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Wipe the live line."""
        if self._drawn and self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._drawn = False


def progress_line(quiet: bool) -> ProgressLine:
    """Progress on standard error."""
    return ProgressLine(sys.stderr, sys.stderr.isatty(), quiet)
