"""Counts of magnitudes in bins cut by the float's own bits: no range to know before, one pass.

A positive FP32 number's bits, read as an integer, grow with the number; dropping the low bits puts
it into a bin. Every power of two is one octave of bins. How fine an octave is cut depends only on
how far it lies below the octave of the largest value:

    octave of the maximum   2048 bins     so that [0, max] has 2048 to 4096 bins of one width
    one below               1024            W = 2^(octave - 11): what a search for a clipping
    two below                512            range needs, uniform like the levels it clips for
    ...                      ...
    four and more below      128          finer than W, so that small values stay apart too
    more than 31 below       one bin for all of them, zeros included

When a larger maximum comes, octaves sink and adjacent bins are added together; an octave is never
finer for the larger maximum, so nothing is guessed and the counts depend on the values alone, not
on their order or on how they were split: any two histograms can be added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

TOP_BITS = 11  # mantissa bits that cut the octave of the maximum
FLOOR_BITS = 7  # mantissa bits that cut the low octaves
OCTAVES = 31
_SHIFT = 23 - TOP_BITS  # FP32 has 23 mantissa bits
_WINDOW = OCTAVES << TOP_BITS
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_CHUNK = 1 << 17  # values counted at a time: 1.5 MB of scratch, which stays in the cache
_FEW = 1 << 16  # fewer values than fine bins: look each one's bin up, do not sum the fine bins


def _layout() -> NDArray[np.int64]:
    """First fine bin of every bin [BINS], counted from the lowest octave; bin 0 lies below it."""
    starts = [np.array([-1])]
    for octave in range(OCTAVES):
        bits = max(TOP_BITS - (OCTAVES - 1 - octave), FLOOR_BITS)
        step = 1 << (TOP_BITS - bits)
        starts.append(np.arange(octave << TOP_BITS, (octave + 1) << TOP_BITS, step))
    return np.concatenate(starts).astype(np.int64)


_STARTS = _layout()
BINS = _STARTS.size
_BIN_OF_FINE = np.searchsorted(_STARTS + 1, np.arange(_WINDOW + 1), side="right") - 1


@dataclass
class MagnitudeBins:
    """`counts` [BINS]; `top` is the biased exponent of the octave of the largest value.

    `top` does not go below OCTAVES (values of 2^-96): all normal FP32 numbers are in reach then.
    """

    top: int = OCTAVES
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def count(self, values: NDArray[np.float32], amax: float) -> None:
        """Add every value of a finite FP32 array; `amax` is its max |x|."""
        self._raise_to(int(np.float32(abs(amax)).view(np.uint32)) >> 23)  # abs: of -0.0 too
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
        few = flat.size < _FEW
        fine = self.counts if few else np.zeros(_WINDOW + 1, np.int64)
        for start in range(0, flat.size, _CHUNK):
            index = self._fine_index(flat[start : start + _CHUNK])
            # Not bincount: add.at looks for no extremes first and lets other threads run.
            np.add.at(fine, _BIN_OF_FINE[index] if few else index, 1)
        if not few:
            self.counts += np.add.reduceat(fine, _STARTS + 1)

    def _fine_index(self, bits: NDArray[np.uint32]) -> NDArray[np.int64]:
        """The fine bin of each float given by its bits: from 1, and 0 for all below the window."""
        magnitude = np.bitwise_and(bits, _MAGNITUDE)
        np.right_shift(magnitude, np.uint32(_SHIFT), out=magnitude)
        below = np.uint32(_first(self.top) - 1)
        np.clip(magnitude, below, _MAGNITUDE, out=magnitude)  # thrice as fast as np.maximum
        np.subtract(magnitude, below, out=magnitude)
        return magnitude.astype(np.int64)

    def merge(self, other: MagnitudeBins) -> None:
        """Add the counts of another histogram."""
        self._raise_to(other.top)
        self.counts += _sunk(other.counts, other.top, self.top)

    def _raise_to(self, top: int) -> None:
        if top > self.top:
            self.counts = _sunk(self.counts, self.top, top)
            self.top = top

    def edges(self) -> NDArray[np.float64]:
        """Lower edge of every bin and the upper edge of the last: [BINS + 1], from 0."""
        fine = np.append(_STARTS, _WINDOW) + _first(self.top)
        # The edge after the largest finite octave is 2^128, which FP32 reads as infinity.
        edges = (fine.astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
        edges[0] = 0.0
        edges[np.isinf(edges)] = 2.0**128
        return edges

    def arrays(self) -> dict[str, NDArray[Any]]:
        """State for saving; only the span of bins that hold something."""
        used = np.flatnonzero(self.counts)
        first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
        return {"top_first": np.array([self.top, first]), "counts": self.counts[first:last]}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> MagnitudeBins:
        """The histogram that `arrays` gave this."""
        top, first = (int(value) for value in arrays["top_first"])
        bins = cls(top)
        counts = arrays["counts"]
        bins.counts[first : first + counts.size] = counts
        return bins


def _first(top: int) -> int:
    """The fine bin, in the whole FP32 range, where the lowest octave under `top` begins."""
    return (top - OCTAVES + 1) << TOP_BITS


def _sunk(counts: Counts, old: int, new: int) -> Counts:
    """Counts under the maximum's octave `old`, as they are under a higher octave `new`."""
    if old == new:
        return counts
    target = np.searchsorted(_STARTS + _first(new), _STARTS + _first(old), side="right") - 1
    result = np.zeros(BINS, np.int64)
    np.add.at(result, np.maximum(target, 0), counts)
    return result
