"""Outputs of a model in a temporary folder, for models that do not fit in memory side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.files import scratch

Array = NDArray[Any]


class Spool:
    """Outputs by (label, sample), each array a file; read back as memory maps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[tuple[str, int], dict[str, tuple[Path, np.dtype[Any]]]] = {}

    def put(self, label: str, sample: int, outputs: Mapping[str, Array]) -> None:
        """Write the outputs of one sample.

        Raises:
            OnnxqError: the temporary folder is full or cannot be written.
        """
        kept = {}
        for index, (name, array) in enumerate(outputs.items()):
            path = self._folder / f"{len(self._kept)}-{index}.npy"
            array = np.ascontiguousarray(array)
            try:
                np.save(path, array)
            except OSError as error:
                raise OnnxqError(
                    f"cannot keep outputs in {self._folder}: {error.strerror or error}",
                    "set TMPDIR to a folder with more space, or compare fewer samples",
                ) from error
            kept[name] = (path, array.dtype)
        self._kept[label, sample] = kept

    def get(self, label: str, sample: int) -> dict[str, Array]:
        """The outputs of one sample, mapped from disk."""
        found = {}
        for name, (path, dtype) in self._kept[label, sample].items():
            array = np.load(path, mmap_mode=None if dtype.hasobject else "r", allow_pickle=True)
            # .npy knows bfloat16 and the 8-bit floats as nameless bytes.
            found[name] = array if array.dtype == dtype else array.view(dtype)
        return found


@contextmanager
def spool() -> Iterator[Spool]:
    """A Spool whose folder is gone afterwards. The folder follows TMPDIR."""
    with scratch() as folder:
        yield Spool(folder)
