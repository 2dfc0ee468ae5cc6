"""What later pieces of a model read of earlier ones, on disk: a file a tensor and sample."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError

Array = NDArray[Any]


class Frontier:
    """Tensors by name and sample, in a new folder.

    Attributes:
        dtypes: of the tensors that are held.
        written: bytes, of all there ever were.
    """

    def __init__(self, folder: Path, hint: str) -> None:
        folder.mkdir()
        self._folder, self._hint = folder, hint
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.written = 0
        self._files: dict[tuple[str, int], tuple[Path, tuple[int, ...]]] = {}
        self._count = 0

    def put(self, name: str, sample: int, values: Array) -> None:
        """Keep a tensor.

        Raises:
            OnnxqError: the disk is full, or the folder cannot be written.
        """
        path = self._folder / str(self._count)
        self._count += 1
        try:
            with path.open("wb") as stream:
                stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise OnnxqError(
                f"cannot keep activations in {self._folder}: {error.strerror or error}", self._hint
            ) from error
        self.written += values.nbytes
        self._files[name, sample] = path, values.shape
        self.dtypes[name] = values.dtype

    def get(self, name: str, sample: int) -> Array:
        """A tensor as it was put."""
        path, shape = self._files[name, sample]
        return np.fromfile(path, np.uint8).view(self.dtypes[name]).reshape(shape)

    def keep(self, names: Collection[str]) -> None:
        """Drop all other tensors."""
        for key in [key for key in self._files if key[0] not in names]:
            self._files.pop(key)[0].unlink()
        self.dtypes = {name: dtype for name, dtype in self.dtypes.items() if name in names}

    def copy(self, folder: Path) -> Frontier:
        """Another one that goes on from here. Files are never changed, so both may have them."""
        other = Frontier(folder, self._hint)
        other.dtypes, other._count = dict(self.dtypes), self._count
        for key, (path, shape) in self._files.items():
            link = folder / path.name
            try:
                os.link(path, link)
            except OSError:  # a file system without links
                shutil.copyfile(path, link)
            other._files[key] = link, shape
        return other
