"""SmoothQuant: make the loud channels of an input quieter, and the weights that meet them larger.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv:2211.10438, section 4: x W = (x / s)(s W) with s_j = max|x_j|^alpha /
max|w_j|^(1 - alpha). Activations have one scale for all channels, so that one loud channel leaves
the others few codes; weights have a scale an output and can take the difference. The paper takes
one alpha for a model; here each input has its own, the one that errs least on rows of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.algorithms.clip import powers, row_error
from onnxq.formats import QuantScheme

Matrix = NDArray[Any]

ALPHAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Smoothing:
    """What a search found.

    Attributes:
        s: [K]; ones where no alpha errs less than none.
        alpha: what the best is called; None where none does.
        before, after: error of the layers' outputs over their power (see `clip.row_error`), as they
            are and smoothed.
    """

    s: NDArray[np.float64]
    alpha: str | None
    before: float
    after: float


def factors(
    peaks: Matrix, weights: Sequence[Matrix], alpha: float, ties: Sequence[NDArray[np.int64]] = ()
) -> NDArray[np.float64]:
    """s [K] of one alpha, its least and largest value as far below 1 as above.

    Args:
        peaks: max |x_j| [K].
        weights: W [K, N] of every layer that reads the input.
        ties: channels that must share a value; what they share is the largest of them.
    """
    a = np.asarray(peaks, np.float64)
    w = np.max([np.abs(W).max(axis=1) for W in weights], axis=0).astype(np.float64)
    a, w = (np.maximum(v, v.max() * 1e-4 or 1.0) for v in (a, w))
    s = a**alpha / w ** (1 - alpha)
    for tied in ties:
        s[tied] = s[tied].max()
    return np.asarray(s / np.sqrt(s.max() * s.min()))


def search(
    X: Matrix,
    counts: Matrix,
    weights: Sequence[tuple[Matrix, QuantScheme]],
    candidates: Mapping[str, NDArray[np.float64]],
    quantized: Callable[[Matrix, Matrix], Iterable[Matrix]],
) -> Smoothing:
    """The alpha whose s gives the layers' outputs the least error, weights and input quantized.

    Args:
        X: rows of the input [R, K].
        counts: how many rows each stands for [R].
        weights: W [K, N] and how it is stored, of every layer that reads the input.
        candidates: s [K] by what it is called.
        quantized: rows that were divided by s, and s -> the rows quantized and back, in every way
            that may be chosen.
    """
    exact = X @ np.hstack([W for W, _ in weights])
    power = powers(counts, exact)

    def error(s: NDArray[np.float64]) -> float:
        factors = s.astype(np.float32)[:, None]
        stored = np.hstack([rounded_weight(W * factors, scheme) for W, scheme in weights])
        inputs = quantized((X / s).astype(np.float32), s)
        return min(row_error(read @ stored - exact, power, counts) for read in inputs)

    ones = np.ones(X.shape[1])
    before = error(ones)
    best = Smoothing(ones, None, before, before)
    for alpha, s in candidates.items():
        found = error(s)
        if found < best.after:
            best = Smoothing(s, alpha, best.before, found)
    return best


def rounded_weight(W: Matrix, scheme: QuantScheme) -> Matrix:
    """Q(W) [K, N], rounded to nearest."""
    scale = numerics.scales_for(numerics.peaks(W, scheme.granularity), scheme)
    step = numerics.steps(scale, scheme, W.shape)
    return np.asarray(numerics.nearest(W / step, scheme.format) * step)
