"""How long work tells how far it is. The library reports; only the command line draws."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as `progress(step, done, total)`; `total` is 0 while it is unknown."""

    def __call__(self, step: str, done: int, total: int) -> None: ...


def silent(step: str, done: int, total: int) -> None:
    """The default: say nothing."""
