"""Some rows of what a layer reads: what methods try changes of its input on.

A few thousand rows would not be kept; a few hundred are, chosen by their values alone, so that the
same are kept whatever the order of the data and however it was split. The loudest are kept all,
since they decide a range and are few (the first token of a text, say); of the others as many as
there is room for, by the order of a hash.

The hash also halves all rows, and the peaks of each half are kept: what was chosen by the peaks of
one half can be judged on rows of the other, which it has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError

Array = NDArray[Any]
Floats = NDArray[np.float32]

LOUD = 64
"""How many of the rows with the largest magnitudes are kept."""
DRAWN = 192
"""How many of the others."""


class Rows:
    """LOUD + DRAWN rows [rows, channels] of the last axis, of how many, and peaks of two halves."""

    name: ClassVar[str] = "rows"

    def __init__(self) -> None:
        self.seen = 0
        self._loud: Floats | None = None
        self._drawn: Floats | None = None
        self._sides: NDArray[np.bool_] | None = None
        self._peaks: Floats | None = None

    @staticmethod
    def bytes_for(channels: int) -> int:
        """Bytes one takes."""
        return 4 * channels * (LOUD + DRAWN + 2)

    @property
    def sample(self) -> tuple[Floats, Floats]:
        """Rows [n, channels], and how many of all rows each stands for [n].

        Raises:
            OnnxqError: no row was seen.
        """
        if self._loud is None or self._drawn is None:
            raise OnnxqError(
                "a layer's input was empty throughout the calibration", "give data that reaches it"
            )
        others = max(self.seen - len(self._loud), 0)
        each = others / len(self._drawn) if len(self._drawn) else 0.0
        weights = np.repeat([1.0, each], [len(self._loud), len(self._drawn)])
        return np.concatenate([self._loud, self._drawn]), weights.astype(np.float32)

    @property
    def halves(self) -> tuple[NDArray[np.bool_], Floats]:
        """Which half each row of `sample` is of [n], and max |x| of all rows of each [2, channels].

        Raises:
            OnnxqError: no row was seen.
        """
        self.sample  # noqa: B018  raises where there is none
        assert self._sides is not None and self._peaks is not None  # they come with the rows
        return self._sides, self._peaks

    def update(self, values: Array) -> None:
        from onnxq.calibrate.statistics import as_float32, finite_extremes

        finite_extremes(values)
        if values.size:
            rows = as_float32(values).reshape(-1, values.shape[-1])
            order = _hashes(rows)
            self._add(rows, order, _halves_peaks(rows, _side(order)))
            self.seen += len(rows)

    def merge(self, other: Rows) -> None:
        if other._loud is not None and other._drawn is not None:
            rows = np.concatenate([other._loud, other._drawn])
            self._add(rows, _hashes(rows), other.halves[1])
            self.seen += other.seen

    def divided(self, s: Array) -> Rows:
        """The same rows, each channel divided by s [channels]."""
        other = Rows()
        other.seen, factors = self.seen, (1 / np.asarray(s, np.float64)).astype(np.float32)
        other._loud = None if self._loud is None else self._loud * factors
        other._drawn = None if self._drawn is None else self._drawn * factors
        other._peaks = None if self._peaks is None else self._peaks * factors
        other._sides = self._sides
        return other

    def _add(self, rows: Floats, order: NDArray[np.uint64], peaks: Floats) -> None:
        if self._loud is None or self._drawn is None or self._peaks is None:
            kept, self._peaks = rows, peaks
        elif self._loud.shape[1] != rows.shape[1]:
            raise OnnxqError(
                f"its last axis has {rows.shape[1]} channels here and {self._loud.shape[1]} before",
                "the input of a layer needs a last axis whose size does not change",
            )
        else:
            old = np.concatenate([self._loud, self._drawn])
            kept, order = np.concatenate([old, rows]), np.concatenate([_hashes(old), order])
            self._peaks = np.maximum(self._peaks, peaks)
        loud = np.lexsort((order, -np.maximum(kept.max(axis=1), -kept.min(axis=1))))
        first, rest = loud[:LOUD], loud[LOUD:]
        drawn = rest[np.argsort(order[rest], kind="stable")][:DRAWN]
        self._loud, self._drawn = kept[first], kept[drawn]
        self._sides = _side(order[np.concatenate([first, drawn])])

    def arrays(self) -> dict[str, Array]:
        seen = np.array(self.seen, np.int64)
        if self._loud is None or self._drawn is None:
            return {"seen": seen}
        sides, peaks = self.halves
        kept = {"loud": self._loud, "drawn": self._drawn}
        return {"seen": seen, **kept, "sides": sides, "peaks": peaks}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self.seen = int(arrays["seen"])
        if "loud" in arrays:
            self._loud = np.asarray(arrays["loud"], np.float32)
            self._drawn = np.asarray(arrays["drawn"], np.float32)
            self._sides = np.asarray(arrays["sides"], np.bool_)
            self._peaks = np.asarray(arrays["peaks"], np.float32)


def _side(order: NDArray[np.uint64]) -> NDArray[np.bool_]:
    return (order & np.uint64(1)).astype(np.bool_)


def _halves_peaks(rows: Floats, sides: NDArray[np.bool_]) -> Floats:
    """max |x| of the rows of each half [2, channels]; 0 where it has none."""
    halves = [np.abs(rows[sides == side]).max(axis=0, initial=0) for side in (False, True)]
    return np.asarray(halves, np.float32)


def _hashes(rows: Floats) -> NDArray[np.uint64]:
    """A number of each row's bits alone, spread over 64 bits: [n]."""
    factors = np.random.default_rng(0).integers(0, 1 << 63, rows.shape[1], np.uint64) * 2 + 1
    found = np.zeros(len(rows), np.uint64)
    for start in range(0, len(rows), 256):
        bits = np.ascontiguousarray(rows[start : start + 256]).view(np.uint32).astype(np.uint64)
        found[start : start + 256] = (bits * factors).sum(axis=1, dtype=np.uint64)
    found ^= found >> np.uint64(29)
    found *= np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(found ^ (found >> np.uint64(32)))
