"""Scales, codes and back: ONNX's quantization arithmetic, exactly.

ONNX QuantizeLinear divides by the scale, rounds half to even and saturates. Multiplying by a
reciprocal instead changes codes at ties.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.formats import QuantFormat

FloatArray = npt.NDArray[Any]


def amax(values: FloatArray, axis: int | None = None) -> FloatArray:
    """Largest magnitude: a scalar, or one for each index along `axis` (float32).

    max and -min rather than max of abs: the same number without a copy of the values.
    """
    if axis is None:
        low, high = values.min(initial=0), values.max(initial=0)
    else:
        others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        low, high = values.min(axis=others, initial=0), values.max(axis=others, initial=0)
    return np.maximum(np.float32(0) + high, -(np.float32(0) + low)).astype(np.float32)


def scale_for(peak: FloatArray, fmt: QuantFormat, dtype: npt.DTypeLike) -> FloatArray:
    """Scale that maps `peak` to the format's largest code, positive and finite in `dtype`.

    The result is rounded to `dtype` first: codes are computed with the scale that is stored.
    A zero peak (an all-zero channel) gets the largest scale of the others, or 1: its codes are zero
    whatever the scale.

    Raises:
        ValueError: a peak is not finite, or its scale overflows `dtype`.
    """
    peak = np.asarray(peak, np.float32)
    if not np.isfinite(peak).all():
        raise ValueError("the range is not finite")
    limits = _finfo(dtype)
    wanted = peak.astype(np.float64) / fmt.qmax
    wanted = np.where(peak > 0, wanted, wanted.max(initial=0) or 1.0)
    # Below the smallest normal number a scale loses its digits; the codes then just stay small.
    scale = np.maximum(wanted, float(limits.smallest_normal)).astype(dtype)
    if not np.isfinite(scale.astype(np.float32)).all():
        raise ValueError(f"a scale of {wanted.max():.3g} overflows {np.dtype(dtype).name}")
    return np.asarray(scale)


def split_scale(scale: FloatArray, dtype: npt.DTypeLike) -> tuple[FloatArray, FloatArray]:
    """Factor a vector of scales into one scale and a vector of ratios to it, both in `dtype`.

    The common scale is the geometric mean, but never below the smallest normal number; the ratios
    are taken to its rounded value. Their product, in float32, is what codes must be made with.
    """
    wide = scale.astype(np.float64)
    mean = np.exp(np.log(wide).mean())
    common = np.maximum(mean, float(_finfo(dtype).smallest_normal)).astype(dtype)
    # A channel 2^14 times smaller than most needs no digits of its own, but must not become 0.
    ratios = np.maximum(wide / common.astype(np.float64), float(_finfo(dtype).smallest_normal))
    return np.asarray(common), ratios.astype(dtype)


def quantize(
    values: FloatArray, scale: FloatArray, fmt: QuantFormat, axis: int | None = None
) -> FloatArray:
    """Codes of `values`: round_half_even(values / scale), saturated (ONNX QuantizeLinear).

    Args:
        scale: a scalar, or one value for each index along `axis`.

    Returns:
        Array of the format's dtype, shaped like `values`.
    """
    divided = values.astype(np.float32) / _along(scale, values.ndim, axis)
    if not fmt.is_float:
        np.rint(divided, out=divided)
    np.clip(divided, -fmt.qmax, fmt.qmax, out=divided)
    return divided.astype(fmt.dtype())


def dequantize(
    codes: FloatArray, scale: FloatArray, axis: int | None = None
) -> npt.NDArray[np.float32]:
    """Values that codes stand for: codes x scale in float32 (ONNX DequantizeLinear)."""
    return np.asarray(
        codes.astype(np.float32) * _along(scale, codes.ndim, axis), dtype=np.float32
    )


def _along(scale: FloatArray, rank: int, axis: int | None) -> FloatArray:
    scale = np.asarray(scale).astype(np.float32)
    if axis is None or scale.ndim == 0:
        return scale
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)


def _finfo(dtype: npt.DTypeLike) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(np.dtype(dtype))
