"""What calibration keeps of a tensor: a few numbers or a few thousand counts, never its values.

A statistic takes arrays one after another (`update`), can be added to another of its kind (`merge`)
and is the same, bit for bit, whatever the order and however the data was split: extremes and whole
numbers are all it holds, but for `gram` and `patches`, sums of products, whose last bits the order
decides. It is asked for by name, several joined by "+":

| name              | holds                                                       | memory |
|-------------------|-------------------------------------------------------------|--------|
| `amax`            | smallest and largest value                                  | 16 B   |
| `histogram`       | that, and counts of |x| in bins cut by the float's own bits | 57 KB  |
| `channel_amax:-1` | max |x| of each index of one axis                           | 4 B each |
| `gram`            | X^T X of the last axis (its channels), and the rows of X    | 4 B a pair |
| `patches:...`     | the same of a convolution's patches (`onnxq.unfolding`)     | the same |
| `rows`            | 256 rows of the last axis (`onnxq.calibrate.rows`)          | 1 KB a channel |
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.bins import MagnitudeBins
from onnxq.calibrate.patches import Patches
from onnxq.calibrate.rows import Rows
from onnxq.errors import OnnxqError

Array = NDArray[Any]
_FLOATS = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(np.float64),
)


class NotFiniteError(Exception):
    """A tensor holds NaN or infinity. The text says which; who knows the tensor's name adds it."""


class Statistic(Protocol):
    """One statistic of one tensor. `update` raises NotFiniteError before it changes anything."""

    def update(self, values: Array) -> None: ...

    def merge(self, other: Any) -> None: ...

    def arrays(self) -> dict[str, Array]:
        """All of its state, for saving; `load` puts it back into a new statistic."""
        ...

    def load(self, arrays: Mapping[str, Array]) -> None: ...


class Amax:
    """The smallest and the largest value seen; `amax` is the larger magnitude."""

    name: ClassVar[str] = "amax"

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    @property
    def amax(self) -> float:
        """max |x|; 0.0 where nothing was seen."""
        return max(self.high, -self.low, 0.0)

    def update(self, values: Array) -> None:
        low, high = finite_extremes(values)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: Amax) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def arrays(self) -> dict[str, Array]:
        return {"extremes": np.array([self.low, self.high], np.float64)}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self.low, self.high = (float(value) for value in arrays["extremes"])


class ChannelAmax:
    """max |x| of each index of `axis`, FP32 [channels]; None before the first array."""

    name: ClassVar[str] = "channel_amax"

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.values: NDArray[np.float32] | None = None

    def update(self, values: Array) -> None:
        values = as_float32(values)
        if not -values.ndim <= self.axis < values.ndim:
            raise OnnxqError(
                f"axis {self.axis} is asked for of an array of rank {values.ndim}",
                "choose an axis that the tensor has",
            )
        others = tuple(i for i in range(values.ndim) if i != self.axis % values.ndim)
        amax = np.maximum(
            values.max(axis=others, initial=-np.inf), -values.min(axis=others, initial=np.inf)
        )
        amax = np.maximum(amax, np.float32(0.0))  # no value at all: 0
        if not np.isfinite(amax).all():
            raise NotFiniteError(_not_finite(amax))
        self._raise_to(amax)

    def merge(self, other: ChannelAmax) -> None:
        if other.values is not None:
            self._raise_to(other.values)

    def divided(self, s: Array) -> ChannelAmax:
        """That of the same values, each channel divided by s [channels]."""
        other = ChannelAmax(self.axis)
        if self.values is not None:
            other.values = (self.values / np.asarray(s, np.float64)).astype(np.float32)
        return other

    def _raise_to(self, amax: NDArray[np.float32]) -> None:
        if self.values is not None and self.values.shape != amax.shape:
            raise OnnxqError(
                f"axis {self.axis} has {amax.size} channels here and {self.values.size} before",
                "per-channel ranges need an axis whose size does not change from sample to sample",
            )
        self.values = amax if self.values is None else np.maximum(self.values, amax)

    def arrays(self) -> dict[str, Array]:
        return {} if self.values is None else {"amax": self.values}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self.values = np.asarray(arrays["amax"], np.float32) if "amax" in arrays else None


