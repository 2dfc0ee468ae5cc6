"""X^T X of what a convolution reads: its input unfolded to patches, a matrix for each group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.unfolding import Unfolding

Array = NDArray[Any]


class Patches:
    """A Gram matrix [length, length] for each group of a convolution (see `onnxq.unfolding`).

    Args:
        unfolding: as `Unfolding` writes it.
    """

    name: ClassVar[str] = "patches"

    def __init__(self, unfolding: str) -> None:
        from onnxq.calibrate.statistics import Gram

        self.unfolding = Unfolding.parse(unfolding)
        self._grams = [Gram() for _ in range(self.unfolding.groups)]

    def bytes_for(self, channels: int) -> int:
        """Bytes it takes; it knows its channels."""
        return sum(gram.bytes_for(self.unfolding.length) for gram in self._grams)

    @property
    def matrices(self) -> NDArray[np.float32]:
        """X^T X / rows [groups, length, length].

        Raises:
            OnnxqError: no row was seen.
        """
        return np.stack([gram.matrix for gram in self._grams])

    def rows(self, values: Array) -> Iterator[tuple[int, Array]]:
        """(group, rows [n, length]) of the values.

        Raises:
            OnnxqError: they are no input of this convolution.
        """
        from onnxq.calibrate.statistics import as_float32

        if not values.size:
            return
        try:
            yield from self.unfolding.rows(as_float32(values))
        except ValueError as error:
            raise OnnxqError(str(error), "export the model again, with its shapes") from error

    def update(self, values: Array) -> None:
        from onnxq.calibrate.statistics import finite_extremes

        finite_extremes(values)
        for group, rows in self.rows(values):
            self._grams[group].add(rows)

    def merge(self, other: Patches) -> None:
        for own, theirs in zip(self._grams, other._grams, strict=True):
            own.merge(theirs)

    def park(self, folder: Path | None = None) -> None:
        """Move the sums to disk, as `Gram` does."""
        for gram in self._grams:
            gram.park(folder)

    def arrays(self) -> dict[str, Array]:
        found = [gram.arrays() for gram in self._grams]
        return {key: np.stack([arrays[key] for arrays in found]) for key in found[0]}

    def load(self, arrays: Mapping[str, Array]) -> None:
        if any(len(array) != len(self._grams) for array in arrays.values()):
            raise ValueError("Gram matrices of another number of groups")
        for index, gram in enumerate(self._grams):
            gram.load({key: array[index] for key, array in arrays.items()})
