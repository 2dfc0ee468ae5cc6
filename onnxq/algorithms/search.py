"""Scales searched under diag(H): clip a little, or move within the grid, where the output gains.

Each scale tries multiples of the one that maps its largest weight to the largest code, and keeps
the one of least sum_k H_kk (w_k - q_k)^2: the output error if the inputs were uncorrelated. AWQ's
clip search (arXiv:2306.00978, section 3.2) is this with the error of the whole output.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.formats import PerBlock, PerTensor, QuantFormat, QuantScheme, dtype_named

Matrix = NDArray[Any]


def factors(fmt: QuantFormat) -> NDArray[np.float64]:
    """The multiples of amax that are tried.

    Whole numbers: from 8/7 (INT4 alone: a largest weight below zero then takes the code -8) down
    to .4, where clipping costs more than finer steps give. Floats: an octave up, within which the
    weights fall on other fractions of the grid, and a little of clipping.
    """
    if fmt.is_float:
        return np.exp2(np.arange(-4, 20) / 20.0)
    widest = [-fmt.qmin / fmt.qmax] if -fmt.qmin > fmt.qmax else []
    return np.array([*widest, *np.linspace(0.975, 0.4, 24)])


def search_scales(W: Matrix, h: Matrix, peak: Matrix, scheme: QuantScheme) -> Matrix:
    """Scales of W, in the scheme's type and shape.

    Args:
        W: [K, N], the axis 0 along the inputs.
        h: diag(H) [K], or of each column's own inputs [K, N]; ones give plain least squares.
        peak: largest magnitude under each scale.
    """
    best = numerics.scales_for(within(peak, scheme), scheme)
    least = _errors(W, h, best, scheme)
    for factor in factors(scheme.format):
        scale = numerics.scales_for(within(peak * factor, scheme), scheme)
        error = _errors(W, h, scale, scheme)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, scale, best)
    return best


def search_ranges(
    W: Matrix, h: Matrix, low: Matrix, high: Matrix, scheme: QuantScheme
) -> tuple[Matrix, Matrix]:
    """Scales and zero points of W for an asymmetric format: both ends drawn in by one factor.

    Args:
        low, high: the least and the largest value under each scale, 0 within.
    """
    best, zero = numerics.scales_and_zeros(low, high, scheme)
    least = _errors(W, h, best, scheme, zero)
    for factor in factors(scheme.format):
        scale, other = numerics.scales_and_zeros(low * factor, high * factor, scheme)
        error = _errors(W, h, scale, scheme, other)
        better = error < least
        least = np.where(better, error, least)
        best, zero = np.where(better, scale, best), np.where(better, other, zero)
    return best, zero


def within(peak: Matrix, scheme: QuantScheme) -> Matrix:
    """Cut at what the largest scale of the type serves."""
    info = ml_dtypes.finfo(dtype_named(scheme.scale_type))  # type: ignore[no-untyped-call]
    largest = float(info.max) * scheme.unit * scheme.format.qmax
    return np.minimum(peak, min(largest, float(np.finfo(np.float32).max)))


def _errors(
    W: Matrix, h: Matrix, scale: Matrix, scheme: QuantScheme, zero: Matrix | None = None
) -> Matrix:
    """sum_k h_k (w_k - q_k)^2 under each scale."""
    step = numerics.steps(scale, scheme, W.shape)
    middle = None if zero is None else numerics.zeros(zero, scheme, W.shape)
    error = numerics.nearest(W / step, scheme.format, middle)
    error *= step
    error -= W
    error *= error
    error *= h[:, None] if h.ndim == 1 else h
    if isinstance(scheme.granularity, PerTensor):
        return np.asarray(error.sum())
    if isinstance(scheme.granularity, PerBlock):
        if scheme.granularity.axis % 2:
            raise ValueError("blocks run along the inputs, axis 0")
        size = scheme.granularity.size
        if W.shape[0] % size == 0:  # as nearly always: 20 times as fast
            return np.asarray(error.reshape(-1, size, W.shape[1]).sum(axis=1))
        return np.asarray(np.add.reduceat(error, np.arange(0, W.shape[0], size), 0))
    return np.asarray(error.sum(axis=1 - scheme.granularity.axis % 2))