class Histogram(Amax):
    """Counts of |x| by magnitude beside the extremes; `onnxq.calibrate.bins` says how it is cut."""

    name: ClassVar[str] = "histogram"

    def __init__(self) -> None:
        super().__init__()
        self.bins = MagnitudeBins()

    def update(self, values: Array) -> None:
        values = as_float32(values)
        low, high = finite_extremes(values)
        self.low, self.high = min(self.low, low), max(self.high, high)
        if values.size:
            self.bins.count(values, max(high, -low))

    def merge(self, other: Amax) -> None:
        if not isinstance(other, Histogram):
            raise TypeError(f"a histogram merges with histograms, not with {type(other).__name__}")
        super().merge(other)
        self.bins.merge(other.bins)

    def arrays(self) -> dict[str, Array]:
        return super().arrays() | self.bins.arrays()

    def load(self, arrays: Mapping[str, Array]) -> None:
        super().load(arrays)
        self.bins = MagnitudeBins.from_arrays(arrays)


class Gram:
    """X^T X over the last axis, FP32 [channels, channels], and the number of rows of X.

    Every second-order method needs no more of a layer's input (`onnxq.algorithms.hessian`). Only
    one triangle is summed, half the products; `matrix` gives both.
    """

    name: ClassVar[str] = "gram"

    def __init__(self) -> None:
        self.count = 0
        self._upper: NDArray[np.float32] | None = None
        self._parked: IO[bytes] | None = None

    @staticmethod
    def bytes_for(channels: int) -> int:
        """Bytes one takes."""
        return 4 * channels**2

    @property
    def matrix(self) -> NDArray[np.float32]:
        """X^T X / rows.

        Raises:
            OnnxqError: no row was seen.
        """
        found = self._state()
        if found is None:
            raise OnnxqError(
                "a layer's input was empty throughout the calibration", "give data that reaches it"
            )
        upper = np.triu(found)
        upper /= np.float32(self.count)
        return np.asarray(upper + np.triu(upper, 1).T)

    @property
    def matrices(self) -> NDArray[np.float32]:
        """The same [1, channels, channels]: inputs in one group."""
        return self.matrix[None]

    def rows(self, values: Array) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(0, rows [n, channels]) of the values."""
        if values.size:
            yield 0, as_float32(values).reshape(-1, values.shape[-1])

    def update(self, values: Array) -> None:
        for _, rows in self.rows(values):
            rows = np.ascontiguousarray(rows)
            # Finite squares are those of finite values: half the time of looking at each.
            if not math.isfinite(np.vdot(rows, rows)):
                finite_extremes(values)
            self.add(rows)

    def add(self, rows: NDArray[np.float32]) -> None:
        """Rows [n, channels], all finite."""
        from scipy.linalg.blas import ssyrk

        rows = np.ascontiguousarray(rows)
        total = self._state()
        if total is not None and len(total) != rows.shape[1]:
            raise _other_channels(rows.shape[1], len(total))
        # BLAS counts columns first: its A is the rows' transpose as it lies, C its upper triangle.
        self._upper = ssyrk(1.0, rows.T, 1.0, total, overwrite_c=1)
        self.count += len(rows)

    def divided(self, s: Array) -> Gram:
        """That of the same rows, each channel divided by s [channels]."""
        other, found = Gram(), self._state()
        if found is not None:
            inverse = (1 / np.asarray(s, np.float64)).astype(np.float32)
            other._upper = np.asfortranarray(found * inverse[:, None] * inverse)
            other.count = self.count
            if self._parked is not None:
                other.park()
        return other

    def merge(self, other: Gram) -> None:
        theirs, own = other._state(), self._state()
        if theirs is None:
            return
        if own is not None and own.shape != theirs.shape:
            raise _other_channels(len(theirs), len(own))
        self._upper = np.asfortranarray(theirs if own is None else own + theirs)
        self.count += other.count

    def park(self, folder: Path | None = None) -> None:
        """Move the sums to a nameless temporary file; whoever asks for them reads it again.

        Args:
            folder: where; None: the system's for such.
        """
        if self._upper is not None:
            self._parked = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this does)
            self._upper.T.tofile(self._parked)
            self._upper = None

    def _state(self) -> NDArray[np.float32] | None:
        if self._upper is None and self._parked is not None:
            self._parked.seek(0)
            flat = np.fromfile(self._parked, np.float32)
            return flat.reshape(math.isqrt(flat.size), -1).T
        return self._upper

    def arrays(self) -> dict[str, Array]:
        rows, found = np.array(self.count, np.int64), self._state()
        return {"rows": rows} if found is None else {"rows": rows, "gram": found}

    def load(self, arrays: Mapping[str, Array]) -> None:
        found = np.asfortranarray(arrays["gram"], np.float32) if "gram" in arrays else None
        if found is not None and (found.ndim != 2 or len(found) != len(found.T)):
            raise ValueError(f"a Gram matrix of shape {list(found.shape)}")
        if found is not None and not np.isfinite(found).all():
            raise ValueError("a Gram matrix that is not finite")
        self.count, self._upper = int(arrays["rows"]), found


def _other_channels(found: int, before: int) -> OnnxqError:
    return OnnxqError(
        f"its last axis has {found} channels here and {before} before",
        "the input of a layer needs a last axis whose size does not change",
    )


# Name -> what makes one from the text after ":".
REGISTRY: dict[str, Callable[[str], Statistic]] = {
    Amax.name: lambda _: Amax(),
    Histogram.name: lambda _: Histogram(),
    Gram.name: lambda _: Gram(),
    Rows.name: lambda _: Rows(),
    Patches.name: Patches,
    ChannelAmax.name: lambda axis: ChannelAmax(int(axis or -1)),
}


def make(names: str) -> dict[str, Statistic]:
    """New statistics by name: `"histogram+channel_amax:-1"` gives both, under those names.

    Raises:
        OnnxqError: an unknown name, with the list of known ones.
    """
    made: dict[str, Statistic] = {}
    for name in names.split("+"):
        kind, _, option = name.partition(":")
        try:
            made[name] = REGISTRY[kind](option)
        except (KeyError, ValueError):
            raise OnnxqError(
                f"there is no statistic {name!r}", f"choose among {', '.join(sorted(REGISTRY))}"
            ) from None
    return made


LARGE = (Gram, Patches, Rows)
"""Kinds that keep more than a few kilobytes, by the channels of the tensor's last axis."""

