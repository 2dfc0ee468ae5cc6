"""Scales, codes and back: ONNX's quantization arithmetic, exactly.

ONNX QuantizeLinear divides by the scale, rounds half to even and saturates. Multiplying by a
reciprocal instead changes codes at ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.formats import QuantFormat

FloatArray = npt.NDArray[Any]


class NotFiniteError(ValueError):
    """Values that hold NaN or infinity: no scale fits them."""


class ScaleRangeError(ValueError):
    """A range whose scale the scale's type cannot hold."""


def amax(values: FloatArray, axis: int | None = None) -> FloatArray:
    """Largest magnitude: a scalar, or one for each index along `axis` (float32).

    max and -min rather than max of abs: the same number without a copy of the values.
    """
    if axis is None:
        low, high = values.min(initial=0), values.max(initial=0)
    else:
        others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        low, high = values.min(axis=others, initial=0), values.max(axis=others, initial=0)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which `scale_for` names
        peak = np.maximum(np.float32(0) + high, -(np.float32(0) + low))
        return np.asarray(peak, np.float32)


def scale_for(peak: FloatArray, fmt: QuantFormat, dtype: npt.DTypeLike) -> FloatArray:
    """Scale that maps `peak` to the format's largest code, positive and finite in `dtype`.

    The result is rounded to `dtype` first: codes are computed with the scale that is stored.
    A zero peak (an all-zero channel) gets the largest scale of the others, or 1: its codes are zero
    whatever the scale. No scale is below the least normal number of `dtype`: its reciprocal, by
    which a compiler multiplies, must be finite too.

    Raises:
        NotFiniteError: a peak is NaN or infinite.
        ScaleRangeError: a scale overflows `dtype`.
    """
    peak = np.asarray(peak, np.float32)
    if not np.isfinite(peak).all():
        raise NotFiniteError("NaN or infinite values")
    wanted = peak.astype(np.float64) / fmt.qmax
    wanted = np.where(peak > 0, wanted, wanted.max(initial=0) or 1.0)
    if wanted.max(initial=0) > _largest(dtype):
        raise ScaleRangeError(
            f"a range of {peak.max():.3g} needs a scale that overflows {np.dtype(dtype).name}"
        )
    return np.asarray(np.maximum(wanted, smallest_normal(dtype)).astype(dtype))


def activation_scale(peak: float, fmt: QuantFormat, dtype: npt.DTypeLike) -> FloatArray:
    """The scale of an activation measured at `peak`.

    A range that was never seen to leave 0 says nothing about the values to come. One whose scale
    had to be raised to the least normal number leaves codes unused: of INT8 half a bit at most, of
    a float format 6 bits of exponent, which leave it INT8's ratio of largest to least.

    Raises:
        NotFiniteError: the peak is NaN or infinite.
        ScaleRangeError: the peak is 0, or `dtype` holds no scale for it.
    """
    if peak == 0:
        raise ScaleRangeError("its input was 0 throughout the calibration")
    scale = scale_for(np.array(peak), fmt, dtype)
    if float(scale) * fmt.qmax > (64 if fmt.is_float else 1.5) * peak:
        raise ScaleRangeError(
            f"a range of {peak:.3g} needs a scale below the normal numbers of "
            f"{np.dtype(dtype).name}"
        )
    return scale


def common_scale(scales: Sequence[FloatArray], dtype: npt.DTypeLike) -> FloatArray:
    """One scale in `dtype` for several weights: a power of two, below all of them if it can be.

    A code times a power of two is exact in any type. A product under a scale below a channel's own
    is smaller than the result, so that it overflows only where the result does; but 2^6 below the
    largest scale is the limit, or the largest channels would lose digits in FP16.

    Raises:
        ScaleRangeError: the largest scale is beyond `dtype`.
    """
    logs = np.log2(np.concatenate([np.ravel(s) for s in scales]).astype(np.float64))
    largest = float(logs.max())
    if largest > np.log2(_largest(dtype)):
        raise ScaleRangeError(f"a scale of {2**largest:.3g} overflows {np.dtype(dtype).name}")
    exponent = max(np.floor(logs.min()), np.ceil(largest) - 6)
    return np.asarray(2.0 ** max(exponent, np.log2(smallest_normal(dtype)))).astype(dtype)


def scale_ratios(scale: FloatArray, common: FloatArray) -> FloatArray:
    """What remains of `scale` beside `common`, in the type of `common`.

    The product of both, in float32, is what codes must be made with. A channel 2^14 times smaller
    than the common scale needs no digits of its own, but its ratio must not become 0.
    """
    ratios = scale.astype(np.float64) / np.float64(common)
    return np.maximum(ratios, smallest_normal(common.dtype)).astype(common.dtype)


def quantize(
    values: FloatArray, scale: FloatArray, fmt: QuantFormat, axis: int | None = None
) -> FloatArray:
    """Codes of `values`: round_half_even(values / scale), saturated at +-qmax.

    ONNX QuantizeLinear, but that INT8 saturates at -127, not at -128: weights are symmetric.

    Args:
        values: finite.
        scale: a scalar, or one value for each index along `axis`.

    Returns:
        Array of the format's dtype, shaped like `values`.
    """
    with np.errstate(over="ignore"):  # beyond FP32 is beyond the last code too
        divided = values.astype(np.float32) / _along(scale, values.ndim, axis)
    if not fmt.is_float:
        np.rint(divided, out=divided)
    np.clip(divided, -fmt.qmax, fmt.qmax, out=divided)
    return divided.astype(fmt.dtype())


def dequantize(
    codes: FloatArray, scale: FloatArray, axis: int | None = None
) -> npt.NDArray[np.float32]:
    """Values that codes stand for: codes x scale in float32 (ONNX DequantizeLinear)."""
    return np.asarray(codes.astype(np.float32) * _along(scale, codes.ndim, axis), dtype=np.float32)


def _along(scale: FloatArray, rank: int, axis: int | None) -> FloatArray:
    scale = np.asarray(scale).astype(np.float32)
    if axis is None or scale.ndim == 0:
        return scale
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)


def smallest_normal(dtype: npt.DTypeLike) -> float:
    """The least positive number of a floating-point type that has all its digits."""
    return float(_finfo(dtype).smallest_normal)


def _largest(dtype: npt.DTypeLike) -> float:
    return float(_finfo(dtype).max)


def _finfo(dtype: npt.DTypeLike) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]
