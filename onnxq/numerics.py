"""Scales, codes and back: ONNX's quantization arithmetic, exactly.

ONNX QuantizeLinear divides by the scale, rounds half to even and saturates. Multiplying by a
reciprocal instead changes codes at ties.

A scale array holds what is stored: shape () per tensor, [C] per channel, and per block the
tensor's shape with the blocked axis divided by the block size, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.codes import encode
from onnxq.formats import (
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantFormat,
    QuantScheme,
    dtype_named,
)

FloatArray = npt.NDArray[Any]


_EXPONENT = np.uint32(0x7F800000)  # of a float32's bits


class NotFiniteError(ValueError):
    """Values that hold NaN or infinity: no scale fits them."""


class ScaleRangeError(ValueError):
    """A range whose scale the scale's type cannot hold."""


def peaks(values: FloatArray, granularity: Granularity) -> FloatArray:
    """Largest magnitude under each scale: float32, shaped like the scales.

    Without its sign bit, a 16-bit number is the larger the larger the integer of its bits.
    """
    if values.dtype.itemsize == 2:
        bits = np.bitwise_and(values.view(np.uint16), 0x7FFF)
        return np.asarray(_reduced(np.maximum, bits, granularity).view(values.dtype), np.float32)
    low, high = extremes(values, granularity)
    return np.asarray(np.maximum(high, -low), np.float32)


def extremes(values: FloatArray, granularity: Granularity) -> tuple[FloatArray, FloatArray]:
    """The least and the largest value under each scale, at most and at least 0 (float32)."""
    low = _reduced(np.minimum, values, granularity)
    high = _reduced(np.maximum, values, granularity)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which a scale refuses
        return (
            np.minimum(np.asarray(low).astype(np.float32), np.float32(0)),
            np.maximum(np.asarray(high).astype(np.float32), np.float32(0)),
        )


