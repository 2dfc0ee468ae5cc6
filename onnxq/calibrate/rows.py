"""Some rows of what a layer reads: what methods try changes of its input on.

A few thousand rows would not be kept; a few hundred are, chosen by their values alone, so that the
same are kept whatever the order of the data and however it was split. The loudest are kept all,
since they decide a range and are few (the first token of a text, say); of the others as many as
there is room for, by the order of a hash.
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
    """LOUD + DRAWN rows [rows, channels] of the last axis, and how many were seen."""

    name: ClassVar[str] = "rows"

    def __init__(self) -> None:
        self.seen = 0
        self._loud: Floats | None = None
        self._drawn: Floats | None = None

    @staticmethod
    def bytes_for(channels: int) -> int:
        """Bytes one takes."""
        return 4 * channels * (LOUD + DRAWN)

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

    def update(self, values: Array) -> None:
        from onnxq.calibrate.statistics import as_float32, finite_extremes

        finite_extremes(values)
        if values.size:
            self._add(as_float32(values).reshape(-1, values.shape[-1]))
            self.seen += values.size // values.shape[-1]

    def merge(self, other: Rows) -> None:
        if other._loud is not None and other._drawn is not None:
            self._add(np.concatenate([other._loud, other._drawn]))
            self.seen += other.seen

    def divided(self, s: Array) -> Rows:
        """The same rows, each channel divided by s [channels]."""
        other = Rows()
        other.seen, factors = self.seen, (1 / np.asarray(s, np.float64)).astype(np.float32)
        other._loud = None if self._loud is None else self._loud * factors
        other._drawn = None if self._drawn is None else self._drawn * factors
        return other

    def _add(self, rows: Floats) -> None:
        if self._loud is None or self._drawn is None:
            kept = rows
        elif self._loud.shape[1] != rows.shape[1]:
            raise OnnxqError(
                f"its last axis has {rows.shape[1]} channels here and {self._loud.shape[1]} before",
                "the input of a layer needs a last axis whose size does not change",
            )
        else:
            kept = np.concatenate([self._loud, self._drawn, rows])
        peaks, order = np.maximum(kept.max(axis=1), -kept.min(axis=1)), _hashes(kept)
        loud = np.lexsort((order, -peaks))
        first, rest = loud[:LOUD], loud[LOUD:]
        drawn = rest[np.argsort(order[rest], kind="stable")][:DRAWN]
        self._loud, self._drawn = kept[first], kept[drawn]

    def arrays(self) -> dict[str, Array]:
        seen = np.array(self.seen, np.int64)
        if self._loud is None or self._drawn is None:
            return {"seen": seen}
        return {"seen": seen, "loud": self._loud, "drawn": self._drawn}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self.seen = int(arrays["seen"])
        if "loud" in arrays:
            self._loud = np.asarray(arrays["loud"], np.float32)
            self._drawn = np.asarray(arrays["drawn"], np.float32)


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
