"""How far one tensor is from another, summed over samples without keeping any of them.

Floating-point tensors: `FloatError` sums in float64, piece by piece, so that neither a 16-bit
dtype nor a hundred million elements can overflow or round the sums away. Integers, booleans and
strings: `DiscreteError` counts equal elements.

An element that is NaN or infinite on one side and not the same on the other is *broken*: it is
counted, kept out of the sums, and leaves the metrics without a value (None), which no tolerance
accepts. An element that is the same infinity, or NaN, on both sides agrees.

A *masked* element stands for minus infinity on both sides: one side is in the lower half of its
dtype's range or -inf, and neither is above -30000. Attention masks are so written (-3.4e38 in FP32
is -65504, or -inf after a sum, in FP16): such an element agrees, is counted, and is kept out of the
sums, which it would otherwise drown.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Elements in float64 at a time: 8 MB a temporary, whatever the tensor.
_PIECE = 1 << 20

# The least value at which an element can be masked: -65504 plus any likely score stays below.
_MASK = -30000.0


def is_float(array: Array) -> bool:
    """True for float16/32/64 and ml_dtypes' bfloat16 and 8-, 6- and 4-bit floats."""
    return is_float_dtype(array.dtype)


def is_float_dtype(dtype: np.dtype[Any]) -> bool:
    """`is_float` for a dtype."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


@dataclass
class FloatError:
    """Error sums of a candidate against a reference of the same shapes; see `add`."""

    elements: int = 0
    broken: int = 0  # NaN or infinite on one side and not the same on the other
    masked: int = 0  # minus infinity on both sides, however each writes it
    squared_reference: float = 0.0
    squared_candidate: float = 0.0
    squared_error: float = 0.0
    product: float = 0.0
    absolute_error: float = 0.0
    max_error: float = 0.0

    def add(self, reference: Array, candidate: Array) -> None:
        """Add one pair of tensors of equal shape, any floating (or integer) dtype.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
        flat_reference, flat_candidate = reference.reshape(-1), candidate.reshape(-1)
        self.elements += flat_reference.size
        floors = _floor(reference.dtype), _floor(candidate.dtype)
        for start in range(0, flat_reference.size, _PIECE):
            piece = slice(start, start + _PIECE)
            with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond 1e154; see noise
                self._add_piece(
                    flat_reference[piece].astype(np.float64),
                    flat_candidate[piece].astype(np.float64),
                    floors,
                )

    def _add_piece(self, reference: Array, candidate: Array, floors: tuple[float, float]) -> None:
        # fmin: the least that is not NaN.
        if np.fmin.reduce(reference) <= floors[0] or np.fmin.reduce(candidate) <= floors[1]:
            masked = (reference <= floors[0]) | (candidate <= floors[1])
            masked &= np.maximum(reference, candidate) <= _MASK
            self.masked += int(np.count_nonzero(masked))
            reference, candidate = reference[~masked], candidate[~masked]
        finite = np.isfinite(reference) & np.isfinite(candidate)
        if not finite.all():
            rest_reference, rest_candidate = reference[~finite], candidate[~finite]
            same = (rest_reference == rest_candidate) | (
                np.isnan(rest_reference) & np.isnan(rest_candidate)
            )
            self.broken += int(same.size - np.count_nonzero(same))
            reference, candidate = reference[finite], candidate[finite]
        if not reference.size:
            return
        self.squared_reference += float(reference @ reference)
        self.squared_candidate += float(candidate @ candidate)
        self.product += float(reference @ candidate)
        error = np.subtract(candidate, reference, out=candidate)
        self.squared_error += float(error @ error)
        np.abs(error, out=error)
        self.absolute_error += float(error.sum())
        self.max_error = max(self.max_error, float(error.max()))

    def merge(self, other: FloatError) -> None:
        """Add the sums of `other`, as if its tensors had been added here."""
        self.elements += other.elements
        self.broken += other.broken
        self.masked += other.masked
        self.squared_reference += other.squared_reference
        self.squared_candidate += other.squared_candidate
        self.squared_error += other.squared_error
        self.product += other.product
        self.absolute_error += other.absolute_error
        self.max_error = max(self.max_error, other.max_error)

    @property
    def noise(self) -> float | None:
        """Squared error over squared reference, the inverse of the SNR as a ratio; 0 = exact."""
        if self.broken:
            return None
        if self.max_error == 0.0:
            return 0.0
        if self.squared_reference == 0.0 or not math.isfinite(self.squared_error):
            return math.inf
        # Not exact: a float64 error below 1e-154, whose square underflows, must not read as 0.
        return max(self.squared_error / self.squared_reference, sys.float_info.min)

    @property
    def snr(self) -> float | None:
        """Signal-to-noise ratio in dB over all elements; +inf = exact, None = broken elements."""
        noise = self.noise
        if noise is None:
            return None
        if noise == 0.0:
            return math.inf
        return -10.0 * math.log10(noise) if noise < math.inf else -math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between all elements as two vectors; 1 if both are all zero."""
        if self.broken:
            return None
        if self.max_error == 0.0:
            return 1.0
        # sqrt each: the product of the two sums may overflow where neither does.
        lengths = math.sqrt(self.squared_reference) * math.sqrt(self.squared_candidate)
        if not 0.0 < lengths < math.inf:
            return 0.0
        return max(-1.0, min(1.0, self.product / lengths))

    @property
    def mean_error(self) -> float | None:
        """Mean absolute error."""
        return None if self.broken else self.absolute_error / max(1, self.elements - self.masked)

    @property
    def relative(self) -> float | None:
        """Length of the error over the length of the reference: sqrt(noise)."""
        return None if self.noise is None else math.sqrt(self.noise)

    def as_dict(self) -> dict[str, Any]:
        """The metrics for JSON; see `jsonable` for infinities."""
        return {
            "kind": "float",
            "elements": self.elements,
            "nan_or_inf": self.broken,
            "masked": self.masked,
            "snr_db": jsonable(self.snr),
            "cosine": jsonable(self.cosine),
            "max_abs_error": None if self.broken else self.max_error,
            "mean_abs_error": jsonable(self.mean_error),
            "relative_error": jsonable(self.relative),
        }


@dataclass
class DiscreteError:
    """Equal elements of integer, boolean or string tensors."""

    elements: int = 0
    equal: int = 0

    def add(self, reference: Array, candidate: Array) -> None:
        """Add one pair of tensors of equal shape.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
        self.elements += reference.size
        self.equal += int(np.count_nonzero(reference == candidate))

    @property
    def share(self) -> float:
        """Share of equal elements, 0 to 1; 1 for no elements."""
        return self.equal / self.elements if self.elements else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The metrics for JSON."""
        return {"kind": "discrete", "elements": self.elements, "equal_share": self.share}


@dataclass
class OutputError:
    """One output of one candidate over all samples, and its worst sample."""

    error: FloatError | DiscreteError | None = None  # None until the first sample
    samples: int = 0
    worst_snr: float | None = field(default=math.inf)  # None: broken
    worst_sample: int = 0

    def add(self, reference: Array, candidate: Array) -> None:
        """Add one sample. The first one decides between float and discrete.

        Raises:
            ValueError: the shapes differ.
        """
        if self.error is None:
            floating = is_float(reference) or is_float(candidate)
            self.error = FloatError() if floating else DiscreteError()
        if isinstance(self.error, DiscreteError):
            self.error.add(reference, candidate)
        else:
            one = FloatError()
            one.add(reference, candidate)
            self.error.merge(one)
            self._note_worst(one.snr)
        self.samples += 1

    def _note_worst(self, snr: float | None) -> None:
        if self.worst_snr is not None and (snr is None or snr < self.worst_snr):
            self.worst_snr, self.worst_sample = snr, self.samples

    def as_dict(self) -> dict[str, Any]:
        """The metrics over all samples, with the worst sample of a floating-point output."""
        if self.error is None:
            return {}
        found = self.error.as_dict()
        if isinstance(self.error, FloatError):
            found["worst_sample"] = self.worst_sample
            found["worst_sample_snr_db"] = jsonable(self.worst_snr)
        return found


def _floor(dtype: np.dtype[Any]) -> float:
    """Half of the lowest value of a floating dtype, -inf for others: masks lie below."""
    if not is_float_dtype(dtype):
        return -math.inf
    return float(ml_dtypes.finfo(dtype).min) / 2  # type: ignore[no-untyped-call]


def jsonable(value: float | None) -> float | str | None:
    """`value`, with infinities as "inf" and "-inf": JSON has no number for them."""
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
