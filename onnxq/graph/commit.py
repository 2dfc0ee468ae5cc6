"""Put a model and its data in place, so that whatever stops it leaves one model whole.

    data, model and folder reach the disk, in this order, each before the next step
    data -> its own name; model -> over the old one; then the data that no model refers to goes

A run that is killed between two steps leaves whole data of a model that is not there, or not any
more. Nobody could tell it from a file of the user's; so the names are written down first, in a file
beside the model, and the next run that writes this model does what the killed one could not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from onnxq.errors import OnnxqError
from onnxq.files import alone_in, flush, flush_folder, left_behind, locked_beside
from onnxq.graph.reading import data_locations

_JOURNAL_PREFIX = ".onnxq.journal-"
_LARGEST_MODEL = 1 << 31  # bytes; a larger file is none


def commit(files: list[tuple[Path, Path]], sources: Collection[Path]) -> None:
    """Rename each (temporary, target), the model last; remove data that no model reads any more.

    Under a lock: another run that replaces the same model would read which data is old while this
    one makes it new.

    Args:
        sources: the files of the input, which stay whatever happens.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = files[-1][1]
    for temporary, _ in files:
        flush(temporary)
    with alone_in(path.parent):
        _finish_killed(path)
        kept = {p.resolve() for p in sources}
        passing = [p for p in _own_data(path) if p.resolve() not in kept]
        passing += [target for _, target in files[:-1] if not target.exists()]
        with _remembered(path, passing):
            for temporary, target in files:
                temporary.replace(target)
                flush_folder(path.parent)


@contextlib.contextmanager
def _remembered(path: Path, data: list[Path]) -> Iterator[None]:
    """Write down which data the model at `path` gains or loses; at the end, remove what is left."""
    if not data:
        yield
        return
    with locked_beside(path, _JOURNAL_PREFIX) as journal:
        journal.write_text(json.dumps([p.name for p in data]))
        flush(journal)
        flush_folder(path.parent)
        try:
            yield
        finally:
            _remove_unread(path, [p.name for p in data])
            journal.unlink()  # not where the removal was interrupted: the next run goes on with it


def _finish_killed(path: Path) -> None:
    """Remove the data that killed runs have written down and no model reads."""
    for journal in left_behind(path, _JOURNAL_PREFIX):
        try:
            names = json.loads(journal.read_text())
        except (OSError, ValueError):
            names = []  # killed while it was written: before anything was renamed
        if isinstance(names, list):
            _remove_unread(path, [n for n in names if isinstance(n, str)])
        with contextlib.suppress(OSError):
            journal.unlink()


def _remove_unread(path: Path, names: list[str]) -> None:
    """Remove data files of the model at `path` that no model in its folder reads."""
    read = _read_beside(path)
    for name in names:
        if _is_own(path, name) and read is not None and name not in read:
            with contextlib.suppress(OSError):
                path.with_name(name).unlink(missing_ok=True)


def _read_beside(path: Path) -> set[str] | None:
    """The data that the model at `path` and those beside it read; None where one is closed to us.

    Those in other folders cannot be known; `save` names data for the model beside it.
    """
    found: set[str] = set()
    beside = {p for p in path.parent.glob("*.onnx*") if not p.name.startswith(".onnxq")}
    for model in {path, *(p for p in beside if not _is_own(path, p.name))}:
        if not model.is_file() or model.stat().st_size > _LARGEST_MODEL:
            continue
        if not os.access(model, os.R_OK):
            return None
        with contextlib.suppress(OnnxqError):  # what is no model reads nothing
            found |= data_locations(model)
    return found


def _own_data(path: Path) -> list[Path]:
    """Data files that the model now at `path` refers to and that an earlier `save` named."""
    try:
        names = data_locations(path)
    except OnnxqError:
        return []
    return [path.with_name(name) for name in sorted(names) if _is_own(path, name)]


def _is_own(path: Path, name: str) -> bool:
    return re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]{8}\.data", name) is not None