def _reduced(by: np.ufunc, values: FloatArray, granularity: Granularity) -> FloatArray:
    """The values under each scale reduced by np.minimum or np.maximum, and 0."""
    zero = values.dtype.type(0)
    if not isinstance(granularity, PerBlock):
        kept = granularity.axis % values.ndim if isinstance(granularity, PerChannel) else -1
        others = tuple(i for i in range(values.ndim) if i != kept)
        return np.asarray(by.reduce(values, axis=others, initial=zero))
    axis, size = granularity.axis % values.ndim, granularity.size
    length = values.shape[axis]
    if length % size:
        return np.asarray(by.reduceat(values, np.arange(0, length, size), axis))
    blocks = (*values.shape[:axis], length // size, size, *values.shape[axis + 1 :])
    return np.asarray(by.reduce(values.reshape(blocks), axis=axis + 1, initial=zero))


def scale_shape(shape: Sequence[int], granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scales of a tensor of `shape`."""
    if isinstance(granularity, PerTensor):
        return ()
    axis = granularity.axis % len(shape)
    if isinstance(granularity, PerChannel):
        return (shape[axis],)
    return tuple(-(-n // granularity.size) if i == axis else n for i, n in enumerate(shape))


def scales_for(peak: FloatArray, scheme: QuantScheme) -> FloatArray:
    """Scales that map each `peak` to the format's largest code, positive and finite.

    The result is rounded to the type it is stored in: codes are computed with that. Powers of two
    (E8M0) are rounded up, so that nothing saturates. A zero peak (an all-zero channel) gets the
    largest scale of the others, or 1: its codes are zero whatever the scale. No scale but that of
    a block is below the least normal number of a 16- or 32-bit type: its reciprocal, by which a
    compiler multiplies, must be finite too.

    Raises:
        NotFiniteError: a peak is NaN or infinite.
        ScaleRangeError: a scale overflows its type.
    """
    peak, dtype = np.asarray(peak, np.float32), dtype_named(scheme.scale_type)
    if not np.isfinite(peak).all():
        raise NotFiniteError("NaN or infinite values")
    wanted = peak.astype(np.float64) / scheme.format.qmax / scheme.unit
    wanted = np.where(peak > 0, wanted, wanted.max(initial=0) or 1.0)
    # Scales chosen under a unit that was made for them may be off by that unit's own rounding.
    if wanted.max(initial=0) > _largest(dtype) * (1 + 2.0**-20):
        raise ScaleRangeError(
            f"a range of {peak.max():.3g} needs a scale that overflows {dtype.name}"
        )
    if dtype.name == "float8_e8m0fnu":
        mantissa, exponent = np.frexp(wanted)
        wanted = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return np.asarray(
        np.clip(wanted, _least_scale(dtype, scheme.granularity), _largest(dtype)).astype(dtype)
    )


def scales_and_zeros(
    low: FloatArray, high: FloatArray, scheme: QuantScheme
) -> tuple[FloatArray, FloatArray]:
    """Scales and zero points of an asymmetric format for values in [low, high], 0 within."""
    fmt = scheme.format
    width = np.asarray(high, np.float64) - np.asarray(low, np.float64)
    scale = scales_for((width * fmt.qmax / (fmt.qmax - fmt.qmin)).astype(np.float32), scheme)
    offset = np.rint(fmt.qmin - np.asarray(low, np.float64) / _step(scale, scheme))
    return scale, np.clip(offset, fmt.qmin, fmt.qmax).astype(fmt.dtype())


def tensor_unit(peak: float, fmt: QuantFormat) -> float:
    """The scale of the whole tensor in a two-level format: its peak gets the largest block scale.

    Raises:
        NotFiniteError: the peak is NaN or infinite.
    """
    if not np.isfinite(peak):
        raise NotFiniteError("NaN or infinite values")
    unit = np.float32(peak / (fmt.qmax * _largest(dtype_named(fmt.scale_type))))
    return float(max(unit, np.float32(smallest_normal(np.float32)))) if peak > 0 else 1.0


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
    name = np.dtype(dtype).name
    scale = scales_for(np.array(peak), QuantScheme(fmt, PerTensor(), name))
    if float(scale) * fmt.qmax > (64 if fmt.is_float else 1.5) * peak:
        raise ScaleRangeError(
            f"a range of {peak:.3g} needs a scale below the normal numbers of {name}"
        )
    return scale


def common_scale(scales: Sequence[FloatArray], dtype: npt.DTypeLike) -> float:
    """One unit for several weights' scales: a power of two in `dtype`, below all if it can be.

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
    return float(2.0 ** max(exponent, np.log2(smallest_normal(dtype))))


def quantize(
    values: FloatArray, scale: FloatArray, scheme: QuantScheme, zero: FloatArray | None = None
) -> FloatArray:
    """Codes of `values`: round_half_even(values / (unit x scale)) + zero, saturated.

    ONNX QuantizeLinear, but that INT8 saturates at -127, not at -128: weights are symmetric.

    Args:
        values: finite.
        scale: of the scheme's `scale_type`, shaped as its granularity says.
        zero: zero points shaped like `scale`, for asymmetric formats.

    Returns:
        Array of the format's dtype, shaped like `values`.
    """
    fmt = scheme.format
    if zero is None:
        cube, steps_of = _cubes(values, _step(scale, scheme), scheme.granularity)
        return encode(cube, steps_of, fmt).reshape(values.shape)
    with np.errstate(over="ignore"):  # beyond FP32 is beyond the last code too
        divided = values.astype(np.float32) / steps(scale, scheme, values.shape)
    np.rint(divided, out=divided)
    divided += zeros(zero, scheme, values.shape)
    return np.asarray(np.clip(divided, fmt.qmin, fmt.qmax).astype(fmt.dtype()))


def _cubes(
    values: FloatArray, step: FloatArray, granularity: Granularity
) -> tuple[FloatArray, FloatArray]:
    """Both as [n, m, k], so that one scale is one of n, one of k, or one of both."""
    values = np.ascontiguousarray(values)
    if isinstance(granularity, PerTensor) or step.ndim == 0:
        return values.reshape(-1, 1, 1), step.reshape(1, 1, 1)
    axis = granularity.axis % values.ndim
    before, length = math.prod(values.shape[:axis]), values.shape[axis]
    after = math.prod(values.shape[axis + 1 :])
    if isinstance(granularity, PerChannel):
        if after == 1:
            return values.reshape(before, 1, length), step.reshape(1, 1, length)
        if before == 1:
            return values.reshape(length, 1, after), step.reshape(length, 1, 1)
        return values.reshape(before, length, after), step.reshape(1, length, 1)
    size = granularity.size
    if length % size:
        spread = _spread(step, granularity, values.shape)
        return values.reshape(-1, 1, 1), np.ascontiguousarray(spread).reshape(-1, 1, 1)
    blocks = before * (length // size)
    return values.reshape(blocks, size, after), step.reshape(blocks, 1, after)


def nearest(
    values: FloatArray, fmt: QuantFormat, zero: FloatArray | None = None
) -> npt.NDArray[np.float32]:
    """The format's values nearest to `values` (in units of a step): ties to even, saturated.

    Args:
        zero: the codes of 0, broadcastable to `values`, of asymmetric formats; the result is what
            codes stand for: code - zero.
    """
    low, high = (fmt.qmin, fmt.qmax) if zero is None else (fmt.qmin - zero, fmt.qmax - zero)
    grid = np.clip(values, low, high, dtype=np.float32)
    if not fmt.is_float:
        return np.asarray(np.rint(grid, out=grid))
    # A sum with 1.5 x 2^(exponent + 23 - mantissa bits) keeps just the format's mantissa.
    info = _finfo(fmt.dtype())
    least = np.float32(2.0 ** int(info.minexp))
    large = np.asarray(np.bitwise_and(grid.view(np.uint32), _EXPONENT)).view(np.float32)
    np.maximum(large, least, out=large)
    large *= np.float32(1.5 * 2.0 ** (23 - int(info.nmant)))
    rounded = grid + large
    rounded -= large
    return np.asarray(np.copysign(rounded, grid, out=rounded))


def dequantize(
    codes: FloatArray, scale: FloatArray, scheme: QuantScheme, zero: FloatArray | None = None
) -> npt.NDArray[np.float32]:
    """Values that codes stand for: (codes - zero) x step in float32 (ONNX DequantizeLinear)."""
    wide = codes.astype(np.float32)
    if zero is not None:
        wide -= zeros(zero, scheme, codes.shape)
    return np.asarray(wide * steps(scale, scheme, codes.shape), dtype=np.float32)


def steps(
    scale: FloatArray, scheme: QuantScheme, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """What a code of each element is worth: unit x scale in float32, broadcastable to `shape`."""
    return _spread(_step(scale, scheme), scheme.granularity, shape)


def zeros(zero: FloatArray, scheme: QuantScheme, shape: tuple[int, ...]) -> FloatArray:
    """The zero point of each element in float32, broadcastable to `shape`."""
    return _spread(zero.astype(np.float32), scheme.granularity, shape)


def _step(scale: FloatArray, scheme: QuantScheme) -> npt.NDArray[np.float32]:
    return np.asarray(np.asarray(scale).astype(np.float32) * np.float32(scheme.unit))


def _spread(
    each: npt.NDArray[np.float32], granularity: Granularity, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """A value of each scale -> one for each element, or broadcastable to that."""
    if isinstance(granularity, PerTensor) or each.ndim == 0:
        return each
    axis = granularity.axis % len(shape)
    if isinstance(granularity, PerBlock):
        whole = np.repeat(each, granularity.size, axis)
        return whole[tuple(slice(None, length) for length in shape)]
    return each.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def smallest_normal(dtype: npt.DTypeLike) -> float:
    """The least positive number of a floating-point type that has all its digits."""
    return float(_finfo(dtype).smallest_normal)


def _least_scale(dtype: Any, granularity: Granularity) -> float:
    """Those of blocks, and those of 8 bits, are factors of a weight: no one divides by them."""
    factor = isinstance(granularity, PerBlock) or np.dtype(dtype).itemsize == 1
    return float(_finfo(dtype).smallest_subnormal) if factor else smallest_normal(dtype)


def _largest(dtype: npt.DTypeLike) -> float:
    return float(_finfo(dtype).max)


def last_place(dtype: npt.DTypeLike) -> float:
    """What the last digit of a number of this type stands for, at most, as a share of it."""
    return float(_finfo(dtype).eps)


def _finfo(dtype: npt.DTypeLike) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]