PARKED = (Gram, Patches)
"""Kinds that wait on disk when they are done."""


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether ranges are kept of it: FP32, FP16, BF16, FP64."""
    return dtype in _FLOATS


def as_float32(values: Array) -> NDArray[np.float32]:
    """FP16 and BF16 widened (exact); FP32 as it is; FP64 rounded.

    Raises:
        OnnxqError: not a floating-point array.
    """
    if values.dtype == np.float32:
        return values
    if is_float(values.dtype):
        with np.errstate(over="ignore"):  # an FP64 beyond FP32 is infinite, and found so
            return values.astype(np.float32)
    raise OnnxqError(
        f"ranges are kept of floating-point tensors, not of {values.dtype.name}",
        "leave this tensor out of the watched ones",
    )


def finite_extremes(values: Array) -> tuple[float, float]:
    """Smallest and largest value; (inf, -inf) of an empty array.

    Two plain passes instead of |x| and its maximum: 2.3 times as fast, and NaN shows in both.

    Raises:
        NotFiniteError: NaN or infinity.
    """
    values = as_float32(values)
    if not values.size:
        return np.inf, -np.inf
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotFiniteError(_not_finite(values))
    return low, high


def _not_finite(values: Array) -> str:
    nans, infinities = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    parts = [f"{n} {what}" for n, what in ((nans, "NaN"), (infinities, "infinite")) if n]
    return f"{' and '.join(parts)} among {values.size} values"
