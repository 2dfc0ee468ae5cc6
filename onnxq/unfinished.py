"""What a run has finished, beside its output, for another that goes on where it was stopped.

A folder `<output>.unfinished` holds what the run was made of (the model, the data, the recipe) and
a file for each finished part. It goes when the output is written. A run of anything else is
refused there: what it holds took long to make.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.files import replacing, reporting, take, write_json

if TYPE_CHECKING:
    from onnxq.calibrate.table import CalibrationTable

Arrays = Mapping[str, NDArray[Any]]

T = TypeVar("T")


class Unfinished:
    """Finished parts; without a folder nothing is kept.

    Attributes:
        found: how many parts an earlier run had finished.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.found = 0

    def part(
        self,
        name: str,
        make: Callable[[], T],
        keep: Callable[[T], Arrays],
        read: Callable[[Arrays], T],
    ) -> T:
        """The part of that name: from an earlier run, or made now and kept.

        Args:
            keep: gives its arrays.
            read: the other way; any exception means that these are not the part's.
        """
        if self._folder is None:
            return make()
        path = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"
        try:
            with np.load(path) as file:
                found = read(dict(file))
        except Exception:  # not there, or damaged: of what numpy, zipfile and json raise, anything
            made = make()
        else:
            self.found += 1
            return found
        with replacing(path) as (temporary,), temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **keep(made))
        return made

    def table(
        self,
        make: Callable[[], CalibrationTable],
        fingerprint: str,
        watched: Mapping[str, str],
    ) -> CalibrationTable:
        """The calibration table: from an earlier run, or made now and kept.

        Args:
            watched: what it must have, as `CalibrationTable.require` takes it.
        """
        from onnxq.calibrate.table import load_table

        if self._folder is None:
            return make()
        path = self._folder / "calibration.npz"
        if path.exists():
            try:
                found = load_table(path)
                found.require(fingerprint, watched)
            except OnnxqError:  # damaged
                pass
            else:
                self.found += 1
                return found
        made = make()
        made.save(path, compressed=False)
        return made


@contextmanager
def unfinished_beside(output: Path, run: Mapping[str, Any]) -> Iterator[Unfinished]:
    """The finished parts of `run`, which names all that its results depend on.

    At the end the output is written and they go; if it is not reached they stay.

    Raises:
        OnnxqError: there are those of another run, or one is at work there.
    """
    folder = output.with_name(f"{output.name}.unfinished")
    with reporting(folder):
        folder.mkdir(exist_ok=True)
        lock = (folder / "lock").open("w")
    with lock:
        if not take(lock.fileno()):
            raise OnnxqError(f"another run is at work in {folder}", "wait until it ends")
        about = folder / "run.json"
        if about.exists():
            _refuse_another(about, run)
        else:
            write_json(about, dict(run))
        yield Unfinished(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_another(about: Path, run: Mapping[str, Any]) -> None:
    try:
        theirs = dict(json.loads(about.read_text()))
    except (OSError, ValueError, TypeError):
        theirs = {}
    other = [name for name in run if theirs.get(name) != run[name]]
    if other:
        raise OnnxqError(
            f"{about.parent} holds the unfinished run of another {', another '.join(other)}",
            "remove that folder to start anew, or leave out --resume",
        )
