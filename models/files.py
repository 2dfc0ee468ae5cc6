"""Where the scripts write, and how: to a temporary beside the target, renamed when complete.

A model may be several files (`model.onnx`, `model.onnx.data`, ...). `staged` moves `model.onnx`
last and takes an old one away first, so whoever finds a `model.onnx` finds the data that belongs to
it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT = Path(__file__).resolve().parent / "out"

_LAST = "model.onnx"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; when the block succeeds, move the files it left there to `folder`.

    When the block raises, the temporary is removed and `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield stage
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in stage.iterdir())
        if _LAST in names:
            (folder / _LAST).unlink(missing_ok=True)
            names.remove(_LAST)
            names.append(_LAST)
        for name in names:
            (stage / name).replace(folder / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def finished(*paths: Path, force: bool) -> bool:
    """Whether every one of `paths` exists and need not be rebuilt; says so when that is so."""
    if force or not all(path.exists() for path in paths):
        return False
    for path in paths:
        print(f"already there: {shown(path)} ({size(path)}); --force rebuilds")
    return True


def shown(path: Path) -> str:
    """The path as a user would type it: relative to the current folder where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def size(*paths: Path) -> str:
    """The files' size together, e.g. `538.1 MB` or `18.1 kB` (powers of ten)."""
    count = sum(path.stat().st_size for path in paths)
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
